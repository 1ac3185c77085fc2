"""What a merge of two sides is to hold, decided fact by fact, before anything is touched.

Every key that the sides do not share gets a side: what `ours` or `theirs` holds of it is in force
afterwards. Where the three-way merge of the facts says which, that is taken; where it does not, or where
a patch would come back that was taken back, there is a `Conflict`, which a person's `Answers` decide.
Reads trees and facts; the numbers are `actions.merge`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.facts import Fact, Key, load_canonical, normal
from patchkit.git.history import PATCHES
from patchkit.merging.choices import OURS, THEIRS
from patchkit.merging.merges import merge_bases, removals, three_way
from patchkit.patch import FACTS
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["Answers", "Conflict", "Held", "Plan", "Side", "Sides", "plan_merge", "read_sides"]

SAYS = {
    "targets": "the sides say otherwise",
    "twice": "both sides say it, each in a patch of its own",
    "removed": "one side took it out, the other changed it",
    "solved again": "one side took its patch back, the other solved that patch again",
    "returned": "was taken back here, and the merge would bring it back",
    "moved": "one side joined its patch with others, the other solved that patch again",
    "numbers": "both sides solved it again, each in its own way",
    "patch": "no version of it can be solved again to hold what the sides make together",
}
"""The kinds of conflict, in words."""


@dataclass(frozen=True)
class Held:
    """A fact in force on a side, and the patch that holds it."""

    patch: str
    fact: Fact


@dataclass(frozen=True)
class Side:
    """One of the trees that a merge looks at; `held` only for patches that are not the same in all."""

    commit: str
    folders: Mapping[str, Mapping[str, str]]
    """Patch folder -> file -> object id."""
    held: Mapping[Key, Held]


@dataclass(frozen=True)
class Sides:
    """Both sides, their best common ancestors, and what our own line took back since: folder -> commit."""

    bases: tuple[Side, ...]
    ours: Side
    theirs: Side
    removed: Mapping[str, str]

    def of(self, name: str) -> Side:
        return self.ours if name == OURS else self.theirs

    @property
    def all(self) -> tuple[Side, ...]:
        return (*self.bases, self.ours, self.theirs)

    @property
    def differing(self) -> list[str]:
        """Patch folders that are not the same in all trees."""
        return _differing([side.folders for side in self.all])


@dataclass(frozen=True)
class Conflict:
    """What a person has to choose a side of: one fact's key, or a whole patch (`patch` set, `key` None)."""

    kind: str
    key: Key | None
    patch: str | None
    ours: Held | None = None
    theirs: Held | None = None
    removal: str | None = None
    """The commit on our own line that took back the patch which `theirs` would bring back."""
    why: str = ""

    @property
    def what(self) -> Key | str:
        """What the choice is of."""
        return self.key if self.key is not None else str(self.patch)

    @property
    def name(self) -> str:
        """How it is called on the command line."""
        found = self.ours or self.theirs
        return found.fact.text if self.key is not None and found else str(self.patch)

    @property
    def says(self) -> str:
        """What is in conflict, in words."""
        removal = f" (commit {self.removal[:10]})" if self.removal and self.kind == "returned" else ""
        return f"{SAYS[self.kind]}{removal}" + (f": {self.why}" if self.why else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "key": None if self.key is None else list(self.key),
            "patch": self.patch,
            "name": self.name,
            "removal": self.removal,
            "why": self.why,
            **{side: _held_dict(getattr(self, side)) for side in (OURS, THEIRS)},
        }


