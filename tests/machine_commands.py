"""The machine's rules for the commands of patchkit: each knows what has to be in force afterwards."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from git_helpers import git
from hypothesis import strategies as st
from machine_ground import POOL, PROMPT, person
from machine_merge import Merge
from machine_model import (
    Part,
    Said,
    State,
    Version,
    doubled,
    held,
    joined,
    same_state,
)
from machine_world import Clone, World, commits_back, killed_at, step
from proof_helpers import fine

PLACES = st.sampled_from([0, 1])
KILLS = st.one_of(st.just(0), st.just(0), st.integers(1, 24))
SMALL = st.integers(0, 7)
SCALES = st.sampled_from([0.5, -1.0, 2.0])
SIDES = st.sampled_from([None, "ours", "theirs"])


def replaced(state: State, subjects: Collection[str]) -> dict[str, Version]:
    """The state without what is said of these subjects."""
    out = {}
    for name, version in state.items():
        gone = {i for i, fact in enumerate(version.facts) if fact.subject in subjects}
        if len(gone) < len(version.facts):
            out[name] = version.without(gone) if gone else version
    return out


def pick(state: State, which: int, count: int = 1) -> list[str]:
    """Some patches in force, by numbers."""
    names = sorted(state)
    return list(dict.fromkeys(names[(which + 3 * i) % len(names)] for i in range(count))) if names else []


class Changing(World):
    """`apply`, `commit`, `revert`, `stack squash`, `refit`, `undo`."""

    @step(
        where=PLACES,
        number=st.integers(0, len(POOL) - 1),
        swap=st.booleans(),
        scale=st.one_of(st.just(1.0), SCALES),
        kill=KILLS,
    )
    def apply(self, where: int, number: int, swap: bool, scale: float, kill: int) -> None:
        clone, state = self.at(where)
        folder, version = self.pool[number]
        words: list[object] = ["apply", folder, "--scale", scale, *(["--replace"] if swap else [])]
        version = version if scale == 1 else version.scaled(scale)
        subjects = {fact.subject for fact in version.facts}
        if (subjects & held(state).keys() and not swap) or version.same(state.get(folder.name)):
            return self.refused(clone, words, 65)
        self.do(clone, words, {**replaced(state, subjects), folder.name: version}, kill)

    @step(where=PLACES, which=SMALL, scale=SCALES, kill=KILLS)
    def scale_in_force(self, where: int, which: int, scale: float, kill: int) -> None:
        clone, state = self.at(where)
        for name in pick(state, which):
            self.note("scale in force")
            after = {**state, name: state[name].scaled(scale)}
            self.do(clone, ["apply", name, "--scale", scale], after, kill)

    @step(
        where=PLACES,
        subject=st.integers(0, 9),
        says=st.sampled_from(["polo", "golf"]),
        swap=st.booleans(),
        kill=KILLS,
    )
    def commit(self, where: int, subject: int, says: str, swap: bool, kill: int) -> None:
        clone, state = self.at(where)
        said = Said(person(subject), says)
        words = ["commit", "--fact", f"{said.subject} | {PROMPT} | {says}", *(["--replace"] if swap else [])]
        _, before = held(state).get(said.subject, ("", None))
        if before is not None and (not swap or before == said):
            return None if swap else self.refused(clone, words, 65)
        rest = replaced(state, {said.subject})

        def after() -> State:
            return {**rest, self.new_folder(clone, rest): Version((Part((said,), {}),), {})}

        self.do(clone, words, after, kill)

    @step(where=PLACES, which=SMALL, count=st.integers(1, 2), kill=KILLS)
    def revert(self, where: int, which: int, count: int, kill: int) -> None:
        clone, state = self.at(where)
        if names := pick(state, which, count):
            after = {name: version for name, version in state.items() if name not in names}
            self.do(clone, ["revert", *names], after, kill)
        else:
            self.refused(clone, ["revert"], 66)

    @step(where=PLACES, which=SMALL, places=st.sets(st.integers(0, 4), min_size=1), kill=KILLS)
    def revert_facts(self, where: int, which: int, places: set[int], kill: int) -> None:
        clone, state = self.at(where)
        for name in pick(state, which):
            out = {place % len(state[name].facts) for place in places}
            words: list[object] = ["revert", name]
            for place in sorted(out):
                words += ["--fact", place + 1]
            self.note("revert of facts")
            after = {n: version for n, version in state.items() if n != name}
            if len(out) < len(state[name].facts):
                after[name] = state[name].without(out)
            self.do(clone, words, after, kill)

    @step(where=PLACES, back=st.integers(0, 3), kill=KILLS)
    def revert_a_commit(self, where: int, back: int, kill: int) -> None:
        """Where what it did still stands, and no fact would be said twice."""
        clone, state = self.at(where)
        *_, commit = commits_back(clone, back + 1)
        words = ["revert", commit]
        parents = clone.parents(commit)
        left = self.state_at(clone, commit)
        if len(parents) != 1 or same_state(left, before := self.state_at(clone, parents[0])):
            return self.refused(clone, words, 65)
        names = [name for name in before.keys() | left.keys() if not _same(before.get(name), left.get(name))]
        after = {name: version for name, version in state.items() if name not in names}
        after |= {name: before[name] for name in names if name in before}
        if any(not _same(state.get(name), left.get(name)) for name in names) or doubled(after):
            return self.refused(clone, words, 65)
        self.note("revert of a commit")
        self.do(clone, words, after, kill)

    @step(where=PLACES, which=SMALL, count=st.integers(2, 3), inexact=st.booleans(), kill=KILLS)
    def squash(self, where: int, which: int, count: int, inexact: bool, kill: int) -> None:
        clone, state = self.at(where)
        if len(names := pick(state, which, count)) < 2:
            return
        rest = {name: version for name, version in state.items() if name not in names}
        words = ["stack", "squash", *names, *(["--inexact"] if inexact else [])]
        whole = {**rest, "whole": joined([state[name] for name in names])}
        if not inexact and self.base.hashes(whole) != self.base.hashes(state):
            return self.refused(clone, words, 3)

        def after() -> State:
            """The parts stand by the date of their patches; the model takes their order from the file."""
            folder = self.new_folder(clone, rest)
            order = [fact.subject for fact in self.facts_in(clone.root / "patches" / folder)]
            parts = sorted((state[n] for n in names), key=lambda v: order.index(v.facts[0].subject))
            return {**rest, folder: joined(parts)}

        self.do(clone, words, after, kill)

    @step(where=PLACES, which=st.one_of(st.none(), SMALL), kill=KILLS)
    def refit(self, where: int, which: int | None, kill: int) -> None:
        clone, state = self.at(where)
        if names := pick(state, which or 0) if which is not None else sorted(state):
            again = {name: replace(state[name], deltas={}, id="", joint=True) for name in names}
            self.do(clone, ["refit", *([] if which is None else names)], {**state, **again}, kill)
        else:
            self.refused(clone, ["refit"], 66)

    @step(
        where=PLACES,
        steps=st.sampled_from([1, 1, 1, 2, 3]),
        force=st.booleans(),
        kill=KILLS,
        again=st.booleans(),
    )
    def undo(self, where: int, steps: int, force: bool, kill: int, again: bool) -> None:
        """Back, and perhaps forth again."""
        clone, _ = self.at(where)
        words = ["undo", "--to", steps, *(["--force"] if force else [])]
        moves = clone.undoable()
        if clone.refs.branch is None or len(moves) < steps:
            return self.refused(clone, words, 66)
        before = moves[steps - 1].before
        assert before is not None
        leaving = (clone.head, f"^{before}")
        if not force and clone.revisions(*leaving) != clone.revisions(*leaving, "--not", "--remotes"):
            return self.refused(clone, words, 3)
        came = clone.head
        self.do(clone, words, self.state_at(clone, before), kill)
        if again and came != before:
            self.do(clone, ["undo", "--force"], self.state_at(clone, came), 0)
            assert clone.head == came
            self.note("redo")


def _same(one: Version | None, other: Version | None) -> bool:
    return (one.id if one else None) == (other.id if other else None)


class Joining(World):
    """`switch`, `merge`, `pull`, and `git push`."""

    @step(where=PLACES, which=SMALL, create=st.booleans(), kill=KILLS)
    def switch(self, where: int, which: int, create: bool, kill: int) -> None:
        clone, state = self.at(where)
        names = sorted(set(clone.refs.branches) - {str(clone.refs.branch)})
        if create and len(names) < 4:
            self.do(clone, ["switch", "-c", f"topic{self.turn}"], state, kill)
        elif names:
            name = names[which % len(names)]
            self.do(clone, ["switch", name], self.states[clone.refs.branches[name]], kill)
        self._brought_in_line(clone)

    def _brought_in_line(self, clone: Clone) -> None:
        if clone.built is not None:
            clone.built = frozenset(version.id for version in self.states[clone.head].values())

    @step(where=PLACES, kill=KILLS)
    def pull(self, where: int, kill: int) -> None:
        clone, state = self.at(where)
        if clone.refs.branch != "main":
            return self.refused(clone, ["pull"], 66)
        tip = git(self.remote, "rev-parse", "main")
        clone.git("fetch", "-q")  # so that Git can be asked; `pull` fetches again
        if clone.is_ancestor(tip, clone.head):
            self.do(clone, ["pull"], state, kill)
        elif clone.is_ancestor(clone.head, tip):
            self.note("pull: forward")
            self.do(clone, ["pull"], self.state_at(clone, tip), kill)
            self._brought_in_line(clone)
        else:
            self.refused(clone, ["pull"], 3)

    @step(where=PLACES)
    def push(self, where: int) -> None:
        clone, _ = self.at(where)
        if clone.refs.branch == "main":
            tip = git(self.remote, "rev-parse", "main")
            forward = clone.tries("cat-file", "-e", tip) and clone.is_ancestor(tip, clone.head)
            assert self.plain(clone, "push", "-q", "origin", "main") == forward
            assert git(self.remote, "rev-parse", "main") == (clone.head if forward else tip)

    @step(where=PLACES, number=st.integers(0, len(POOL) - 1))
    def pull_of_what_cannot_be_believed(self, where: int, number: int) -> None:
        """Somebody pushed a patch whose facts are not those that it was solved for."""
        clone, _ = self.at(where)
        tip = git(self.remote, "rev-parse", "main")
        clone.git("fetch", "-q")
        if clone.refs.branch != "main" or not clone.is_ancestor(clone.head, tip):
            return
        bad = self.root / "bad"
        git(self.root, "clone", "-q", str(self.remote), str(bad))
        folder, _ = self.pool[number]
        (bad / "patches" / "bad-01234567").mkdir(parents=True)
        for file in folder.iterdir():
            data = file.read_bytes()
            data = (
                data.replace(b"chess", b"dance").replace(b"golf", b"polo")
                if file.name == "facts.jsonl"
                else data
            )
            (bad / "patches" / "bad-01234567" / file.name).write_bytes(data)
        git(bad, "add", "-A")
        git(bad, "commit", "-q", "-m", "Mixed up")
        git(bad, "push", "-q", "origin", "main")
        self.refused(clone, ["pull"], 65)
        git(self.remote, "update-ref", "refs/heads/main", tip)
        shutil.rmtree(bad)
        clone.git("fetch", "-q")

    @step(where=PLACES, which=SMALL, side=SIDES, joint=st.booleans(), kill=KILLS)
    def merge(self, where: int, which: int, side: str | None, joint: bool, kill: int) -> None:
        clone, _ = self.at(where)
        if clone.refs.branch is None:
            return
        others = sorted(set(clone.refs.branches) - {clone.refs.branch})
        others += ["@{upstream}"] if clone.refs.branch == "main" else []
        if not others:
            return
        branch = others[which % len(others)]
        if branch == "@{upstream}":
            clone.git("fetch", "-q")
        words: list[object] = ["merge", branch]
        words += [f"--{side}"] if side else []
        words += ["--joint"] if joint else []
        Merge(self, clone, clone.git("rev-parse", branch), side, joint).run(words, kill)


class Keeping(World):
    """`gc`, `fsck`, `reindex`, a lost catalogue, `clone`, builds elsewhere."""

    @step(where=PLACES, old=st.booleans(), kill=KILLS)
    def gc(self, where: int, old: bool, kill: int) -> None:
        """What the recipe names stays however old it is; what nothing names goes."""
        clone, state = self.at(where)
        private = clone.root / ".git" / "patchkit"
        needed = sorted(path.name for path in (private / "statistics").iterdir())
        left = private / "kept" / "0123456789ab"
        left.mkdir(parents=True, exist_ok=True)
        if old:
            then = time.time() - 20 * 86400
            for path in (private, *private.rglob("*")):
                if path.name != "lock" and "catalogue" not in path.name and "build" not in path.parts:
                    os.utime(path, (then, then))
        self.do(clone, ["gc"], state, kill)
        assert sorted(path.name for path in (private / "statistics").iterdir()) == needed
        assert left.exists() != old
        shutil.rmtree(left, ignore_errors=True)

    @step(where=PLACES, how=st.sampled_from(["prune", "pack"]))
    def git_gc(self, where: int, how: str) -> None:
        """What a reflog names is there for `undo`."""
        clone, _ = self.at(where)
        assert self.plain(clone, *(("gc", "-q", "--prune=now") if how == "prune" else ("repack", "-q", "-d")))
        self.unchanged(clone)

    @step(where=PLACES, lost=st.booleans(), kill=KILLS)
    def reindex(self, where: int, lost: bool, kill: int) -> None:
        clone, state = self.at(where)
        if lost:
            for path in (clone.root / ".git" / "patchkit").glob("catalogue.db*"):
                path.unlink()
            clone.built = None
        self.do(clone, ["reindex"], state, kill)

    @step(where=PLACES, kill=KILLS)
    def repair(self, where: int, kill: int) -> None:
        clone, state = self.at(where)
        fine(clone.run("build"))  # of patches that a branch holds: what was undone cannot be computed again
        (file,) = clone.repository().build_folder.glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        clone.built = frozenset(version.id for version in state.values())
        assert clone.repository().fsck() != []
        self.do(clone, ["fsck", "--repair"], state, kill)

    @step(where=PLACES, kill=KILLS)
    def clone_anew(self, where: int, kill: int) -> None:
        """The remote's stack, whole, in a third clone."""
        self.at(where)
        third = self.root / f"third{self.turn}"
        self.note("clone")
        self._cloned(third, kill)
        clone = Clone(third)
        tip = git(self.remote, "rev-parse", "main")
        clone.refs = clone.read_refs()
        assert clone.head == tip
        self.check_in_force(clone, self.states[tip])
        shutil.rmtree(third)

    def _cloned(self, third: Path, kill: int) -> None:
        call: Callable[[], object] = lambda: fine(  # noqa: E731
            self.clones[0].run("clone", self.remote, third, "--base", self.base.folder)
        )
        if not kill or (killed_at(kill, self.root, call) and not third.exists()):
            call()
