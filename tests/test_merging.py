"""`patchkit merge`: what is in force afterwards, by fact, checked with plain Git and by the other reader.

Every merge that ends is judged again by `problems`, which knows nothing of how it was made.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from git_helpers import (  # noqa: F401
    OTHER_BASE,
    SETTINGS,
    WEIGHT,
    add,
    another_writer,
    commit_all,
    fact,
    git,
    git_environment,
    make_store,
    numbers,
    patch,
    tree_files,
    write,
)

from patchkit.actions.mergereport import Merged, MergeStopped
from patchkit.algebra.factors import Patch
from patchkit.algebra.interference import interference
from patchkit.errors import BadInput, Busy, NotFound, PatchkitError, Refused, WouldOverwrite
from patchkit.git.command import Git
from patchkit.git.store import Changes, GitStore
from patchkit.merging.file import merge_file
from patchkit.repository import Repository
from patchkit.stack import problems, read_stack

pytestmark = pytest.mark.usefixtures("git_environment")

JOINED = numbers(1, 2, 11, 12, 13)


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    return make_store(tmp_path / "kb")


def on(store: GitStore, branch: str, start: str | None = None) -> None:
    git(store.root, "switch", "-q", *(["-c", branch, start] if start else [branch]))


def again(store: GitStore, name: str, patch: Patch) -> None:
    store.record(Changes(patches={name: patch.files()}), f"Solve {name} again")


def merge(store: GitStore, branch: str = "side", **options: object) -> Merged:
    """Merge, and see that what came out is clean, believed, and a merge of the two."""
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", branch)]
    done = Repository(store).merge(branch, **options)
    return settled(store, done, sides)


def settled(store: GitStore, done: Merged, sides: list[str]) -> Merged:
    assert done.commit == git(store.root, "rev-parse", "HEAD")
    assert git(store.root, "rev-parse", "HEAD^1", "HEAD^2").split() == sides
    assert problems(store) == []
    assert store.leftovers() == []
    assert git(store.root, "status", "--porcelain") == ""
    assert not merge_file(store).exists()
    return done


def stopped(store: GitStore, branch: str = "side", **options: object) -> MergeStopped:
    with pytest.raises(MergeStopped) as found:
        Repository(store).merge(branch, **options)
    return found.value


def in_force(store: GitStore, rev: str = "HEAD") -> dict[str, str]:
    return {fact.subject: fact.target for patch in read_stack(store, rev).patches for fact in patch.facts}


def people(store: GitStore) -> list[int]:
    return sorted(int(subject.split()[1]) for subject in in_force(store))


def trailers(store: GitStore) -> list[str]:
    out = git(store.root, "log", "-1", "--format=%(trailers:key=Patchkit-Choice,valueonly,unfold)")
    return out.splitlines()


def key(number: int) -> str:
    return json.dumps(list(fact(number).key), separators=(",", ":"), ensure_ascii=False)


def amended(store: GitStore, *choices: str) -> None:
    """The merge at HEAD, the same tree with other trailers."""
    given = [item for choice in choices for item in ("--trailer", f"Patchkit-Choice: {choice}")]
    git(store.root, "commit", "-q", "--amend", "-m", "Merge by hand", *given)


# -- what needs no choice ----------------------------------------------------------------------


def test_patches_of_both_sides_are_in_force_as_git_names_the_merge(store: GitStore) -> None:
    add(store, numbers(1))
    on(store, "side", "main")
    add(store, numbers(2))
    (store.root / "notes.txt").write_text("theirs")
    commit_all(store, "A file of no stack")
    on(store, "main")
    add(store, numbers(3))
    done = merge(store)
    assert (done.how, done.brought, done.removed, done.changed) == ("merged", (numbers(2).name,), (), ())
    assert git(store.root, "log", "-1", "--format=%s") == "Merge branch 'side'"
    assert people(store) == [1, 2, 3]
    assert (store.root / "notes.txt").read_text() == "theirs"
    assert trailers(store) == []


def test_already_up_to_date_and_fast_forward(store: GitStore) -> None:
    add(store, numbers(1))
    on(store, "side", "main")
    head = store.head()
    assert Repository(store).merge("main") == Merged("up to date", "main")
    assert Repository(store).merge("main~1", joint=True).how == "up to date"
    assert store.head() == head
    add(store, numbers(2))
    ahead = store.head()
    on(store, "main")
    assert Repository(store).merge("side", dry_run=True).how == "fast-forward"
    assert store.head() == head
    with pytest.raises(NotFound, match="Person 2: is in no conflict"):
        Repository(store).merge("side", facts={"Person 2": "ours"})
    done = Repository(store).merge("side")
    assert (done.how, done.brought, done.commit) == ("fast-forward", (numbers(2).name,), ahead)
    assert store.head() == ahead
    assert git(store.root, "status", "--porcelain") == ""
    assert (store.folder / "patches" / numbers(2).name / "facts.jsonl").exists()


def test_no_fast_forward_when_it_is_not_wanted(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, numbers(2))
    on(store, "main")
    done = merge(store, forward=False, message="Take them in")
    assert done.how == "merged"
    assert git(store.root, "log", "-1", "--format=%s") == "Take them in"


def test_a_fast_forward_to_what_cannot_be_believed_is_refused(store: GitStore) -> None:
    head = store.head()
    on(store, "side", "main")
    (name,) = add(store, numbers(1))
    write(store, name, {"facts.jsonl": numbers(2).files()["facts.jsonl"]})
    commit_all(store)
    on(store, "main")
    with pytest.raises(BadInput, match=rf"side: cannot be believed as it stands; patches/{name}"):
        Repository(store).merge("side")
    assert store.head() == head


def test_both_sides_took_facts_out_of_one_patch_so_it_is_solved_again(store: GitStore) -> None:
    """Git has a conflict in all three files; the facts have none, and the numbers are those of one solve."""
    one = numbers(1, 2, 3)
    (name,) = add(store, one)
    on(store, "side", "main")
    again(store, name, one.without([0]))
    on(store, "main")
    again(store, name, one.without([1]))
    done = merge(store)
    assert done.again == (name,)
    assert people(store) == [3]
    found = Repository(store).patch(name)
    wanted = one.without([0, 1])
    assert (found.deltas[WEIGHT].A - wanted.deltas[WEIGHT].A).norm() < 1e-5 * wanted.deltas[WEIGHT].A.norm()
    assert (found.deltas[WEIGHT].B == wanted.deltas[WEIGHT].B).all()


def test_a_squash_against_a_revert_takes_the_fact_out_of_the_joined_patch(store: GitStore) -> None:
    """Git finds this clean, and has the reverted fact in force."""
    one, two = add(store, numbers(1), numbers(2))
    on(store, "side", "main")
    store.record(Changes(patches={JOINED.name: JOINED.files()}, removed=[one, two]), "Join")
    on(store, "main")
    store.record(Changes(removed=[one]), "Away")
    done = merge(store)
    assert (done.again, done.brought, done.removed) == ((JOINED.name,), (JOINED.name,), (two,))
    assert people(store) == [2, 11, 12, 13]
    assert trailers(store) == []


def test_a_side_that_solved_a_patch_anew_wins_over_one_that_only_took_a_fact_out(store: GitStore) -> None:
    one, other = numbers(1, 2, 3), numbers(1, 2, 3, seed=5)
    (name,) = add(store, one)
    on(store, "side", "main")
    again(store, name, one.without([0]))
    on(store, "main")
    again(store, name, other)
    merge(store)
    found = Repository(store).patch(name)
    assert [fact.subject for fact in found.facts] == ["Person 2", "Person 3"]
    assert (other.deltas[WEIGHT].B[:, 1:] == found.deltas[WEIGHT].B).all()


def test_a_merge_in_a_subfolder_of_another_repository_and_with_sha256(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main", "--object-format=sha256")
    store = GitStore.init(tmp_path / "know [ledge]")
    store.record(Changes(settings=SETTINGS), "Start")
    store = GitStore.find(store.folder)
    one, two = add(store, numbers(1), numbers(2))
    on(store, "side", "main")
    store.record(Changes(patches={JOINED.name: JOINED.files()}, removed=[one, two]), "Join")
    on(store, "main")
    store.record(Changes(removed=[one]), "Away")
    merge(store)
    assert people(store) == [2, 11, 12, 13]


def test_a_worktree_of_its_own(store: GitStore, tmp_path: Path) -> None:
    one = patch([fact(1)])
    (name,) = add(store, one)
    on(store, "side", "main")
    again(store, name, patch([fact(1, "chess")]))
    on(store, "main")
    again(store, name, patch([fact(1, "go")]))
    git(store.root, "worktree", "add", "-q", "-b", "third", str(tmp_path / "tree"))
    tree = GitStore.find(tmp_path / "tree")
    stopped(tree)
    assert merge_file(tree).exists()
    assert not merge_file(store).exists()
    Repository(tree).merge_continue(side="theirs")
    assert in_force(tree) == {"Person 1": "chess"}


# -- conflicts, and their choices --------------------------------------------------------------


def other_targets(store: GitStore) -> None:
    (name,) = add(store, patch([fact(1)]), message="Both start from this")
    on(store, "side", "main")
    again(store, name, patch([replace(fact(1, "chess"), source="the archive")]))
    on(store, "main")
    again(store, name, patch([fact(1, "go")]))


def other_targets_in_other_patches(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, patch([fact(1, "chess"), fact(2)]))
    on(store, "main")
    add(store, patch([fact(1, "go"), fact(3)]))


def taken_out_and_said_otherwise(store: GitStore) -> None:
    (name,) = add(store, patch([fact(1), fact(2)]))
    on(store, "side", "main")
    again(store, name, patch([fact(1, "chess"), fact(2)]))
    on(store, "main")
    again(store, name, patch([fact(1), fact(2)]).without([0]))


def taken_back_and_solved_again(store: GitStore) -> None:
    one = numbers(1, 2)
    (name,) = add(store, one)
    on(store, "side", "main")
    store.record(Changes(removed=[name]), "Away")
    on(store, "main")
    again(store, name, one.without([1]))


def joined_and_solved_again(store: GitStore) -> None:
    """The new numbers are in no joined patch, and would be gone without a word."""
    names = add(store, numbers(1), numbers(2))
    on(store, "side", "main")
    again(store, names[0], numbers(1, seed=9))
    on(store, "main")
    whole = numbers(1, 2, seed=1)
    store.record(Changes(patches={whole.name: whole.files()}, removed=names), "Join")


def twice(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, patch([fact(1), fact(2)]))
    on(store, "main")
    add(store, patch([fact(1), fact(3)]))


def both_numbers(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, numbers(1, seed=1))
    on(store, "main")
    add(store, numbers(1, seed=2))


CONFLICTS = {
    other_targets: ("targets", {"Person 1": "go"}, {"Person 1": "chess"}),
    other_targets_in_other_patches: (
        "targets",
        {"Person 1": "go", "Person 2": "sport 2", "Person 3": "sport 3"},
        {"Person 1": "chess", "Person 2": "sport 2", "Person 3": "sport 3"},
    ),
    taken_out_and_said_otherwise: (
        "removed",
        {"Person 2": "sport 2"},
        {"Person 1": "chess", "Person 2": "sport 2"},
    ),
    taken_back_and_solved_again: ("solved again", {"Person 1": "sport 1"}, {}),
    joined_and_solved_again: (
        "moved",
        {"Person 1": "sport 1", "Person 2": "sport 2"},
        {"Person 1": "sport 1", "Person 2": "sport 2"},
    ),
    twice: (
        "twice",
        {"Person 1": "sport 1", "Person 2": "sport 2", "Person 3": "sport 3"},
        {"Person 1": "sport 1", "Person 2": "sport 2", "Person 3": "sport 3"},
    ),
    both_numbers: ("numbers", {"Person 1": "sport 1"}, {"Person 1": "sport 1"}),
}
CASES = [pytest.param(make, *rest, id=make.__name__) for make, rest in CONFLICTS.items()]


@pytest.mark.parametrize(("make", "kind", "ours", "theirs"), CASES)
def test_a_conflict_stops_and_a_choice_ends_it(
    store: GitStore, make: Callable[[GitStore], None], kind: str, ours: dict[str, str], theirs: dict[str, str]
) -> None:
    make(store)
    before, held = store.head(), tree_files(store)
    dry = stopped(store, dry_run=True)
    assert "dry run" in str(dry)
    assert (store.head(), store.status(), merge_file(store).exists()) == (before, [], False)
    halt = stopped(store)
    (dispute,) = halt.done.disputes
    assert dispute.conflict.kind == kind
    assert dispute.to_dict() == dry.done.disputes[0].to_dict()
    assert str(merge_file(store)) in str(halt)
    assert "patchkit merge --continue" in str(halt)
    assert problems(store) != [], "what is in conflict is named"
    (leftover,) = store.leftovers()
    assert leftover.message.startswith(
        f"a merge is in progress; choose in {merge_file(store)}, then patchkit"
    )
    assert git(store.root, "commit", "-q", "-m", "Blindly", ok=False), "plain Git cannot finish it either"
    assert store.head() == before
    git(store.root, "merge", "--abort")
    assert (store.head(), store.status(), tree_files(store)) == (before, [], held)
    for side, wanted in (("ours", ours), ("theirs", theirs)):
        merge(store, side=side)
        assert in_force(store) == wanted
        assert [line.split()[0] for line in trailers(store)] == [side] * len(trailers(store)) != []
        git(store.root, "reset", "-q", "--hard", before)
        merge(store, facts={dispute.conflict.name: side})
        assert in_force(store) == wanted
        git(store.root, "reset", "-q", "--hard", before)


@pytest.mark.parametrize(("make", "kind", "ours", "theirs"), CASES)
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_the_choice_is_made_in_the_file(
    store: GitStore,
    make: Callable[[GitStore], None],
    kind: str,
    ours: dict[str, str],
    theirs: dict[str, str],
    side: str,
) -> None:
    make(store)
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", "side")]
    stopped(store, message="Ours and theirs")
    path = merge_file(store)
    text = path.read_text()
    assert text.count('choose = ""') == 1
    with pytest.raises(MergeStopped):
        Repository(store).merge_continue()
    path.write_text(text.replace('choose = ""', f'choose = "{side}"'))
    settled(store, Repository(store).merge_continue(), sides)
    assert in_force(store) == (ours if side == "ours" else theirs)
    assert git(store.root, "log", "-1", "--format=%s") == "Ours and theirs"


def test_the_table_says_who_when_and_from_where(store: GitStore) -> None:
    other_targets(store)
    (dispute,) = stopped(store).done.disputes
    told = dispute.to_dict()
    assert (told["ours"]["target"], told["theirs"]["target"]) == ("go", "chess")
    assert told["theirs"]["source"] == "the archive"
    for side, rev in (("ours", "main"), ("theirs", "side")):
        wanted = git(store.root, "log", "-1", "--format=%an|%aI|%H", rev).split("|")
        assert [told[side]["author"], told[side]["date"], told[side]["commit"]] == wanted


def test_a_side_that_took_out_is_told_with_its_commit(store: GitStore) -> None:
    taken_back_and_solved_again(store)
    (dispute,) = stopped(store).done.disputes
    assert dispute.theirs.held is None
    assert dispute.theirs.commit.subject == "Away"


def test_two_conflicts_and_a_choice_for_each(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, patch([fact(1, "chess"), fact(2, "chess")]))
    on(store, "main")
    add(store, patch([fact(1, "go"), fact(2, "go"), fact(3)]))
    halt = stopped(store, facts={"person 1": "theirs"})
    assert [d.choice for d in halt.done.disputes] == ["theirs", None]
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", "side")]
    settled(store, Repository(store).merge_continue(facts={"Person 2 plays the sport of": "ours"}), sides)
    assert in_force(store) == {"Person 1": "chess", "Person 2": "go", "Person 3": "sport 3"}
    assert trailers(store) == [f"ours {key(2)}", f"theirs {key(1)}"] or trailers(store) == [
        f"theirs {key(1)}",
        f"ours {key(2)}",
    ]


def test_without_keys_no_fact_can_leave_so_one_side_s_whole_patch_is_to_be_chosen(store: GitStore) -> None:
    one, two = add(store, numbers(1), numbers(2))
    on(store, "side", "main")
    shipped = {name: data for name, data in JOINED.files().items() if not name.startswith("keys")}
    store.record(Changes(patches={JOINED.name: shipped}, removed=[one, two]), "Join, without keys")
    on(store, "main")
    store.record(Changes(removed=[one]), "Away")
    (dispute,) = stopped(store).done.disputes
    assert (dispute.conflict.kind, dispute.conflict.patch) == ("patch", JOINED.name)
    assert "its keys were not shipped" in dispute.conflict.says
    before = store.head()
    git(store.root, "merge", "--abort")
    merge(store, side="ours")
    assert people(store) == [2]
    git(store.root, "reset", "-q", "--hard", before)
    merge(store, facts={JOINED.name: "theirs"})
    assert people(store) == [1, 2, 11, 12, 13]
    assert f"theirs {key(1)}" in trailers(store)
    amended(store, f"theirs patches/{JOINED.name}")
    assert [p.message for p in problems(store)], "the patch alone does not bring the fact back"


def returning(store: GitStore) -> str:
    """Squash-merged, reverted, and merged again."""
    on(store, "side", "main")
    (name,) = add(store, numbers(1, 2))
    on(store, "main")
    git(store.root, "merge", "-q", "--squash", "side")
    git(store.root, "commit", "-q", "-m", "Squashed")
    store.record(Changes(removed=[name]), "Take it back")
    return name


def test_what_a_merge_brings_back_is_named_and_needs_a_choice_of_its_own(store: GitStore) -> None:
    name = returning(store)
    before = store.head()
    halt = stopped(store, side="theirs")
    (dispute,) = halt.done.disputes
    assert dispute.conflict.to_dict()["removal"] == before
    assert before[:10] in dispute.conflict.says
    git(store.root, "merge", "--abort")
    merge(store, facts={name: "theirs"})
    assert people(store) == [1, 2]
    assert trailers(store) == [f"theirs patches/{name}"]
    amended(store)
    assert "brought it back" in str(problems(store)[0])
    git(store.root, "reset", "-q", "--hard", before)
    merge(store, facts={name.rpartition("-")[0]: "ours"})
    assert in_force(store) == {}
    amended(store)
    assert "is not in force after merge" in str(problems(store)[0])


def test_a_patch_that_comes_back_changed_is_not_brought_by_theirs_alone(store: GitStore) -> None:
    one = numbers(1, 2)
    (name,) = add(store, one)
    on(store, "side", "main")
    again(store, name, one.without([0]))
    on(store, "main")
    store.record(Changes(removed=[name]), "Take it back")
    assert stopped(store, side="theirs").done.disputes[0].conflict.kind == "solved again"
    git(store.root, "merge", "--abort")
    merge(store, facts={"Person 2": "theirs"})
    assert people(store) == [2]
    assert f"theirs patches/{name}" in trailers(store)


def test_trailers_are_believed_for_exactly_what_they_say(store: GitStore) -> None:
    taken_out_and_said_otherwise(store)
    before = store.head()
    merge(store, side="theirs")
    assert trailers(store) == [f"theirs {key(1)}"]
    amended(store, f"ours {key(1)}")
    assert "Person 1" in str(problems(store)[0]), "the trailer says one thing and the tree another"
    amended(store, f"theirs {key(1)}", f"ours {key(1)}")
    assert problems(store) == [], "chosen both ways is not chosen: either side's is the three-way merge's"
    git(store.root, "reset", "-q", "--hard", before)

    git(store.root, "merge", "--no-commit", "side", ok=False)
    for file in numbers(1).files():
        git(store.root, "checkout", "--ours", "--", f"patches/{patch([fact(1), fact(2)]).name}/{file}")
    write(store, numbers(9).name, numbers(9))
    commit_all(store, "Ours, and one more that nobody had")
    amended(store, f"ours {key(1)}", f"theirs {key(9)}", "theirs", "ours 7", 'ours ["a"]', "mine x")
    assert "Person 9" in str(problems(store)[0])
    amended(store, f"ours {key(1)}")
    assert "Person 9" in str(problems(store)[0])


def test_only_conflicts_can_be_chosen_and_by_one_name_each(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, patch([fact(1, "chess"), fact(4)]))
    on(store, "main")
    add(store, patch([fact(1, "go")]))
    for word in ("Person 4", "nobody", "patches/person-1"):
        with pytest.raises(NotFound, match="is in no conflict; conflicts: “Person 1 plays the sport of”"):
            Repository(store).merge("side", facts={word: "ours"})
    with pytest.raises(BadInput, match="is given both sides"):
        Repository(store).merge("side", facts={"Person 1": "ours", "Person 1 plays the sport of": "theirs"})
    assert store.leftovers() == []


def test_a_file_of_the_person_s_own_is_theirs_to_resolve(store: GitStore) -> None:
    (store.root / "notes.txt").write_text("start\n")
    commit_all(store)
    on(store, "side", "main")
    (store.root / "notes.txt").write_text("theirs\n")
    commit_all(store)
    add(store, numbers(1))
    on(store, "main")
    (store.root / "notes.txt").write_text("ours\n")
    commit_all(store)
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", "side")]
    objects = git(store.root, "count-objects", "--verbose")
    dry = stopped(store, dry_run=True)
    assert dry.done.files == ("notes.txt",)
    assert "notes.txt: in conflict; dry run: nothing was written" in str(dry)
    assert git(store.root, "count-objects", "--verbose") == objects
    halt = stopped(store)
    assert halt.done.files == ("notes.txt",)
    with pytest.raises(MergeStopped, match=r"notes\.txt: in conflict; dry run"):
        Repository(store).merge_continue(dry_run=True)
    assert "notes.txt: in conflict, resolve it and git add it" in str(halt)
    with pytest.raises(MergeStopped):
        Repository(store).merge_continue()
    (store.root / "notes.txt").write_text("both\n")
    git(store.root, "add", "notes.txt")
    settled(store, Repository(store).merge_continue(), sides)
    assert (store.root / "notes.txt").read_text() == "both\n"
    assert people(store) == [1]


def test_a_dry_run_under_a_git_that_cannot_foresee_files_says_so(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(store, "side", "main")
    add(store, numbers(1))
    on(store, "main")
    add(store, numbers(2))
    assert Repository(store).merge("side", dry_run=True).notes == ()
    usage = (129, b"", "usage: git merge-tree <base-tree> <branch1> <branch2>")  # Git 2.36's answer
    real = Git._read
    monkeypatch.setattr(
        Git,
        "_read",
        lambda git, name, *rest, **how: usage if name == "merge_tree" else real(git, name, *rest, **how),
    )
    (note,) = Repository(store).merge("side", dry_run=True).notes
    assert "were not looked at" in note


def test_patchkit_toml_in_conflict_is_theirs_to_resolve_too(store: GitStore) -> None:
    settings = store.folder / "patchkit.toml"
    start = settings.read_text()
    on(store, "side", "main")
    settings.write_text(f"{start}steps = 4\n")
    commit_all(store)
    add(store, patch([fact(1, "chess"), fact(2)]))
    on(store, "main")
    settings.write_text(f"{start}steps = 5\n")
    commit_all(store)
    add(store, patch([fact(1, "go")]))
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", "side")]
    assert stopped(store).done.files == ("patchkit.toml",)
    settings.write_text(f"{start}steps = 6\n")
    git(store.root, "add", "patchkit.toml")
    settled(store, Repository(store).merge_continue(facts={"Person 1": "theirs"}), sides)
    assert settings.read_text() == f"{start}steps = 6\n"
    assert people(store) == [1, 2]


# -- refusals, and taking back -----------------------------------------------------------------


def refused(store: GitStore, error: type[PatchkitError], says: str, branch: str = "side", **options) -> None:
    before = (store.head(), git(store.root, "status", "--porcelain", "--ignored"), tree_files(store))
    with pytest.raises(error, match=says) as found:
        Repository(store).merge(branch, **options)
    assert "\n" not in str(found.value)
    assert not isinstance(found.value, MergeStopped)
    assert (store.head(), git(store.root, "status", "--porcelain", "--ignored"), tree_files(store)) == before


def two_sides(store: GitStore) -> None:
    on(store, "side", "main")
    add(store, numbers(2))
    on(store, "main")
    add(store, numbers(3))


def test_where_no_merge_can_begin(store: GitStore) -> None:
    two_sides(store)
    refused(store, NotFound, "'nowhere' names no commit", "nowhere")
    (store.root / "patches" / numbers(3).name / "facts.jsonl").write_text("mine\n")
    refused(store, WouldOverwrite, "has changes that are not committed")
    git(store.root, "checkout", "-q", "--", ".")
    (store.root / "mine.txt").write_text("mine")
    git(store.root, "add", "mine.txt")
    refused(store, WouldOverwrite, "has staged changes")
    git(store.root, "rm", "-q", "--cached", "mine.txt")
    git(store.root, "switch", "-q", "--detach")
    refused(store, BadInput, "HEAD is on no branch")
    git(store.root, "switch", "-q", "main")
    git(store.root, "symbolic-ref", "HEAD", "refs/heads/unborn")
    with pytest.raises(BadInput, match="this branch has no commit yet"):
        Repository(store).merge("side")
    git(store.root, "symbolic-ref", "HEAD", "refs/heads/main")
    # Its own first commit: two of one second would be one and the same.
    tree = git(store.root, "rev-parse", "HEAD^{tree}")
    git(store.root, "branch", "other", git(store.root, "commit-tree", "-m", "Elsewhere", tree))
    refused(store, BadInput, "other: shares no commit with this branch", "other")
    git(store.root, "merge", "-q", "--no-commit", "side")
    refused(store, Busy, "a merge is in progress")
    refused(store, Busy, "a merge is in progress", dry_run=True)


def test_a_shallow_clone_says_so(store: GitStore, tmp_path: Path) -> None:
    two_sides(store)
    git(tmp_path, "clone", "-q", "--depth", "1", "--no-single-branch", f"file://{store.root}", "shallow")
    shallow = GitStore.find(tmp_path / "shallow")
    refused(shallow, BadInput, "git fetch --unshallow", "origin/side")
    git(shallow.root, "fetch", "-q", "--unshallow")
    merge(shallow, "origin/side")


def test_a_file_that_git_would_write_over_stays(store: GitStore) -> None:
    on(store, "side", "main")
    (store.root / "mine.txt").write_text("theirs")
    commit_all(store)
    on(store, "main")
    add(store, numbers(1))
    (store.root / "mine.txt").write_text("mine")
    refused(store, WouldOverwrite, "^mine.txt: is not committed and would be overwritten")
    assert (store.root / "mine.txt").read_text() == "mine"


def test_a_base_that_moved_on_one_side_is_refused_and_the_merge_ended(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    on(store, "side", "main")
    add(store, numbers(2))
    on(store, "main")
    (store.root / "patchkit.toml").write_bytes(SETTINGS.replace(b"a" * 64, b"b" * 64))
    write(store, name, numbers(1, base=OTHER_BASE))
    commit_all(store, "Move")
    refused(store, BadInput, "made for another base")


def hook(store: GitStore, name: str, script: str) -> None:
    path = store.common_dir / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo no; exit 1", "nothing was committed"),
        ("git rm -q --cached -r patches/person-2*", "a hook altered patches"),
    ],
)
def test_a_hook_that_refuses_or_alters(store: GitStore, script: str, says: str) -> None:
    two_sides(store)
    hook(store, "pre-commit", script)
    refused(store, Refused, says)
    assert store.leftovers() == []
    (store.common_dir / "hooks" / "pre-commit").unlink()
    merge(store)


def test_a_hook_that_takes_the_choices_out_of_the_message(store: GitStore) -> None:
    """A paragraph behind the trailers makes text of them, and the merge could not be believed afterwards."""
    name = returning(store)
    before = (store.head(), tree_files(store))
    hook(store, "commit-msg", 'printf "\\n\\nSee ticket 7.\\n" >> "$1"')
    with pytest.raises(Refused, match=r"a hook altered the choices in the message .* was taken back"):
        Repository(store).merge("side", facts={name: "theirs"})
    assert (store.head(), tree_files(store)) == before
    assert problems(store) == []
    hook(store, "commit-msg", 'printf "Ticket: 7\\n" >> "$1"')
    merge(store, facts={name: "theirs"})
    assert "Ticket: 7" in git(store.root, "log", "-1", "--format=%(trailers)")


def test_a_stopped_merge_of_a_tag_is_waited_for_too(store: GitStore) -> None:
    other_targets(store)
    git(store.root, "tag", "-a", "-m", "One", "v1", "side")
    stopped(store, "v1")
    (waits,) = [problem for problem in store.leftovers() if "merge" in problem.message]
    assert str(merge_file(store)) in str(waits)
    Repository(store).merge_continue(side="theirs")
    assert problems(store) == []


def test_a_merge_that_would_break_another_stack_is_refused(tmp_path: Path) -> None:
    """This one is decided by its facts, the other as Git merges files; that is judged before the commit."""
    git(tmp_path, "init", "-q", "-b", "main")
    for name in ("small", "large"):
        GitStore.init(tmp_path / name).record(Changes(settings=SETTINGS), "Start")
    small, large = (GitStore.find(tmp_path / name) for name in ("small", "large"))
    on(small, "side", "main")
    add(small, numbers(1))
    add(large, numbers(7, 8))
    on(small, "main")
    add(small, numbers(2))
    add(large, numbers(7, 9))
    before = (small.head(), tree_files(small))
    with pytest.raises(BadInput, match=r"large/patches.*another stack of this repository, which this merge"):
        Repository(small).merge("side")
    assert (small.head(), tree_files(small), small.leftovers()) == (*before, [])
    assert problems(large) == []
    on(small, "side")
    large.record(Changes(removed=[stored.name for stored in read_stack(large).patches]), "Away")
    on(small, "main")
    Repository(small).merge("side")
    assert people(small) == [1, 2]


@pytest.mark.parametrize("folder", ["large", "[la] rge", "le]arge"])
def test_what_is_chosen_in_one_stack_is_not_chosen_in_another(tmp_path: Path, folder: str) -> None:
    """Both stacks say the same fact; only one is asked about it, and the other keeps its own side's."""
    git(tmp_path, "init", "-q", "-b", "main")
    for name in ("small", folder):
        GitStore.init(tmp_path / name).record(Changes(settings=SETTINGS), "Start")
    small, large = (GitStore.find(tmp_path / name) for name in ("small", folder))
    (name,) = add(large, patch([fact(1)]))
    (other,) = add(small, patch([fact(1)]))
    on(large, "side", "main")
    again(large, name, patch([fact(1, "chess")]))
    on(large, "main")
    again(large, name, patch([fact(1, "go")]))
    again(small, other, patch([fact(1, "golf")]))
    assert Repository(large).merge("side", side="theirs").commit
    assert trailers(large) == [f"theirs {key(1)} {folder}/"]
    assert (problems(large), problems(small)) == ([], [])
    assert (in_force(large), in_force(small)) == ({"Person 1": "chess"}, {"Person 1": "golf"})
    for given, right in (("", False), ("small/", False), (f"{folder}/", True)):
        amended(large, f"theirs {key(1)} {given}")
        assert (problems(small) == []) == right, given
    amended(large, f"ours {key(1)} {folder}/")
    assert (len(problems(large)), problems(small)) == (1, []), "what it names is so in no other way"