@dataclass
class Answers:
    """What a person chose: by key or patch folder (from a file), by words (`--fact`), or one side for all."""

    exact: dict[Key | str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    rest: str | None = None

    def side(self, conflict: Conflict) -> str | None:
        """The side that was chosen; words say it over again. `rest` brings nothing back that was taken back:
        that has to be named."""
        said = {word: side for word, side in self.words.items() if _names(word, conflict)}
        if len(set(said.values())) > 1:
            raise BadInput(f"--fact: {one_line(conflict.name)} is given both sides; choose one")
        if said:
            return next(iter(said.values()))
        if (found := self.exact.get(conflict.what)) is not None:
            return found
        return None if self.rest == THEIRS and conflict.removal else self.rest

    def refuse_unused(self, conflicts: Iterable[Conflict]) -> None:
        """`NotFound` for a word that names no conflict, `BadInput` for one that names several facts."""
        every = list(conflicts)
        for word in self.words:
            met = [conflict for conflict in every if _names(word, conflict)]
            if not met:
                names = ", ".join(f"“{conflict.name}”" for conflict in every[:5]) or "there are none"
                raise NotFound(f"--fact {one_line(word)}: is in no conflict; conflicts: {one_line(names)}")
            if len({conflict.what for conflict in met}) > 1:
                names = ", ".join(f"“{conflict.name}”" for conflict in met[:5])
                raise BadInput(f"--fact {one_line(word)}: names several; say which: {one_line(names)}")


@dataclass(frozen=True)
class Plan:
    """For each key that the sides do not share: whose is in force afterwards, and what had to be chosen."""

    sides: Sides
    side_of: Mapping[Key, str]
    chosen: Mapping[Key | str, str]
    """What was chosen on purpose, as the commit records it."""
    conflicts: tuple[Conflict, ...]
    """All of them, those that were decided too."""
    undecided: tuple[Conflict, ...]

    def wanted(self, folder: str) -> dict[Key, str]:
        """Key -> the fact's line, for the facts that the patch in this folder is to hold."""
        found = {}
        for key, side in self.side_of.items():
            held = self.sides.of(side).held.get(key)
            if held is not None and held.patch == folder:
                found[key] = held.fact.to_line()
        return found

    def waiting(self, folder: str) -> bool:
        """Whether a choice that is not made yet could change what this patch is to hold."""
        return any(folder in _folders_of(conflict) for conflict in self.undecided)


def read_sides(store: GitStore, ours: str, theirs: str) -> Sides:
    """Both commits and their merge bases, the facts read of what is not the same in all."""
    bases = merge_bases(store, [ours, theirs])
    commits = [*bases, ours, theirs]
    folders = [_folders(store, commit) for commit in commits]
    names = _differing(folders)
    sides = [
        Side(commit, held, _held(store, held, names)) for commit, held in zip(commits, folders, strict=True)
    ]
    *based, our_side, their_side = sides
    return Sides(tuple(based), our_side, their_side, removals(store, ours, bases))


def plan_merge(sides: Sides, answers: Answers, more: Sequence[Conflict] = ()) -> Plan:
    """Decide every key; `more` are conflicts of whole patches that their numbers brought up."""
    natural: dict[Key, str] = {}
    conflicts: list[Conflict] = []
    for key in sorted(set().union(*(side.held for side in sides.all))):
        side, kind = _natural(sides, key)
        if side is not None:
            natural[key] = side
        else:
            conflicts.append(_conflict(sides, kind, key))
    conflicts += [*_returned(sides, natural), *more]
    side_of, undecided = dict(natural), []
    chosen: dict[Key | str, str] = {}
    for conflict in conflicts:  # facts first: a whole patch decides over its facts
        side = answers.side(conflict)
        if side is None:
            undecided.append(conflict)
            continue
        chosen[conflict.what] = side
        for key in _decided_by(sides, conflict):
            if _at(sides, side, key) != _at(sides, natural.get(key), key):
                chosen[key] = side
            side_of[key] = side
    plan = Plan(sides, side_of, chosen, tuple(conflicts), tuple(undecided))
    waiting = {conflict.what for conflict in undecided}
    brought = [name for name in _brought(sides) if name not in waiting and plan.wanted(name)]
    back: dict[Key | str, str] = dict.fromkeys(brought, THEIRS)
    return Plan(sides, side_of, {**chosen, **back}, tuple(conflicts), tuple(undecided))


def _natural(sides: Sides, key: Key) -> tuple[str | None, str]:
    """The side that the three-way merge takes for a key, or None and the kind of conflict."""
    ours, theirs = sides.ours.held.get(key), sides.theirs.held.get(key)
    if ours and theirs and ours.fact == theirs.fact:
        return _place(sides, key, ours.patch, theirs.patch)
    lines = [{key: _line(side.held.get(key))} for side in sides.all]
    allowed = three_way(lines[:-2] or [{}], lines[-2:], key)
    if len(allowed) > 1:
        if ours and theirs:
            return None, "twice" if normal(ours.fact.target) == normal(theirs.fact.target) else "targets"
        return None, "removed"
    side = OURS if _line(ours) in allowed else THEIRS
    if not (ours and theirs) and _solved_again(sides, ours or theirs, sides.ours if theirs else sides.theirs):
        return None, "solved again"
    return side, ""


def _place(sides: Sides, key: Key, ours: str, theirs: str) -> tuple[str | None, str]:
    """The same fact on both sides: the patch that it was moved to, if one side moved it."""
    before = {base.held[key].patch for base in sides.bases if key in base.held}
    if ours == theirs:
        return OURS, ""
    if ours in before and theirs not in before:
        return (None, "moved") if _other_numbers(sides, sides.ours, ours) else (THEIRS, "")
    if theirs in before and ours not in before:
        return (None, "moved") if _other_numbers(sides, sides.theirs, theirs) else (OURS, "")
    return None, "twice"


def _solved_again(sides: Sides, held: Held | None, other: Side) -> bool:
    """Whether the patch of a fact is gone on the other side, and is not as it was in a common ancestor."""
    if held is None or held.patch in other.folders:
        return False
    mine = sides.theirs if other is sides.ours else sides.ours
    before = [base.folders[held.patch] for base in sides.bases if held.patch in base.folders]
    return bool(before) and mine.folders[held.patch] not in before


def _other_numbers(sides: Sides, side: Side, folder: str) -> bool:
    """Whether a side has the facts that common ancestors have in this folder, and none of their numbers."""
    mine = side.folders[folder]
    before = [base.folders[folder] for base in sides.bases if folder in base.folders]
    return mine not in before and any(mine.get(FACTS) == each.get(FACTS) for each in before)


def _conflict(sides: Sides, kind: str, key: Key) -> Conflict:
    ours, theirs = sides.ours.held.get(key), sides.theirs.held.get(key)
    back = theirs is not None and theirs.patch in _brought(sides) and kind != "moved"  # it was not taken back
    removal = sides.removed[theirs.patch] if back and theirs else None
    return Conflict(kind, key, None, ours, theirs, removal)


def _returned(sides: Sides, natural: Mapping[Key, str]) -> list[Conflict]:
    """Patches that would come back, though our own line took them back; named once, as a whole."""
    plan = Plan(sides, natural, {}, (), ())
    found = []
    for name in _brought(sides):
        keys = list(plan.wanted(name))
        if keys:
            held = sides.theirs.held[keys[0]]
            found.append(Conflict("returned", None, name, None, held, sides.removed[name]))
    return found


def _brought(sides: Sides) -> list[str]:
    return sorted((set(sides.theirs.folders) - set(sides.ours.folders)) & set(sides.removed))


def _decided_by(sides: Sides, conflict: Conflict) -> list[Key]:
    """The keys over which a choice decides: none where it is of numbers, whose facts are not in question."""
    if conflict.key is not None:
        return [conflict.key]
    return [] if conflict.kind == "numbers" else _keys_of(sides, str(conflict.patch))


def _keys_of(sides: Sides, folder: str) -> list[Key]:
    """The keys that either side has in a folder."""
    pairs = (pair for side in (sides.ours, sides.theirs) for pair in side.held.items())
    return sorted({key for key, held in pairs if held.patch == folder})


def _at(sides: Sides, side: str | None, key: Key) -> Held | str | None:
    return "undecided" if side is None else sides.of(side).held.get(key)


def _folders_of(conflict: Conflict) -> set[str]:
    held = {held.patch for held in (conflict.ours, conflict.theirs) if held is not None}
    return held | ({conflict.patch} if conflict.patch is not None else set())


def _line(held: Held | None) -> frozenset[str]:
    return frozenset() if held is None else frozenset([held.fact.to_line()])


def _names(word: str, conflict: Conflict) -> bool:
    """Whether a word means this conflict: a patch by folder or slug, a fact by id, text or subject."""
    if conflict.key is None:
        name = str(conflict.patch)
        return word.strip("/").removeprefix(f"{PATCHES}/") in (name, name.rpartition("-")[0])
    facts = [held.fact for held in (conflict.ours, conflict.theirs) if held is not None]
    said = {normal(text) for fact in facts for text in (fact.text, fact.subject)}
    return normal(word) in said or word in {fact.id for fact in facts}


def _held_dict(held: Held | None) -> dict[str, Any] | None:
    if held is None:
        return None
    return {"patch": held.patch, "prompt": held.fact.text, "target": held.fact.target}


def _folders(store: GitStore, commit: str) -> dict[str, dict[str, str]]:
    folders: dict[str, dict[str, str]] = {}
    for entry in store.tree(commit).entries:
        parts = entry.path.split("/")
        if len(parts) == 3:
            folders.setdefault(parts[1], {})[parts[2]] = entry.oid
    return folders


def _differing(trees: Sequence[Mapping[str, Mapping[str, str]]]) -> list[str]:
    names = set().union(*trees)
    return sorted(name for name in names if any(tree.get(name) != trees[0].get(name) for tree in trees))


def _held(store: GitStore, folders: Mapping[str, Mapping[str, str]], names: Iterable[str]) -> dict[Key, Held]:
    held = {}
    for name in names:
        if FACTS not in folders.get(name, {}):
            continue
        try:
            facts = load_canonical(store.read(folders[name][FACTS]), f"{PATCHES}/{name}/{FACTS}")
        except PatchkitError:  # in an ancestor; the sides themselves are believed before this
            continue
        held.update({fact.key: Held(name, fact) for fact in facts})
    return held
