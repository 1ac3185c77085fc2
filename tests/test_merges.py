"""The silent cases: plain Git does something clean and wrong; each ends right or is refused in words.

Built with Git's own commands only, as a colleague without patchkit would.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from git_helpers import (  # noqa: F401
    OTHER_BASE,
    SETTINGS,
    add,
    commit_all,
    fact,
    git,
    git_environment,
    make_store,
    numbers,
    patch,
    take_out_as_told,
    write,
)

from patchkit.catalogue import Catalogue
from patchkit.facts import Fact
from patchkit.git.store import Changes, GitStore
from patchkit.merging.merges import three_way
from patchkit.problem import Problem
from patchkit.stack import problems, read_stack

pytestmark = pytest.mark.usefixtures("git_environment")


JOINED = numbers(1, 2, 11, 12, 13, 14, 15, 16)


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    return make_store(tmp_path / "kb")


def _on(store: GitStore, branch: str, start: str | None = None) -> None:
    git(store.root, "switch", "-q", *(["-c", branch, start] if start else [branch]))


def _merge(store: GitStore, branch: str, *options: str) -> str:
    """Merge; Git finds it clean."""
    git(store.root, "merge", "-q", "--no-edit", *options, branch)
    return git(store.root, "rev-parse", "HEAD")


def _remove(store: GitStore, name: str) -> None:
    git(store.root, "rm", "-q", "-r", f"patches/{name}")
    git(store.root, "commit", "-q", "-m", f"Remove {name}")


def _rewrite(store: GitStore, name: str, files: dict[str, bytes]) -> None:
    write(store, name, files)
    commit_all(store, f"Solve {name} again")


def _in_force(store: GitStore) -> list[str]:
    return sorted(fact.subject for patch in read_stack(store).patches for fact in patch.facts)


def _conflicted(store: GitStore) -> set[str]:
    return set(git(store.root, "diff", "--name-only", "--diff-filter=U").split())


def _refused(store: GitStore, *says: str) -> list[Problem]:
    """The tree at HEAD is refused, in lines that name the patch and what to do."""
    found = problems(store)
    text = "\n".join(map(str, found))
    assert found
    for word in says:
        assert word in text, text
    return found


def _accept(store: GitStore, found: Sequence[Problem]) -> None:
    """Do what a finding says to keep the merge as it is."""
    command = found[0].remedy.partition("keep it so with: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=store.root, capture_output=True)


# -- what ends right by itself -----------------------------------------------------------------


def test_patches_from_two_sides_are_both_in_force(store: GitStore) -> None:
    add(store, numbers(1))
    _on(store, "side", "main")
    add(store, numbers(2))
    _on(store, "main")
    add(store, numbers(3))
    _merge(store, "side")
    assert problems(store) == []
    assert _in_force(store) == ["Person 1", "Person 2", "Person 3"]


def test_a_patch_removed_on_one_side_is_removed(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    _on(store, "side", "main")
    add(store, numbers(2))
    _on(store, "main")
    _remove(store, name)
    _merge(store, "side")
    assert _in_force(store) == ["Person 2"]


def test_a_revert_of_the_adding_commit_takes_the_patch_out(store: GitStore) -> None:
    add(store, numbers(1))
    added = store.head()
    add(store, numbers(2))
    git(store.root, "revert", "--no-edit", str(added))
    assert _in_force(store) == ["Person 2"]


def test_a_revert_of_the_adding_commit_after_solving_again_is_a_conflict(store: GitStore) -> None:
    one = numbers(1, 2)
    (name,) = add(store, one)
    added = str(store.head())
    _rewrite(store, name, one.without([0]).files())
    git(store.root, "revert", "--no-edit", added, ok=False)
    assert _conflicted(store)
    assert any("in conflict" in problem.message for problem in problems(store))


def test_a_rebase_of_two_versions_of_one_patch_is_a_conflict(store: GitStore) -> None:
    one = numbers(1, 2, 3)
    (name,) = add(store, one)
    _on(store, "side", "main")
    _rewrite(store, name, one.without([0]).files())
    _on(store, "main")
    _rewrite(store, name, one.without([1]).files())
    git(store.root, "rebase", "main", "side", ok=False)
    assert _conflicted(store) == {f"patches/{name}/{file}" for file in one.files()}
    _refused(store, "in conflict", f"patches/{name}")
    git(store.root, "add", "-A", ".")  # adding blindly keeps one whole valid side
    git(store.root, "-c", "core.editor=true", "rebase", "--continue", ok=False)
    git(store.root, "rebase", "--skip", ok=False)
    assert problems(store) == []
    assert _in_force(store) in (["Person 1", "Person 3"], ["Person 2", "Person 3"])


def test_removing_against_solving_again_is_a_conflict(store: GitStore) -> None:
    one = numbers(1, 2)
    (name,) = add(store, one)
    _on(store, "side", "main")
    _rewrite(store, name, one.without([0]).files())
    _on(store, "main")
    _remove(store, name)
    git(store.root, "merge", "--no-edit", "side", ok=False)
    assert _conflicted(store)
    git(store.root, "rm", "-q", "-r", f"patches/{name}")
    git(store.root, "commit", "-q", "--no-edit")
    assert problems(store) == []
    assert _in_force(store) == []


def test_the_same_facts_with_the_same_numbers_from_two_machines(store: GitStore) -> None:
    _on(store, "side", "main")
    add(store, numbers(1))
    _on(store, "main")
    add(store, numbers(1), message="Here too")
    _merge(store, "side")
    assert _in_force(store) == ["Person 1"]


def test_the_same_facts_with_other_numbers_from_two_machines_are_a_conflict(store: GitStore) -> None:
    _on(store, "side", "main")
    (name,) = add(store, numbers(1, seed=1))
    _on(store, "main")
    assert add(store, numbers(1, seed=2)) == [name]
    git(store.root, "merge", "--no-edit", "side", ok=False)
    assert f"patches/{name}/delta.safetensors" in _conflicted(store)
    for side, wanted in (("--ours", numbers(1, seed=2)), ("--theirs", numbers(1, seed=1))):
        git(store.root, "checkout", side, "--", f"patches/{name}")
        git(store.root, "add", f"patches/{name}")
        git(store.root, "commit", "-q", "--no-edit")
        assert problems(store) == []
        assert read_stack(store).patches[0].id == wanted.id
        git(store.root, "reset", "-q", "--hard", "HEAD^")
        git(store.root, "merge", "--no-edit", "side", ok=False)


# -- what is clean for Git and refused here ----------------------------------------------------


def test_one_key_in_two_batches_is_named_by_both_patches(store: GitStore) -> None:
    batches = [patch([fact(1), fact(2)]), patch([fact(1, "chess"), *map(fact, range(3, 9))])]
    _on(store, "side", "main")
    add(store, batches[0])
    _on(store, "main")
    add(store, batches[1])
    _merge(store, "side")
    (problem,) = _refused(store, *(p.name for p in batches), "Person 1 plays the sport of")
    name = problem.path.split("/")[1]
    assert problem.path.endswith(f"{name}/facts.jsonl:1")
    wrong = next(p for p in batches if p.name == name)
    take_out_as_told(store, problem.remedy)
    assert problems(store) == []
    store.record(Changes(patches={name: wrong.without([0]).files()}), "Its other facts again")
    assert problems(store) == []
    assert _in_force(store) == [f"Person {n}" for n in range(1, 9)]


def _squash_against_revert(store: GitStore) -> tuple[str, str]:
    """One side joins two patches into one, the other takes one of the two back; Git finds it clean,
    since the joined file does not look like a renamed one."""
    name, _ = _join_and_remove(store)
    return name, _merge(store, "side")


def test_a_squash_of_two_patches_against_a_revert_of_one(store: GitStore) -> None:
    name, merge = _squash_against_revert(store)
    (problem,) = _refused(store, "Person 1 plays the sport of", "one side of it took it out", merge[:10])
    assert problem.path == f"patches/{name}/facts.jsonl:1"
    store.record(Changes(patches={name: JOINED.without([0]).files()}), "As the line says")
    assert problems(store) == []
    assert "Person 1" not in _in_force(store)


def _join_and_remove(store: GitStore) -> tuple[str, str]:
    """The same before the sides meet: the patch of both facts, and the commit that took one out."""
    one, two = add(store, numbers(1), numbers(2))
    _on(store, "side", "main")
    git(store.root, "rm", "-q", "-r", f"patches/{one}", f"patches/{two}")
    write(store, JOINED.name, JOINED)
    commit_all(store, "Join")
    _on(store, "main")
    _remove(store, one)
    return JOINED.name, str(store.head())


def _bring(store: GitStore, how: str) -> None:
    """Bring the side's work to main without a merge commit; Git finds it clean."""
    if how == "rebase":
        _on(store, "side")
        git(store.root, "rebase", "-q", "main")
    elif how == "squash":
        git(store.root, "merge", "-q", "--squash", "side")
        git(store.root, "commit", "-q", "-m", "Squashed")
    else:
        git(store.root, "cherry-pick", "side")


