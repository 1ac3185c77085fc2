"""A merge's patches: for each folder the version that holds what is wanted, as it is or solved again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from patchkit.algebra.factors import Patch
from patchkit.algebra.interference import Interference, interference
from patchkit.algebra.joint import solve_jointly
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput, PatchkitError
from patchkit.facts import Key
from patchkit.git.store import GitStore
from patchkit.merging.choices import OURS, THEIRS
from patchkit.merging.plan import Answers, Conflict, Plan, Sides, plan_merge
from patchkit.patch import DELTA, read_patch_header

__all__ = ["Solved", "solve_merge"]

_Files = Mapping[str, str]


@dataclass(frozen=True)
class Solved:
    """What the patch folders that the sides do not share are to hold after the merge.

    ``folders``: folder -> file -> object id (no files: it goes). ``made``: bytes that are not in Git yet,
    by object id. ``again``: folders that were solved again, for facts that left; ``joint``: those solved
    together.
    """

    plan: Plan
    folders: Mapping[str, _Files]
    made: Mapping[str, bytes] = field(default_factory=dict)
    again: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    disturbed: tuple[tuple[str, Interference], ...] = ()
    """(patch, what the other side's new patches do to one of its facts), worst first."""
    notes: tuple[str, ...] = ()


def solve_merge(store: GitStore, sides: Sides, answers: Answers, joint: bool) -> Solved:
    """Decide, and solve again what has to be; the plan's ``undecided`` say what a person has to choose.

    BadInput where ``joint`` is asked of patches that cannot be solved together (see `joint`).
    """
    shelf = _Shelf(store, sides)
    more: dict[str, Conflict] = {}
    while True:
        plan = plan_merge(sides, answers, list(more.values()))
        found: dict[str, Patch | _Files] = {}
        fresh = []
        for name in sides.differing:
            if not plan.waiting(name):
                result = shelf.version(plan, name)
                if isinstance(result, Conflict):
                    fresh.append(result)
                else:
                    found[name] = result
        unseen = [conflict for conflict in fresh if conflict.patch not in more]
        if not unseen:
            break
        more |= {str(conflict.patch): conflict for conflict in unseen}
    answers.refuse_unused(plan.conflicts)
    if plan.undecided:
        return Solved(plan, {name: files for name, files in found.items() if not isinstance(files, Patch)})
    return _finished(shelf, plan, found, joint)


def _finished(shelf: _Shelf, plan: Plan, found: Mapping[str, Patch | _Files], joint: bool) -> Solved:
    new = {side: shelf.new(found, side) for side in (OURS, THEIRS)}
    patches = {name: shelf.loaded(found[name]) for names in new.values() for name in names}
    notes: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    results = dict(found)
    if joint and new[OURS] and new[THEIRS]:
        _refuse_gone(shelf, found, patches)
        patches = solve_jointly(patches)
        results |= patches
        together = tuple(sorted(patches))
    elif joint:
        notes = ("only one side brings new patches: there is nothing to solve together",)
    folders, made = {}, {}
    for name, result in results.items():
        if isinstance(result, Patch):
            spelled = {file: (shelf.oid(file, data), data) for file, data in result.files().items()}
            folders[name] = {file: oid for file, (oid, _) in spelled.items()}
            made.update(dict(spelled.values()))
        else:
            folders[name] = dict(result)
    again = tuple(sorted(name for name, result in found.items() if isinstance(result, Patch)))
    disturbed, unmeasured = _disturbed(patches, new)
    return Solved(plan, folders, made, again, together, disturbed, (*notes, *unmeasured))


def _refuse_gone(shelf: _Shelf, found: Mapping[str, Patch | _Files], patches: Mapping[str, Patch]) -> None:
    """BadInput where a patch was solved on a version that is not there: what that did to its keys is not
    known any more, and a batch would leave it out."""
    there = {patch.id for patch in patches.values()}
    for name, version in {**shelf.sides.ours.folders, **found}.items():  # found: what they do not share
        if version and name not in patches:
            there |= shelf.ids(version)
    for name, patch in patches.items():
        if not there.issuperset(patch.solved_on):
            raise BadInput(
                f"{name}: was solved on patches that are not as they were then, so that it cannot be solved "
                f"together; solve it again on what is there, patchkit refit {name}, or merge without --joint"
            )


def _disturbed(
    patches: Mapping[str, Patch], new: Mapping[str, Sequence[str]]
) -> tuple[tuple[tuple[str, Interference], ...], tuple[str, ...]]:
    """What each side's new patches do to the other's facts, worst first; and what could not be measured."""
    found: list[tuple[str, Interference]] = []
    notes = []
    for side, other in ((OURS, THEIRS), (THEIRS, OURS)):
        against = [patches[name] for name in new[other] if name not in new[side]]
        for name in new[side] if against else ():
            try:
                found += [(name, item) for item in interference(patches[name], against)]
            except PatchkitError as error:  # of an editor that is not here too
                notes.append(str(error))
    return tuple(sorted(found, key=lambda pair: -pair[1].overall)), tuple(notes)


class _Shelf:
    """Versions of patches from the trees of a merge, read once."""

    def __init__(self, store: GitStore, sides: Sides) -> None:
        self.store = store
        self.sides = sides
        self._tree = store.tree()
        self._read: dict[tuple[tuple[str, str], ...], Patch] = {}

    def oid(self, file: str, data: bytes) -> str:
        return self._tree.blob_id(file, data)

    def loaded(self, version: Patch | _Files) -> Patch:
        """The patch of a version's files."""
        if isinstance(version, Patch):
            return version
        mark = tuple(sorted(version.items()))
        if mark not in self._read:
            data = self.store.read_all([oid for _, oid in mark])
            self._read[mark] = Patch.from_files(
                dict(zip((file for file, _ in mark), data, strict=True)), "patches"
            )
        return self._read[mark]

    def ids(self, version: Patch | _Files) -> set[str]:
        """The ids that a version answers to (`Header.versions`)."""
        if isinstance(version, Patch):
            return {version.id}
        delta = self.store.read(version[DELTA])
        return read_patch_header(delta, DELTA).versions(hash_bytes(delta))

    def new(self, found: Mapping[str, Patch | _Files], side: str) -> list[str]:
        """The patches of the result that this side brings: in none of the common ancestors."""
        old = {name for base in self.sides.bases for name in base.folders}
        return [
            name
            for name, result in found.items()
            if result and name in self.sides.of(side).folders and name not in old
        ]

    @cached_property
    def _base(self) -> Mapping[str, _Files]:
        """Folder -> files in the common ancestor, for folders that are the same in all of them."""
        first, *rest = [base.folders for base in self.sides.bases] or [{}]
        return {name: files for name, files in first.items() if all(r.get(name) == files for r in rest)}

    def version(self, plan: Plan, name: str) -> Patch | _Files | Conflict:
        """What this folder is to hold: a side's files as they are, a patch solved again, or a conflict."""
        wanted = plan.wanted(name)
        if not wanted:
            return {}
        side = plan.chosen.get(name) or self._side(name, wanted)
        if side is None:
            return self._conflict("numbers", name)
        order = dict.fromkeys([side, OURS, THEIRS])
        versions = [self.sides.of(one).folders.get(name) for one in order] + [self._base.get(name)]
        why = ""
        for files in versions:
            if files is None:
                continue
            fits, why = self._fitted(files, wanted)
            if fits is not None:
                return fits
        return self._conflict("patch", name, why)

    def _fitted(self, files: _Files, wanted: Mapping[Key, str]) -> tuple[Patch | _Files | None, str]:
        """A version with exactly the wanted facts, the others taken out; or why it cannot be had."""
        patch = self.loaded(files)
        lines = {fact.key: fact.to_line() for fact in patch.facts}
        if lines == dict(wanted):
            return files, ""
        if any(lines.get(key) != line for key, line in wanted.items()):
            return None, "no version holds all of these facts"
        try:
            return patch.without([i for i, fact in enumerate(patch.facts) if fact.key not in wanted]), ""
        except BadInput as error:
            return None, str(error)

    def _side(self, name: str, wanted: Mapping[Key, str]) -> str | None:
        """The side whose numbers count: that which holds what is wanted, and did more than take facts out.

        None where both do, so that a person has to choose.
        """
        ours, theirs = (side.folders.get(name) for side in (self.sides.ours, self.sides.theirs))
        base = self._base.get(name)
        if ours is None or theirs is None:
            return THEIRS if ours is None else OURS
        if ours == theirs or theirs == base:
            return OURS
        if ours == base:
            return THEIRS
        if (holds := self._holds(ours, wanted)) != self._holds(theirs, wanted):
            return OURS if holds else THEIRS
        if base is not None:
            before = self.loaded(base)
            if _only_took_out(before, self.loaded(theirs)):
                return OURS
            if _only_took_out(before, self.loaded(ours)):
                return THEIRS
        return None

    def _holds(self, files: _Files, wanted: Mapping[Key, str]) -> bool:
        return set(wanted.values()) <= {fact.to_line() for fact in self.loaded(files).facts}

    def _conflict(self, kind: str, name: str, why: str = "") -> Conflict:
        ours, theirs = (
            next((held for held in side.held.values() if held.patch == name), None)
            for side in (self.sides.ours, self.sides.theirs)
        )
        return Conflict(kind, None, name, ours, theirs, why=why)


def _only_took_out(before: Patch, after: Patch) -> bool:
    """Whether a version is an older one without some facts: solved again from what that one holds."""
    if before.solution is None or after.solution is None:
        return False
    made = [(p.base, p.method, p.recipe, p.solved_on, set(p.deltas)) for p in (before, after)]
    rows = {fact.to_line(): i for i, fact in enumerate(before.facts)}
    if made[0] != made[1] or any(fact.to_line() not in rows for fact in after.facts):
        return False
    kept = [rows[fact.to_line()] for fact in after.facts]
    pairs = [(before.solution.targets, after.solution.targets)]
    pairs += [(before.solution.keys[name], after.solution.keys[name]) for name in before.deltas]
    return all(bool((old[kept] == new).all()) for old, new in pairs)