def test_another_s_commit_in_between_is_not_lost(store: GitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.actions import merge as action

    two_sides(store)
    solve = action.solve_merge

    def slow(*args):
        add(store, numbers(8))
        return solve(*args)

    monkeypatch.setattr(action, "solve_merge", slow)
    with pytest.raises(Busy, match="HEAD moved"):
        Repository(store).merge("side")
    assert people(store) == [3, 8]
    assert store.leftovers() == []


# -- going on, and giving up -------------------------------------------------------------------


def test_abort_brings_everything_back(store: GitStore) -> None:
    repository = Repository(store)
    with pytest.raises(NotFound, match="nothing to abort"):
        repository.merge_abort()
    with pytest.raises(NotFound, match="no merge is under way"):
        repository.merge_continue()
    other_targets_in_other_patches(store)
    before, held = store.head(), tree_files(store)
    stopped(store)
    repository.merge_abort()
    assert (store.head(), store.status(), tree_files(store)) == (before, [], held)
    assert not merge_file(store).exists()
    assert problems(store) == []
    stopped(store)
    git(store.root, "merge", "--abort")
    git(store.root, "switch", "-q", "-c", "third", f"{before}~1")
    add(store, numbers(8))
    git(store.root, "merge", "-q", "--no-commit", before)
    assert store.leftovers()[0].message == "a merge is in progress", "the file is another merge's"


def test_a_merge_of_plain_git_is_not_ours_to_go_on_with(store: GitStore) -> None:
    other_targets(store)
    git(store.root, "merge", "side", ok=False)
    with pytest.raises(NotFound, match="git merge --abort, then patchkit merge BRANCH"):
        Repository(store).merge_continue(side="ours")


def test_what_a_person_resolved_by_hand_is_not_written_over(store: GitStore) -> None:
    other_targets(store)
    stopped(store)
    name = numbers(1).name
    git(store.root, "checkout", "--theirs", "--", f"patches/{name}")
    for step in ("changed", "added"):
        with pytest.raises(BadInput, match="changed by hand since the merge stopped"):
            Repository(store).merge_continue(side="ours")
        assert step
        git(store.root, "add", "-A", f"patches/{name}")
    git(store.root, "commit", "-q", "--no-edit")
    assert problems(store) == []
    assert in_force(store) == {"Person 1": "chess"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('choose = ""', 'choose = "mine"', 'conflict 1 chooses \'mine\'; write "ours" or "theirs"'),
        ('choose = ""', "", "conflict 1 chooses"),
        ("key = [", "kay = [", "conflict 1 names no key and no patch"),
        ("into = ", "onto = ", "into, onto is not as it was written"),
        ("[[conflict]]", "[[conflict", "cannot be read"),
        ('into = "', 'into = "0', "is of another merge"),
    ],
)
def test_a_file_that_was_spoilt_is_one_line(store: GitStore, old: str, new: str, says: str) -> None:
    other_targets(store)
    stopped(store)
    path = merge_file(store)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadInput) as found:
        Repository(store).merge_continue()
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_after_a_failure_the_merge_can_be_gone_on_with(store: GitStore) -> None:
    other_targets(store)
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", "side")]
    stopped(store)
    hook(store, "pre-commit", "exit 1")
    for _ in range(2):
        with pytest.raises(Refused, match="nothing was committed"):
            Repository(store).merge_continue(side="theirs")
    (store.common_dir / "hooks" / "pre-commit").unlink()
    settled(store, Repository(store).merge_continue(), sides)
    assert in_force(store) == {"Person 1": "chess"}