@pytest.mark.parametrize("how", ["rebase", "squash", "cherry-pick"])
def test_a_fact_that_comes_back_without_a_merge_is_named(store: GitStore, how: str) -> None:
    name, removal = _join_and_remove(store)
    _bring(store, how)
    brought = str(store.head())
    says = "Person 1 plays the sport of", "was taken out by commit", removal[:10], brought[:10]
    (problem,) = _refused(store, *says)
    assert problem.path == f"patches/{name}/facts.jsonl:1"
    add(store, numbers(9))
    catalogue = Catalogue(store.private)
    catalogue.reindex(store, norms=False)
    for _ in range(2):  # also as it was remembered
        assert problems(store, memory=catalogue) == [problem]
    store.record(Changes(patches={name: JOINED.without([0]).files()}), "As the line says")
    assert problems(store, memory=catalogue) == problems(store) == []
    assert "Person 1" not in _in_force(store)
    git(store.root, "reset", "-q", "--hard", "HEAD^")
    _accept(store, _refused(store, *says))
    assert problems(store, memory=catalogue) == problems(store) == []
    assert "Person 1" in _in_force(store)


def test_a_squash_of_patchkits_that_was_rebased_is_not_on_purpose(store: GitStore) -> None:
    one, two = add(store, numbers(1), numbers(2))
    _on(store, "side", "main")
    trailers = [("Patchkit-Patch", JOINED.name), ("Patchkit-Id", JOINED.id)]
    trailers += [("Patchkit-Squashes", part.id) for part in (numbers(1), numbers(2))]
    store.record(Changes(patches={JOINED.name: JOINED.files()}, removed=[one, two]), "Squash", trailers)
    assert problems(store) == []
    _on(store, "main")
    store.record(Changes(removed=[one]), "Revert", [("Patchkit-Reverts", numbers(1).id)])
    removal = str(store.head())
    _on(store, "side")
    git(store.root, "rebase", "-q", "main")
    _refused(store, "Person 1 plays the sport of", "was taken out by commit", removal[:10])


