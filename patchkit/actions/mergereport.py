"""What a merge did, or waits for: which patches came and went, what each side says, who said it and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchkit.errors import Refused
from patchkit.git.store import Commit, GitStore
from patchkit.merging.choices import OURS, THEIRS
from patchkit.merging.plan import Conflict, Held, Sides

if TYPE_CHECKING:
    from patchkit.actions.mergesolve import Solved
    from patchkit.algebra.interference import Interference
    from patchkit.facts import Fact

__all__ = [
    "FORWARD",
    "MERGED",
    "STOPPED",
    "UP_TO_DATE",
    "Dispute",
    "MergeStopped",
    "Merged",
    "Told",
    "changes",
    "summary",
]

UP_TO_DATE, FORWARD, MERGED, STOPPED = "up to date", "fast-forward", "merged", "stopped"


@dataclass(frozen=True)
class Told:
    """What one side says in a conflict, and who brought it so: the commit that last touched its patch."""

    held: Held | None
    commit: Commit | None

    def to_dict(self) -> dict[str, Any]:
        fact: Fact | None = self.held.fact if self.held else None
        return {
            "patch": self.held.patch if self.held else None,
            "prompt": fact.text if fact else None,
            "target": fact.target if fact else None,
            "source": fact.source if fact else None,
            "author": self.commit.author if self.commit else None,
            "date": self.commit.date.isoformat() if self.commit else None,
            "commit": self.commit.id if self.commit else None,
        }


@dataclass(frozen=True)
class Dispute:
    """A conflict with both sides; ``choice`` is the side that was chosen, if one was."""

    conflict: Conflict
    ours: Told
    theirs: Told
    choice: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.conflict.to_dict(),
            "ours": self.ours.to_dict(),
            "theirs": self.theirs.to_dict(),
            "choice": self.choice,
        }


@dataclass(frozen=True)
class Merged:
    """What a merge did; ``commit`` is None where nothing was committed."""

    how: str
    """"up to date", "fast-forward", "merged" or "stopped"."""
    branch: str
    """What was merged, as it was named."""
    message: str = ""
    brought: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    """Patches solved again without facts that left."""
    joint: tuple[str, ...] = ()
    """Patches of both sides that were solved together."""
    disputes: tuple[Dispute, ...] = ()
    disturbed: tuple[tuple[str, Interference], ...] = ()
    """(patch, what the other side's new patches do to a fact of it), worst first."""
    files: tuple[str, ...] = ()
    """Files that are no patches and are in conflict."""
    notes: tuple[str, ...] = ()
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "how": self.how,
            "branch": self.branch,
            "brought": list(self.brought),
            "removed": list(self.removed),
            "changed": list(self.changed),
            "solved_again": list(self.again),
            "solved_together": list(self.joint),
            "conflicts": [dispute.to_dict() for dispute in self.disputes],
            "files_in_conflict": list(self.files),
            "interference": [{"patch": name, **item.to_dict()} for name, item in self.disturbed],
            "notes": list(self.notes),
            "commit": self.commit,
        }


class MergeStopped(Refused):
    """A merge that waits for choices; ``done`` is what there is to choose. The merge stays under way."""

    stays = True

    def __init__(self, message: str, done: Merged) -> None:
        super().__init__(message)
        self.done = done


def summary(store: GitStore, branch: str, solved: Solved) -> Merged:
    """What a merge that is decided will have done."""
    return replace(
        changes(MERGED, branch, solved.plan.sides, solved.folders),
        again=solved.again,
        joint=solved.joint,
        disputes=tuple(_disputes(store, solved)),
        disturbed=solved.disturbed,
        notes=solved.notes,
    )


def changes(how: str, branch: str, sides: Sides, folders: Mapping[str, Mapping[str, str]]) -> Merged:
    """What becomes of our own patches where these folders are as given (no files: it goes)."""
    ours = sides.ours.folders
    return Merged(
        how,
        branch,
        brought=tuple(name for name, files in folders.items() if files and name not in ours),
        removed=tuple(name for name, files in folders.items() if not files and name in ours),
        changed=tuple(
            name for name, files in folders.items() if files and name in ours and files != ours[name]
        ),
    )


def _disputes(store: GitStore, solved: Solved) -> Iterator[Dispute]:
    plan = solved.plan
    if not plan.conflicts:
        return
    histories = {side: store.history(plan.sides.of(side).commit) for side in (OURS, THEIRS)}
    for conflict in plan.conflicts:
        told = {
            side: Told(held, _last(histories[side], held, _places(plan.sides, conflict)))
            for side, held in ((OURS, conflict.ours), (THEIRS, conflict.theirs))
        }
        yield Dispute(conflict, told[OURS], told[THEIRS], plan.chosen.get(conflict.what))


def _places(sides: Sides, conflict: Conflict) -> set[str]:
    """The patches in which a conflict's facts stand or stood."""
    key = conflict.key
    before = [base.held.get(key) for base in sides.bases] if key is not None else []
    held = [held for held in (conflict.ours, conflict.theirs, *before) if held is not None]
    return {held.patch for held in held} | ({conflict.patch} if conflict.patch else set())


def _last(history: Sequence[Commit], held: Held | None, places: set[str]) -> Commit | None:
    """The newest commit that put the fact as a side has it: or that took it out, where it is not held."""
    for commit in history:
        touched = (*commit.added, *commit.changed) if held else (*commit.removed, *commit.changed)
        if ({held.patch} if held else places) & set(touched):
            return commit
    return None