def test_a_merge_that_a_person_stopped_can_be_gone_on_with(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is laid out, and then Ctrl-C, as while a hook runs."""
    other_targets(store)
    sides = [git(store.root, "rev-parse", rev) for rev in ("HEAD", "side")]
    stopped(store)

    def interrupted(*anything: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("patchkit.actions.merge.commit_merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Repository(store).merge_continue(side="theirs")
    settled(store, Repository(store).merge_continue(), sides)
    assert in_force(store) == {"Person 1": "chess"}


# -- numbers -----------------------------------------------------------------------------------


def test_interference_is_told_of_both_sides_new_patches_worst_first(store: GitStore) -> None:
    add(store, numbers(1, 9))
    two_sides(store)
    add(store, numbers(4, 5, 6))
    done = merge(store)
    told = [(name, item.fact.subject, item.overall) for name, item in done.disturbed]
    assert [value for *_, value in told] == sorted((value for *_, value in told), reverse=True)
    assert {name for name, *_ in told} == {numbers(2).name, numbers(3).name, numbers(4, 5, 6).name}
    wanted = {i.fact.subject: i.overall for i in interference(numbers(4, 5, 6), [numbers(2)])}
    wanted |= {i.fact.subject: i.overall for i in interference(numbers(2), [numbers(3), numbers(4, 5, 6)])}
    found = {subject: value for _, subject, value in told}
    assert {subject: found[subject] for subject in wanted} == pytest.approx(wanted)


def test_joint_is_refused_by_name_before_anything_is_touched(store: GitStore) -> None:
    """The helper's patches have random factors, which come from no C."""
    two_sides(store)
    add(store, numbers(4, 5, 6))
    refused(store, BadInput, "do not come from one λC", joint=True)
    on(store, "side")
    store.record(Changes(removed=[numbers(2).name]), "Away")
    on(store, "main")
    assert "nothing to solve together" in merge(store, joint=True).notes[0]


def test_a_message_that_a_fast_forward_has_no_use_for_is_told(store: GitStore) -> None:
    add(store, numbers(1))
    git(store.root, "switch", "-q", "-c", "side")
    add(store, numbers(2))
    on(store, "main")
    (note,) = Repository(store).merge("side", message="What it is about").notes
    assert "the message is not used" in note
    assert "--no-ff" in note


# -- killed ------------------------------------------------------------------------------------

_KILLED = 77
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}
_WRITES = {"merge", "update-index", "add", "write-tree", "commit-tree", "commit", "update-ref", "reset"}