def test_a_fact_that_is_brought_back_on_purpose_is_believed(store: GitStore) -> None:
    (one,) = add(store, numbers(1))
    _remove(store, one)
    removal = str(store.head())
    git(store.root, "revert", "--no-edit", removal)
    assert problems(store) == [], "git revert of the revert"
    _remove(store, one)
    git(store.root, "checkout", "-q", f"{removal}^", "--", f"patches/{one}")
    commit_all(store, "Put it back by its name")
    assert problems(store) == []
    _remove(store, one)
    trailers = [("Patchkit-Patch", JOINED.name), ("Patchkit-Id", JOINED.id)]
    store.record(Changes(patches={JOINED.name: JOINED.files()}), "As patchkit commit and apply do", trailers)
    assert problems(store) == []
    assert "Person 1" in _in_force(store)
    git(store.root, "commit", "-q", "--amend", "-m", "By hand")
    _refused(store, "Person 1", "was taken out by commit")


def test_joining_and_replacing_by_hand_bring_nothing_back(store: GitStore) -> None:
    """What was in force just before does not come back, though an older commit took it out."""
    one, two = add(store, numbers(1), numbers(2))
    store.record(Changes(removed=[one]), "Out")
    store.record(Changes(patches={one: numbers(1).files()}), "In again")
    git(store.root, "rm", "-q", "-r", f"patches/{one}", f"patches/{two}")
    write(store, JOINED.name, JOINED)
    commit_all(store, "Join")
    assert problems(store) == []
    other = patch([fact(1, "chess"), fact(20)])
    store.record(
        Changes(patches={JOINED.name: JOINED.without([0]).files(), other.name: other.files()}), "Replace"
    )
    assert problems(store) == []


def test_a_wrong_merge_can_be_accepted_on_purpose(store: GitStore) -> None:
    _squash_against_revert(store)
    _accept(store, _refused(store))
    assert problems(store) == []
    assert "Person 1" in _in_force(store)
    assert problems(store, "HEAD^") != [], "the commit before the acceptance is as wrong as it was"


