"""The plan of a merge against the plain three-way merge of dictionaries, on random trees of facts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.facts import Fact, Key
from patchkit.merging.choices import choice_trailer, read_choices
from patchkit.merging.plan import Answers, Held, Plan, Side, Sides, plan_merge

Tree = dict[int, tuple[str, str]]  # fact -> its patch and its target

trees = st.dictionaries(
    st.integers(1, 4),
    st.tuples(st.sampled_from(["a-00000000", "b-00000000", "c-00000000"]), st.sampled_from(["x", "y"])),
)


def fact(number: int, target: str) -> Fact:
    return Fact(f"Person {number}", "{} plays", target)


def key(number: int) -> Key:
    return fact(number, "x").key


def sides_of(base: Tree, ours: Tree, theirs: Tree) -> Sides:
    """As `read_sides` gives them: a folder's files are known by their content, here by its facts."""
    folders = []
    for tree in (base, ours, theirs):
        held: dict[str, list[str]] = {}
        for number, (patch, target) in sorted(tree.items()):
            held.setdefault(patch, []).append(f"{number}{target}")
        folders.append({patch: {"facts.jsonl": " ".join(facts)} for patch, facts in held.items()})
    names = {name for tree in folders for name in tree if len({str(t.get(name)) for t in folders}) > 1}
    made = [
        Side(
            str(number),
            folder,
            {key(n): Held(p, fact(n, t)) for n, (p, t) in tree.items() if p in names},
        )
        for number, (tree, folder) in enumerate(zip((base, ours, theirs), folders, strict=True))
    ]
    return Sides((made[0],), made[1], made[2], {})


def outcome(plan: Plan, number: int) -> tuple[str, str] | None:
    """Where and what a decided fact is after the merge."""
    held = plan.sides.of(plan.side_of[key(number)]).held.get(key(number))
    return None if held is None else (held.patch, held.fact.target)


def target(tree: Tree, number: int) -> str | None:
    return tree[number][1] if number in tree else None


def merged(base: str | None, ours: str | None, theirs: str | None) -> set[str | None]:
    """The three-way merge of one value; two of them are a conflict."""
    changed = {value for value in (ours, theirs) if value != base}
    return changed or {base}


def touched(sides: Sides) -> list[int]:
    return [n for n in range(1, 5) if any(key(n) in side.held for side in sides.all)]


@settings(max_examples=400, deadline=None)
@given(base=trees, ours=trees, theirs=trees)
def test_what_is_decided_is_the_three_way_merge_and_the_rest_is_asked(
    base: Tree, ours: Tree, theirs: Tree
) -> None:
    sides = sides_of(base, ours, theirs)
    plan = plan_merge(sides, Answers())
    asked = {conflict.key for conflict in plan.undecided}
    assert set(plan.conflicts) == set(plan.undecided)
    for n in touched(sides):
        allowed = merged(*(target(tree, n) for tree in (base, ours, theirs)))
        if len(allowed) > 1:
            assert key(n) in asked
        if key(n) not in asked:
            found = outcome(plan, n)
            assert (found[1] if found else None) in allowed
    holders = [k for folder in ("a", "b", "c") for k in plan.wanted(f"{folder}-00000000")]
    assert len(holders) == len(set(holders)), "a fact is wanted in one patch"


@settings(max_examples=200, deadline=None)
@given(base=trees, ours=trees, theirs=trees, side=st.sampled_from(["ours", "theirs"]))
def test_a_side_for_all_decides_the_conflicts_and_nothing_else(
    base: Tree, ours: Tree, theirs: Tree, side: str
) -> None:
    sides = sides_of(base, ours, theirs)
    plain, chosen = plan_merge(sides, Answers()), plan_merge(sides, Answers(rest=side))
    assert chosen.undecided == ()
    assert chosen.chosen == {conflict.key: side for conflict in plain.conflicts}
    for n in touched(sides):
        if key(n) in chosen.chosen:
            assert outcome(chosen, n) == (ours if side == "ours" else theirs).get(n)
        else:
            assert outcome(chosen, n) == outcome(plain, n)
    read = read_choices(choice_trailer(s, what)[1] for what, s in chosen.chosen.items())
    assert read.keys == {what: ("ours", "theirs").index(s) for what, s in chosen.chosen.items()}
    assert read.brought_back == frozenset()


@settings(max_examples=200, deadline=None)
@given(base=trees, ours=trees, theirs=trees)
def test_the_other_way_round_it_is_the_same(base: Tree, ours: Tree, theirs: Tree) -> None:
    one, other = (plan_merge(sides_of(base, *pair), Answers()) for pair in ((ours, theirs), (theirs, ours)))
    assert [(c.key, c.kind) for c in one.conflicts] == [(c.key, c.kind) for c in other.conflicts]
    for n in touched(one.sides):
        if key(n) in one.side_of:
            assert outcome(one, n) == outcome(other, n)


def test_a_key_of_any_letters_comes_back_from_its_trailer() -> None:
    for subject in ('a "b" \\ c', "Zoë", "[x]", "東京", "a: b"):
        found = Fact(subject, "{} lies: in", "x").key
        name, value = choice_trailer("ours", found)
        assert "\n" not in value
        assert read_choices([value]).keys == {found: 0}
        assert name == "Patchkit-Choice"
    assert read_choices(["theirs patches/a-00000000"]).brought_back == {"a-00000000"}
    assert read_choices(["theirs patches/a-00000000"], "b/").brought_back == {"a-00000000"}
    assert read_choices(["theirs b/patches/a-00000000"], "b/").brought_back == {"a-00000000"}
    assert read_choices(["theirs b/patches/a-00000000"], "a/b/") == read_choices([])
    for nothing in ("", "ours", "theirs patches/../x", 'ours {"a": 1}', "mine x", "ours [1,2]", "ours ["):
        assert read_choices([nothing]) == read_choices([])