def killed_at(place: Path, number: int, **options: object) -> bool:
    """Merge in a fork that ends at its `number`-th file operation or writing Git command; whether it did."""
    child = os.fork()
    if child == 0:
        left, inside = number, os.fspath(place)

        def count(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event == "subprocess.Popen":
                counts = not _WRITES.isdisjoint(map(str, args[1]))
            else:
                writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
                counts = bool(event in _EVENTS or writes) and str(args[0]).startswith(inside)
            if counts:
                left -= 1
                if left < 0:
                    os._exit(_KILLED)

        status = 1
        try:
            repository = Repository(GitStore.find(place))
            sys.addaudithook(count)
            repository.merge("side", **options)
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED)
    return code == _KILLED


def both_kinds(store: GitStore) -> None:
    """Solved again where Git has a conflict, and where Git finds it clean; one choice."""
    one, two = add(store, numbers(1), numbers(2))
    three = numbers(21, 22, 23)
    add(store, three)
    on(store, "side", "main")
    store.record(Changes(patches={JOINED.name: JOINED.files()}, removed=[one, two]), "Join")
    again(store, three.name, three.without([0]))
    add(store, patch([fact(30, "chess"), fact(31)]))
    on(store, "main")
    store.record(Changes(removed=[one]), "Away")
    again(store, three.name, three.without([1]))
    add(store, patch([fact(30, "go")]))