@pytest.mark.parametrize("word", ["full", "123456", "0000000", ""])
def test_an_acceptance_must_name_the_merge(store: GitStore, word: str) -> None:
    _, merge = _squash_against_revert(store)
    value = merge if word == "full" else word
    git(store.root, "commit", "-q", "--allow-empty", "-m", "Keep", "--trailer", f"Patchkit-Accept: {value}")
    assert (problems(store) == []) == (word == "full")
    git(
        store.root,
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        f"Patchkit-Accept: {merge} in the middle of a sentence",
    )
    assert (problems(store) == []) == (word == "full")


def test_an_acceptance_in_one_stack_accepts_nothing_in_another(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    stores = []
    for name in ("one's", "two"):
        GitStore.init(tmp_path / name).record(Changes(settings=SETTINGS), "Start")
        stores.append(GitStore.find(tmp_path / name))
    git(tmp_path, "branch", "side")
    for number, store in enumerate(stores):
        _on(store, "side")
        add(store, numbers(number))
    _on(stores[0], "main")
    git(tmp_path, "merge", "-q", "--squash", "side")
    git(tmp_path, "commit", "-q", "-m", "Squashed")
    git(tmp_path, "revert", "--no-edit", "HEAD")
    _merge(stores[0], "side")
    (wrong,), (other,) = map(problems, stores)
    command = wrong.remedy.partition("keep it so with: ")[2]
    assert command.endswith(" one'\"'\"'s/'")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert (problems(stores[0]), problems(stores[1])) == ([], [other])
    subprocess.run(
        ["sh", "-c", command.partition(" one")[0] + "'"], cwd=tmp_path, check=True, capture_output=True
    )
    assert problems(stores[1]) == []


def test_a_patch_that_a_second_merge_brings_back_is_named(store: GitStore) -> None:
    """Squash-merge, revert, then merge the branch again: Git takes the branch's patch once more."""
    _on(store, "side", "main")
    (name,) = add(store, numbers(1))
    _on(store, "main")
    git(store.root, "merge", "-q", "--squash", "side")
    git(store.root, "commit", "-q", "-m", "Squashed")
    git(store.root, "revert", "--no-edit", "HEAD")
    removal = str(store.head())
    assert _in_force(store) == []
    merge = _merge(store, "side")
    (problem,) = _refused(store, "was taken back by commit", removal[:10], merge[:10], "brought it back")
    assert problem.path == f"patches/{name}"
    _remove(store, name)
    assert problems(store) == []
    git(store.root, "reset", "-q", "--hard", "HEAD^")
    _accept(store, problems(store))
    assert _in_force(store) == ["Person 1"]


def test_a_patch_that_is_new_on_the_branch_is_not_named(store: GitStore) -> None:
    """The branch's own patch, removed and added again there, was never the first parent's to take back."""
    _on(store, "side", "main")
    (name,) = add(store, numbers(1))
    _remove(store, name)
    add(store, numbers(1))
    _on(store, "main")
    add(store, numbers(2))
    _merge(store, "side")
    assert problems(store) == []


def test_one_of_two_that_said_the_same_was_no_removal(store: GitStore) -> None:
    """A fact was said twice for a while, then once; put back by its folder's name, it is on purpose."""
    (name,) = add(store, numbers(1))
    both = numbers(1, 2)
    write(store, both.name, both)
    commit_all(store, "Twice")
    _refused(store, "Person 1")
    _remove(store, both.name)
    _remove(store, name)
    git(store.root, "checkout", "-q", "HEAD^", "--", f"patches/{name}")
    git(store.root, "commit", "-q", "-m", f"{name} as it was")
    assert problems(store) == []
    assert _in_force(store) == ["Person 1"]


def test_a_base_that_moved_on_one_side(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    _on(store, "side", "main")
    (new,) = add(store, numbers(2))
    _on(store, "main")
    (store.root / "patchkit.toml").write_bytes(SETTINGS.replace(b"a" * 64, b"b" * 64))
    _rewrite(store, name, numbers(1, base=OTHER_BASE).files())
    assert problems(store) == []
    _merge(store, "side")
    (problem,) = _refused(store, "made for another base", f"git rm -r -q -- patches/{new}")
    assert problem.path == f"patches/{new}"
    take_out_as_told(store, problem.remedy)
    assert problems(store) == []


def _both_took_one_out(store: GitStore) -> str:
    one = numbers(1, 2, 3)
    (name,) = add(store, one)
    _on(store, "side", "main")
    _rewrite(store, name, one.without([0]).files())
    _on(store, "main")
    _rewrite(store, name, one.without([1]).files())
    git(store.root, "merge", "--no-edit", "side", ok=False)
    return name


@pytest.mark.parametrize(("side", "back"), [("--ours", "Person 1"), ("--theirs", "Person 2")])
def test_choosing_one_side_of_a_conflict_brings_back_what_the_other_took_out(
    store: GitStore, side: str, back: str
) -> None:
    name = _both_took_one_out(store)
    git(store.root, "checkout", side, "--", f"patches/{name}")
    git(store.root, "add", f"patches/{name}")
    git(store.root, "commit", "-q", "--no-edit")
    (problem,) = _refused(store, f"{back} plays", "one side of it took it out")
    assert problem.path.startswith(f"patches/{name}/facts.jsonl:")
    store.record(Changes(patches={name: numbers(1, 2, 3).without([0, 1]).files()}), "Both out")
    assert problems(store) == []


def test_choosing_one_side_where_both_said_something_else_is_a_choice(store: GitStore) -> None:
    one = patch([fact(1)])
    (name,) = add(store, one)
    _on(store, "side", "main")
    _rewrite(store, name, patch([fact(1, "chess")]).files())
    _on(store, "main")
    _rewrite(store, name, patch([fact(1, "go")]).files())
    git(store.root, "merge", "--no-edit", "side", ok=False)
    git(store.root, "checkout", "--theirs", "--", f"patches/{name}")
    git(store.root, "add", f"patches/{name}")
    git(store.root, "commit", "-q", "--no-edit")
    assert problems(store) == []
    assert read_stack(store).patches[0].facts[0].target == "chess"


def test_choosing_one_file_of_each_side_is_found(store: GitStore) -> None:
    name = _both_took_one_out(store)
    git(store.root, "checkout", "--ours", "--", f"patches/{name}")
    git(store.root, "checkout", "--theirs", "--", f"patches/{name}/facts.jsonl")
    git(store.root, "add", f"patches/{name}")
    git(store.root, "commit", "-q", "--no-edit")
    _refused(store, "mixed two versions", f"patches/{name}/facts.jsonl", "git checkout COMMIT --")


def test_a_merge_that_drops_what_a_side_added(store: GitStore) -> None:
    _on(store, "side", "main")
    (name,) = add(store, numbers(1))
    _on(store, "main")
    add(store, numbers(2))
    _merge(store, "side", "-s", "ours")
    found = _refused(store, "Person 1 plays", "is not in force after merge")
    _accept(store, found)
    assert problems(store) == []
    git(store.root, "reset", "-q", "--hard", "HEAD^")
    git(store.root, "checkout", "-q", "HEAD^2", "--", f"patches/{name}")
    git(store.root, "commit", "-q", "-m", "Bring it back")
    assert problems(store) == []


def test_a_merge_that_says_what_no_side_said(store: GitStore) -> None:
    (name,) = add(store, patch([fact(1)]))
    _on(store, "side", "main")
    add(store, numbers(2))
    _on(store, "main")
    add(store, numbers(3))
    git(store.root, "merge", "-q", "--no-commit", "side")
    write(store, name, patch([fact(1, "golf")]))
    commit_all(store, "Merge, and something of my own")
    _refused(store, "“golf” is not what the sides of merge")


def test_an_octopus_and_a_criss_cross(store: GitStore) -> None:
    for number, branch in enumerate(("a", "b", "c"), 1):
        _on(store, branch, "main")
        add(store, numbers(number))
    _on(store, "main")
    git(store.root, "merge", "-q", "--no-edit", "a", "b", "c")
    assert _in_force(store) == ["Person 1", "Person 2", "Person 3"]
    _on(store, "left", "main")
    add(store, numbers(4))
    _on(store, "right", "main")
    add(store, numbers(5))
    left, right = (git(store.root, "rev-parse", name) for name in ("left", "right"))
    _merge(store, left)
    _on(store, "left")
    _merge(store, right)
    _remove(store, numbers(4).name)
    _on(store, "right")
    add(store, numbers(6))
    _merge(store, "left")
    assert problems(store) == []
    assert _in_force(store) == [f"Person {n}" for n in (1, 2, 3, 5, 6)]


def test_unrelated_histories(store: GitStore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other")
    git(other.root, "commit", "-q", "--amend", "-m", "Elsewhere")  # of one second, they would be the same
    add(other, numbers(2))
    add(store, numbers(1))
    git(store.root, "fetch", "-q", str(other.root), "main:other")
    _merge(store, "other", "--allow-unrelated-histories")
    assert _in_force(store) == ["Person 1", "Person 2"]


def test_a_shallow_clone_says_that_it_cannot_tell(store: GitStore, tmp_path: Path) -> None:
    _squash_against_revert(store)
    add(store, numbers(9))
    git(tmp_path, "clone", "-q", "--depth", "3", f"file://{store.root}", "shallow")
    shallow = GitStore.find(tmp_path / "shallow")
    _refused(shallow, "git fetch --unshallow")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{store.root}", "one")
    assert problems(GitStore.find(tmp_path / "one")) == [], "no merge is seen, so none is judged"
    git(shallow.root, "fetch", "-q", "--unshallow")
    _refused(shallow, "one side of it took it out")


def test_what_a_shallow_clone_cannot_see_is_not_remembered_as_checked(
    store: GitStore, tmp_path: Path
) -> None:
    _squash_against_revert(store)
    add(store, numbers(9))
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{store.root}", "one")
    one = GitStore.find(tmp_path / "one")
    catalogue = Catalogue(one.private)
    catalogue.reindex(one, norms=False)
    assert problems(one, memory=catalogue) == []
    git(one.root, "fetch", "-q", "--unshallow")
    assert problems(one, memory=catalogue) == problems(one) != []


def test_a_merge_in_a_subfolder_of_a_model_s_own_repository(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    store = GitStore.init(tmp_path / "know [ledge]")
    store.record(Changes(settings=SETTINGS), "Start")
    store = GitStore.find(store.folder)
    one, two = add(store, numbers(1), numbers(2))
    git(tmp_path, "switch", "-q", "-c", "side")
    store.record(Changes(patches={JOINED.name: JOINED.files()}, removed=[one, two]), "Join")
    git(tmp_path, "switch", "-q", "main")
    store.record(Changes(removed=[one]), "Away")
    git(tmp_path, "merge", "-q", "--no-edit", "side")
    _refused(store, "one side of it took it out")


def test_what_was_looked_through_is_remembered(store: GitStore) -> None:
    """With a catalogue: the same answers, on every branch, without judging a merge twice."""
    catalogue = Catalogue(store.private)
    catalogue.reindex(store, norms=False)
    _squash_against_revert(store)
    wrong = str(store.head())
    assert problems(store, memory=catalogue) == problems(store) != []
    tips, violations = catalogue.checked_merges()
    assert tips[0] == wrong
    assert [violation.merge for violation in violations] == [wrong]
    assert problems(store, memory=catalogue) == problems(store)
    _on(store, "good", "main^1")
    assert problems(store, memory=catalogue) == []
    _on(store, "main")
    add(store, numbers(8))
    assert problems(store, memory=catalogue) == problems(store) != []
    _accept(store, problems(store))
    assert problems(store, memory=catalogue) == []


# -- the rule itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "allowed"),
    [
        ("a", "a", "a", ["a"]),
        ("a", "b", "a", ["b"]),
        ("a", "a", "b", ["b"]),
        ("a", "b", "b", ["b"]),
        ("a", "b", "c", ["b", "c"]),
        ("a", "", "a", [""]),
        ("a", "", "b", ["", "b"]),
        ("", "a", "", ["a"]),
        ("", "a", "b", ["a", "b"]),
        ("", "", "", [""]),
    ],
)
def test_the_three_way_merge_of_one_key(base: str, ours: str, theirs: str, allowed: list[str]) -> None:
    key = Fact("s", "{} p", "t").key

    def held(word: str) -> dict:
        return {key: frozenset([word])} if word else {}

    found = three_way([held(base)], [held(ours), held(theirs)], key)
    assert found == {frozenset([word] if word else []) for word in allowed}


def test_a_right_octopus_is_believed_whatever_two_of_its_parents_share(store: GitStore) -> None:
    """One of two branches took out what both came from; the third is older and never had it."""
    _on(store, "third", "main")
    add(store, numbers(8))
    _on(store, "main")
    (name,) = add(store, numbers(1))
    _on(store, "second", "main")
    store.record(Changes(removed=[name]), "Away")
    _on(store, "main")
    add(store, numbers(2))
    git(store.root, "merge", "-q", "--no-edit", "second", "third")
    assert len(git(store.root, "rev-parse", "HEAD^@").split()) == 3
    assert problems(store) == []
    assert _in_force(store) == sorted(["Person 2", "Person 8"])
