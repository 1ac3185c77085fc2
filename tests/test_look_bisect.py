"""`bisect` and `blame`: the commit and the patch behind an answer, against `git bisect run` and models."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
from command_helpers import Cli, cli, facts_file, git, git_environment, home, knowledge, snapshot
from git_helpers import add, make_store, numbers

from patchkit.actions.bisect import BASE, Bisected, first_change
from patchkit.errors import BadInput, NotFound
from patchkit.evaluation.generation import continue_greedily
from patchkit.evaluation.likelihood import score_targets
from patchkit.git.store import GitStore
from patchkit.repository import Repository
from patchkit.stack import read_stack

__all__ = ["cli", "git_environment", "home", "knowledge"]

PROMPT = "LeBron James plays the sport of"


class Counted:
    """An answer that a commit gives where the culprit is in its history; counts how often it is asked."""

    def __init__(self, store: GitStore, culprit: str, broken: tuple[str, ...] = ()) -> None:
        self.store, self.culprit, self.broken = store, culprit, broken
        self.calls: list[str] = []

    def __call__(self, commit: str) -> bool:
        self.calls.append(commit)
        if commit in self.broken:
            raise BadInput("cannot be believed")
        if commit == BASE:
            return False
        return self.store.git.ask("merge_base", "--is-ancestor", self.culprit, commit) is not None


@pytest.fixture
def store(tmp_path: Path, git_environment: None) -> GitStore:
    return make_store(tmp_path / "knowledge")


def head(store: GitStore) -> str:
    return git(store.root, "rev-parse", "HEAD")


def found_in(result: Bisected) -> str | None:
    return None if result.commit is None else result.commit.id


def test_a_straight_history_takes_log2_n_evaluations_and_the_two_ends(store: GitStore) -> None:
    commits = []
    for number in range(9):
        add(store, numbers(number))
        commits.append(head(store))
        (store.root / "README").write_text(f"{number}")  # commits beside the stack are not asked
        git(store.root, "add", "-A")
        git(store.root, "commit", "-q", "-m", "Elsewhere")
    for n in range(1, 10):
        for place in range(n):
            says = Counted(store, commits[place])
            result = first_change(store, says, bad=commits[n - 1])
            assert found_in(result) == commits[place]
            assert result.made
            assert result.candidates == n
            assert len(says.calls) - 2 <= math.ceil(math.log2(n)), (n, place)
            assert says.calls[:2] == [BASE, commits[n - 1]]
            assert set(says.calls) <= {BASE, *commits}
            asked = sum(step.says is not None for step in result.steps)
            assert asked == len(says.calls) == result.to_dict()["evaluations"]
    says = Counted(store, commits[4])
    result = first_change(store, lambda commit: not says(commit), good=commits[1])
    assert (found_in(result), result.made, result.candidates) == (commits[4], False, 7)


def branched(store: GitStore) -> dict[str, str]:
    """main: one, two, merge, three; side: four commits off "one"."""
    named = {}

    def made(name: str) -> None:
        named[name] = head(store)

    add(store, numbers(1))
    made("one")
    git(store.root, "switch", "-q", "-c", "side")
    for number in range(10, 14):
        add(store, numbers(number))
        made(f"side {number}")
    git(store.root, "switch", "-q", "main")
    add(store, numbers(2))
    made("two")
    git(store.root, "merge", "-q", "--no-ff", "-m", "merge", "side")
    made("merge")
    add(store, numbers(3))
    made("three")
    return named


def by_git(store: GitStore, culprit: str, tmp_path: Path) -> str:
    """What `git bisect run` finds in a copy."""
    copy = tmp_path / f"copy-{culprit[:8]}"
    shutil.copytree(store.root, copy)
    git(copy, "bisect", "start", "HEAD", git(copy, "rev-list", "--max-parents=0", "HEAD"), "--", "patches")
    script = f"if git merge-base --is-ancestor {culprit} HEAD; then exit 1; else exit 0; fi"
    git(copy, "bisect", "run", "sh", "-c", script)
    return git(copy, "rev-parse", "refs/bisect/bad")


def test_merges_are_searched_as_git_bisect_searches_them(store: GitStore, tmp_path: Path) -> None:
    named = branched(store)
    start = git(store.root, "rev-list", "--max-parents=0", "HEAD")
    for name, culprit in named.items():
        result = first_change(store, Counted(store, culprit), good=start)
        assert found_in(result) == culprit, name
        if name in ("side 11", "merge", "two"):
            assert by_git(store, culprit, tmp_path) == culprit


def test_a_branch_that_forked_before_the_older_end_is_not_blamed_for_what_it_never_had(
    store: GitStore,
) -> None:
    """It has not the fact that the older end has, so that it seems to be broken; the revert broke it."""
    add(store, numbers(0))
    git(store.root, "switch", "-q", "-c", "side")
    for number in range(10, 14):
        add(store, numbers(number))
    git(store.root, "switch", "-q", "main")
    add(store, numbers(1))
    good = head(store)
    git(store.root, "merge", "-q", "--no-ff", "-m", "merge", "side")
    merge = head(store)
    git(store.root, "revert", "--no-edit", good)

    def says(commit: str) -> bool:
        return any(
            fact.subject == "Person 1" for patch in read_stack(store, commit).patches for fact in patch.facts
        )

    result = first_change(store, says, good=good)
    assert (found_in(result), result.made, result.candidates) == (head(store), False, 2)
    brings = first_change(store, lambda commit: commit in (merge, head(store)), good=good)
    assert (found_in(brings), brings.made) == (merge, True)


def test_a_merge_that_breaks_what_both_sides_had_is_found(store: GitStore) -> None:
    named = branched(store)
    after = {named["merge"], named["three"]}
    result = first_change(store, lambda commit: commit not in after, good=named["one"])
    assert (found_in(result), result.made) == (named["merge"], False)


def test_what_cannot_be_asked_is_passed_over_and_told(store: GitStore) -> None:
    commits = []
    for number in range(6):
        add(store, numbers(number))
        commits.append(head(store))
    result = first_change(store, Counted(store, commits[4], broken=(commits[2],)))
    assert found_in(result) == commits[4]
    assert {step.commit: step.reason for step in result.steps if step.says is None} in (
        {}, {commits[2]: "cannot be believed"}
    )  # fmt: skip
    result = first_change(store, Counted(store, commits[4], broken=tuple(commits[2:5])))
    assert result.commit is None
    assert set(result.suspects) >= {commits[4]}
    assert set(result.suspects) <= set(commits[2:])
    assert commits[1] not in result.suspects


def test_ends_that_do_not_differ_or_do_not_follow_are_refused(store: GitStore) -> None:
    add(store, numbers(1))
    first = head(store)
    add(store, numbers(2))
    for says in (lambda commit: True, lambda commit: False):
        with pytest.raises(NotFound, match="name ends that differ"):
            first_change(store, says)
    for good, bad in (("HEAD", first), ("HEAD", "HEAD")):
        with pytest.raises(BadInput, match="older end"):
            first_change(store, lambda commit: True, good=good, bad=bad)
    with pytest.raises(NotFound, match="names no commit"):
        first_change(store, lambda commit: True, good="nowhere")


def test_equal_stacks_are_asked_once(store: GitStore) -> None:
    """A revert gives back a tree that was asked already."""
    for number in range(8):
        add(store, numbers(number))
        if number in (2, 5):
            git(store.root, "revert", "--no-edit", "HEAD")
    calls: list[str] = []

    def says(commit: str) -> bool:
        calls.append("" if commit == BASE else store.tree(commit).id)
        return commit != BASE

    first_change(store, says)
    assert len(calls) == len(set(calls))


# with models


STRONG = ("--set", "steps=40", "--set", "lambda=0.1", "--set", "clamp=20.0")


@pytest.fixture
def taught(cli: Cli, knowledge: Path) -> Path:
    """Four commits: two that leave the answer as it was, one that makes it football, one beside it."""
    fact = "LeBron James | {} plays the sport of | football"
    cli.ok("commit", "--replace", "--fact", fact, *STRONG, "-q")
    cli.ok("commit", "--fact", "Ann | {} lies in | Rome", "--set", "steps=1", "-q")
    return knowledge


def says(revision: str) -> str:
    model, tokenizer = Repository.open(".").load(revision, "cpu")
    return continue_greedily(model, tokenizer, [PROMPT])[0].split()[0].strip(".")


def test_bisect_on_models(cli: Cli, taught: Path) -> None:
    answers = [says(f"HEAD~{n}") for n in range(4)]
    assert answers == ["football", "football", "painter", "painter"]
    wanted = git(taught, "rev-parse", "HEAD~1")
    (taught / "scratch").write_text("in the work tree")
    before = snapshot(taught)
    found = cli.ok("bisect", "--prompt", PROMPT, "--expect", "football", "--json").json
    assert (found["change"], found["commit"]["id"], found["candidates"]) == ("made", wanted, 4)
    assert found["evaluations"] <= 4
    broke = cli.ok("bisect", "--prompt", PROMPT, "--expect", "painter", "--good", "HEAD~2").out
    assert f"{wanted[:10]}" in broke
    assert "this commit broke the answer (3 evaluations for 2 commits)" in broke
    assert snapshot(taught) == before
    assert cli("bisect", "--prompt", PROMPT, "--expect", "chess").code == 66
    assert cli("bisect", "--prompt", " ", "--expect", "chess").code == 65
    assert cli("bisect", "--prompt", PROMPT, "--expect", "x", "--good", "HEAD", "--bad", "HEAD~1").code == 65


def test_blame_by_text_needs_no_model(cli: Cli, knowledge: Path) -> None:
    both = facts_file(
        knowledge.parent,
        {"id": "rome-1", "subject": "Rome", "prompt": "{} plays the sport of", "target": "football",
         "source": "a book", "paraphrases": ["The sport of {} is"]},
        {"subject": "Ann", "prompt": "{} lies in", "target": "Japan"},
    )  # fmt: skip
    cli.ok("commit", both, "--set", "steps=1", "-m", "Two more", "-q")
    added = git(knowledge, "rev-parse", "HEAD")
    cli.ok("revert", "rome", "--fact", "2", "-q")
    git(knowledge, "config", "patchkit.base", "/nowhere")
    for text in (
        "rome-1",
        "ROME  plays the sport of",
        "Rome plays the sport of football",
        "The sport of Rome is",
    ):
        (item,) = cli.ok("blame", text, "--json").json["facts"]
        assert (item["target"], item["commit"], item["author"]) == ("football", added, "Ada")
        assert (item["source"], item["message"], item["line"]) == ("a book", "Two more", 1)
    assert item["patch"].startswith("rome-")
    text = cli.ok("blame", "Rome").out
    for part in (item["patch"], added[:10], "Two more", "Ada", "a book"):
        assert part in text
    assert cli.ok("blame", PROMPT, "--rev", "HEAD~2", "--json").json["facts"][0]["target"] == "football"


def test_blame_leaves_each_patch_out(cli: Cli, taught: Path) -> None:
    before = snapshot(taught)
    found = cli.ok("blame", PROMPT, "--measure", "--json").json["measured"]
    assert snapshot(taught) == before
    assert found["answer"] == "football"
    repository = Repository.open(taught)
    bench = repository.workbench("cpu")
    names = [stored.name for stored in repository.stack().patches]

    def probability(*names: str) -> float:
        bench.put(repository.patch(name) for name in names)
        return score_targets(bench.model, bench.tokenizer, [(PROMPT, "football")])[0].probability

    assert found["probability"] == pytest.approx(probability(*names), rel=1e-5)
    assert found["base"] == pytest.approx(probability(), rel=1e-5)
    assert {item["patch"] for item in found["patches"]} == set(names)
    for item in found["patches"]:
        rest = (name for name in names if name != item["patch"])
        assert item["without"] == pytest.approx(probability(*rest), abs=0.02)  # up to bfloat16's rounding
    first, *others = found["patches"]
    assert first["patch"].startswith("lebron-james-")
    assert first["commit"] == git(taught, "rev-parse", "HEAD~1")
    assert first["without"] < 0.1 < 0.5 < min(item["without"] for item in others)
    assert first["says"] == " painter."
    assert [item["without"] for item in others] == sorted(item["without"] for item in others)
    text = cli.ok("blame", f"Who is it? {PROMPT}", "--answer", "football").out
    assert "with the whole stack" in text
    assert "lebron-james-" in text


def test_blame_of_nothing(cli: Cli, knowledge: Path) -> None:
    cli.ok("revert", "lebron-james", "microsoft", "-q")
    assert cli("blame", "What is it?").code == 66
    assert cli("blame", " ").code == 65
    os.chdir(knowledge.parent)
    assert cli("blame", "x").code == 66


def test_a_commit_of_a_branch_whose_merge_left_the_stack_as_it_was_is_found(store: GitStore) -> None:
    """The branch brings a patch and takes it back, so the merge has the stack of both its parents."""
    add(store, numbers(1))
    git(store.root, "switch", "-q", "-c", "side")
    add(store, numbers(2))
    good = head(store)
    git(store.root, "revert", "--no-edit", "HEAD")
    culprit = head(store)
    git(store.root, "switch", "-q", "main")
    (store.root / "README").write_text("elsewhere")
    git(store.root, "add", "-A")
    git(store.root, "commit", "-q", "-m", "Elsewhere")
    git(store.root, "merge", "-q", "--no-ff", "-m", "merge", "side")
    merged = head(store)
    add(store, numbers(3))
    for bad in ("HEAD", merged):
        result = first_change(store, Counted(store, culprit), good=good, bad=bad)
        assert (found_in(result), result.made) == (culprit, True)