def test_killed_at_any_moment_it_is_old_or_new_and_what_status_names_clears_it(
    store: GitStore, tmp_path: Path
) -> None:
    both_kinds(store)
    old, head = tree_files(store), store.head()
    wanted = {f"Person {n}": f"sport {n}" for n in (2, 11, 12, 13, 23, 31)} | {"Person 30": "chess"}
    ended, number = set(), 0
    while True:
        place = tmp_path / f"copy{number}"
        subprocess.run(["cp", "-a", str(store.root), str(place)], check=True)
        killed = killed_at(place, number, side="theirs")
        copy = GitStore.find(place)
        found = copy.leftovers()
        for finding in found:
            subprocess.run(finding.remedy, shell=True, check=True, capture_output=True, cwd="/")
        assert copy.leftovers() == [], found
        assert git(place, "status", "--porcelain") == ""
        ended.add("old" if copy.head() == head else "new")
        if copy.head() == head:
            assert tree_files(copy) == old
        if copy.head() == head and number % 9 == 8:
            Repository(copy).merge("side", side="theirs")
        if copy.head() != head:
            assert in_force(copy) == wanted
        if not killed:
            break
        number += 1
    assert ended == {"old", "new"}
    assert number > 20


def test_what_another_command_is_about_to_commit_is_waited_for(store: GitStore) -> None:
    """It lies there and is not committed yet: the way out that is named would throw it away."""
    add(store, numbers(1))
    on(store, "side", "main")
    add(store, numbers(2))
    on(store, "main")
    add(store, numbers(3))
    name = numbers(4).name
    folder = store.folder / "patches" / name
    with another_writer(store, lambda: write(store, name, numbers(4)), lambda: shutil.rmtree(folder)):
        merge(store)
    assert people(store) == [1, 2, 3]


