"""What `patchkit merge` may make of two commits, and what it must where there is nothing to choose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from machine_ground import RIDGE
from machine_model import (
    CLOSE,
    Said,
    State,
    Version,
    doubled,
    held,
    merge_facts,
    merge_folders,
    numbers_apart,
    together,
)
from machine_world import Clone, World
from proof_helpers import fine


class Merge:
    """What `patchkit merge` may make of two commits, by the facts."""

    def __init__(self, world: World, clone: Clone, target: str, side: str | None, joint: bool) -> None:
        self.world, self.clone, self.target, self.side, self.joint = world, clone, target, side, joint
        self.ours, self.theirs = world.state_at(clone, clone.head), world.state_at(clone, target)
        self.bases = clone.bases(clone.head, target)
        self.before = [world.state_at(clone, base) for base in self.bases]
        self.facts = merge_facts(self.before, self.ours, self.theirs)

    def run(self, words: Sequence[object], kill: int) -> None:
        head, world = self.clone.head, self.world
        if self.target in self.bases:
            return world.do(self.clone, words, self.ours, kill)
        if head in self.bases:
            world.note("merge: forward")
            return world.do(self.clone, words, self.theirs, kill)
        plain = self._without_choices()
        if plain is None:
            return self._decided(words, kill)
        if self.joint and not self._can_be_joint(plain):
            return self._perhaps(words)
        world.note("merge: joint" if self.joint else "merge: clean")
        return world.do(self.clone, words, self._jointly(plain) if self.joint else plain, kill)

    def _without_choices(self) -> State | None:
        """The outcome where the folders and the facts merge alike and nothing comes back."""
        if len(self.bases) != 1 or self._brought_back():
            return None
        found = merge_folders(self.before[0], self.ours, self.theirs)
        if found is None or doubled(found) or any(len(may) > 1 for may in self.facts.values()):
            return None
        said = {subject: fact for subject, (_, fact) in held(found).items()}
        wanted = {subject: fact for subject, (fact,) in self.facts.items() if fact is not None}
        return found if said == wanted else None

    def _brought_back(self) -> set[str]:
        """Patches of the other side that our own line took back since."""
        removed = self.world.removed_since(self.clone, self.clone.head, self.bases)
        return removed & (self.theirs.keys() - self.ours.keys())

    def _new(self, state: State) -> list[str]:
        return [name for name in state if name not in self.before[0]]

    def _can_be_joint(self, after: State) -> bool:
        """Only patches of the pool have one C that the model knows."""
        pool = {folder.name for folder, _ in self.world.pool}
        new = [after[name] for name in self._new(after)]
        plain = all(not version.joint and len(version.parts) == 1 for version in new)
        return set(self._new(after)) <= pool and plain and len({tuple(v.deltas) for v in new}) < 2

    def _jointly(self, after: State) -> State:
        sides = [set(self._new(side)) for side in (self.ours, self.theirs)]
        new = {name: after[name] for name in self._new(after)}
        if not all(sides):  # one side brought nothing: there is nothing to solve together
            return after
        return {**after, **together(new, RIDGE)}

    def _perhaps(self, words: Sequence[object]) -> None:
        """Solved together or refused by name: the machine knows no C but the pool's."""
        done = self.clone.run(*words)
        self.world.note(f"merge: joint of others ({done.code})")
        if done.code:
            assert done.code == 65, done
            return self.world.unchanged(self.clone)
        return self.world.learn(self.clone, self._chosen, own=True)

    def _decided(self, words: Sequence[object], kill: int) -> None:
        """A choice is needed: it stops, or does what was asked for and says so in its trailers."""
        done = self.clone.run(*words)
        self.world.note(f"merge: with choices ({done.code})")
        if done.code == 0:
            return self.world.learn(self.clone, self._chosen, own=True)
        assert done.code in (3, 65), done
        if done.code == 65:
            assert self.joint, done
        else:
            assert self.side is None or (self.side == "theirs" and self._brought_back()), done
            self.world.note("merge --abort")
            fine(self.clone.run("merge", "--abort"))
        return self.world.unchanged(self.clone)

    def _chosen(self) -> State:
        """Every fact is the three-way merge's or, where a trailer says so, the chosen side's."""
        out = self.clone.git("log", "-1", "--format=%(trailers:key=Patchkit-Choice,valueonly,unfold)")
        keys = {
            json.loads(what)[0]: side
            for side, what in (line.split(" ", 1) for line in out.splitlines() if line)
            if what.startswith("[")
        }
        sides = {"ours": held(self.ours), "theirs": held(self.theirs)}
        folders = [path for path in (self.clone.root / "patches").iterdir() if path.is_dir()]
        facts = {folder.name: self.world.facts_in(folder) for folder in folders}
        said = {fact.subject: fact for each in facts.values() for fact in each}
        assert len(said) == sum(map(len, facts.values()))
        for subject, may in self.facts.items():
            side = keys.get(subject.casefold())
            if side is not None:
                assert side == self.side
                may = {sides[side].get(subject, (None, None))[1]}
            assert said.get(subject) in may, (subject, said.get(subject), may, side)
        assert said.keys() <= self.facts.keys()
        return {name: self._version(name, each) for name, each in facts.items()}

    def _version(self, name: str, facts: tuple[Said, ...]) -> Version:
        """One side's, or one side's without the facts that leave, or any numbers if solved together."""
        for state in (self.ours, self.theirs, *self.before):
            if (version := state.get(name)) is None or not set(facts) <= set(version.facts):
                continue
            out = {i for i, fact in enumerate(version.facts) if fact not in facts}
            found = version.without(out) if out else version
            if self.joint:
                return replace(found, deltas={}, id="", joint=True)
            if numbers_apart(self.clone.root / "patches" / name, found) <= CLOSE:
                return found
        raise AssertionError(f"{name}: is no side's version")