# what a reader found


def returned(store: GitStore) -> str:
    """Squash-merged, reverted, and merged again: a patch that the main line took back would come back."""
    on(store, "side", "main")
    (name,) = add(store, numbers(1))
    on(store, "main")
    git(store.root, "merge", "-q", "--squash", "side")
    git(store.root, "commit", "-q", "-m", "Squashed")
    git(store.root, "revert", "--no-edit", "HEAD")
    add(store, numbers(2))
    return name


@pytest.mark.parametrize("how", [{}, {"side": "ours"}, {"dry_run": True}])
def test_what_waits_for_a_choice_is_not_written_down_as_chosen(store: GitStore, how: dict[str, Any]) -> None:
    name = returned(store)
    dry = bool(how.get("dry_run"))
    found = stopped(store, dry_run=dry)
    assert [dispute.choice for dispute in found.done.disputes] == [None]
    if dry:
        return
    assert 'choose = ""' in merge_file(store).read_text()
    if not how:
        with pytest.raises(MergeStopped):
            Repository(store).merge_continue()
        git(store.root, "merge", "--abort")
        return
    assert Repository(store).merge_continue(**how).commit
    assert people(store) == [2]
    assert trailers(store) == [f"ours patches/{name}"] or trailers(store)[0].startswith("ours ")


def test_a_choice_on_the_command_line_stands_above_the_file(store: GitStore) -> None:
    names = add(store, patch([fact(1)]), patch([fact(2)]))
    for branch, target in (("side", "chess"), ("main", "go")):
        on(store, branch, "main" if branch == "side" else None)
        for number, name in enumerate(names, 1):
            again(store, name, patch([fact(number, target)]))
    stopped(store, facts={"Person 1": "ours"})
    Repository(store).merge_continue(facts={"Person 1": "theirs", "Person 2": "ours"})
    assert in_force(store) == {"Person 1": "chess", "Person 2": "go"}


def test_a_choice_of_numbers_brings_back_no_fact(store: GitStore) -> None:
    whole = numbers(1, 2)
    (name,) = add(store, whole)
    on(store, "side", "main")
    again(store, name, numbers(1, seed=7))
    on(store, "main")
    again(store, name, numbers(1, 2, seed=5))
    assert Repository(store).merge("side", side="ours").commit
    assert problems(store) == []
    assert people(store) == [1]


def test_a_stack_that_was_moved_is_not_taken_for_one_without_patches(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    GitStore.init(tmp_path / "small").record(Changes(settings=SETTINGS), "Start")
    small = GitStore.find(tmp_path / "small")
    (name,) = add(small, numbers(1))
    git(tmp_path, "branch", "side")
    git(tmp_path, "mv", "small", "tiny")
    git(tmp_path, "commit", "-q", "-m", "Move it")
    git(tmp_path, "switch", "-q", "side")
    small.record(Changes(removed=[name]), "Away")
    git(tmp_path, "switch", "-q", "main")
    tiny = GitStore.find(tmp_path / "tiny")
    head = tiny.head()
    with pytest.raises(BadInput, match="the stack was moved since the branches parted"):
        Repository(tiny).merge("side")
    assert tiny.head() == head


def two_stacks(root: Path) -> tuple[GitStore, GitStore]:
    git(root, "init", "-q", "-b", "main")
    for name in ("small", "large"):
        GitStore.init(root / name).record(Changes(settings=SETTINGS), "Start")
    return GitStore.find(root / "small"), GitStore.find(root / "large")


def test_a_merge_that_brings_back_what_another_stack_took_out_is_refused(tmp_path: Path) -> None:
    """Its tree is the other branch's then, and only the merge is wrong."""
    small, large = two_stacks(tmp_path)
    on(large, "side", "main")
    add(large, numbers(1))
    on(large, "main")
    git(tmp_path, "merge", "-q", "--squash", "side")
    git(tmp_path, "commit", "-q", "-m", "Squashed")
    git(tmp_path, "revert", "--no-edit", "HEAD")
    add(small, numbers(2))
    head = small.head()
    with pytest.raises(BadInput, match=r"large/patches.*another stack of this repository, which this merge"):
        Repository(small).merge("side")
    assert (small.head(), small.leftovers()) == (head, [])


def test_going_forward_to_what_breaks_another_stack_is_refused(tmp_path: Path) -> None:
    small, large = two_stacks(tmp_path)
    on(small, "side", "main")
    (name,) = add(large, numbers(1))
    write(large, name, {"facts.jsonl": numbers(2).files()["facts.jsonl"]})
    commit_all(large)
    on(small, "main")
    head = small.head()
    with pytest.raises(BadInput, match="another stack of this repository, which this merge"):
        Repository(small).merge("side")
    assert small.head() == head
