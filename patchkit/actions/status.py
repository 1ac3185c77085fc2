"""Where a repository stands: read from Git and the catalogue alone, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.base import placed
from patchkit.errors import BadInput, PatchkitError
from patchkit.problem import Problem
from patchkit.stack import Stack, TreeProblems, conflicts

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Build", "Row", "Status", "listing", "status"]


@dataclass(frozen=True)
class Row:
    """One patch in force; date and author are those of the commit that added it."""

    name: str
    id: str
    facts: int
    rank: int
    size: int
    date: datetime | None
    author: str | None
    commit: str | None
    norm: float | None
    """‖ΔW‖ over all its weights, as the catalogue knows it."""
    share: float | None
    """That of the base's norm in the same weights."""
    interference: Mapping[str, float] | None = None
    """See `overlap.pairwise`; None where it was not asked for or the patch has no keys."""

    @property
    def disturbed(self) -> tuple[float, str] | None:
        """The largest interference, and the patch that it comes from."""
        pairs = [(value, name) for name, value in (self.interference or {}).items()]
        return max(pairs, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "date": None if self.date is None else self.date.isoformat()}


@dataclass(frozen=True)
class Build:
    """A build written from here. ``state``: "up to date", "behind", "unfinished", "gone", "damaged" (a file
    is missing or of another length), "perhaps altered" (its weights were written to since, and building
    again or `fsck` would hash them) or "not known", where the tree cannot be believed.
    """

    folder: str
    state: str


@dataclass(frozen=True)
class Status:
    """What ``patchkit status`` says."""

    branch: str
    commit: str | None
    base: str
    fingerprint: str | None
    """The base's, as patchkit.toml says; None where that cannot be read."""
    place: str | None
    """Where the base lies on this machine, as it was said last; None where nobody did, as for one that is
    found by its name."""
    base_here: bool
    """There is a folder at ``place``."""
    patches: int | None
    """In force at HEAD; None where its tree cannot be believed."""
    facts: int | None
    builds: tuple[Build, ...]
    leftovers: tuple[Problem, ...]
    problems: tuple[Problem, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "builds": [asdict(build) for build in self.builds],
            "leftovers": [problem.to_dict() for problem in self.leftovers],
            "problems": [problem.to_dict() for problem in self.problems],
        }


def status(repository: Repository) -> Status:
    """Say where the repository stands; a tree that cannot be believed is told, not raised."""
    store = repository.store
    stack: Stack | None = None
    found: tuple[Problem, ...] = ()
    try:
        stack = repository.stack()
    except TreeProblems as error:
        found = error.problems
    found = (*found, *conflicts(store))  # the index's own; HEAD's stack is in force all the same
    base, fingerprint = _base(repository)
    place = placed(repository, fingerprint)
    return Status(
        branch=store.branch(),
        commit=store.head() if stack is None else stack.commit,
        base=base,
        fingerprint=fingerprint,
        place=None if place is None else str(place),
        base_here=place is not None and place.is_dir(),
        patches=None if stack is None else len(stack.patches),
        facts=None if stack is None else sum(patch.count for patch in stack.patches),
        builds=tuple(_builds(repository, stack, fingerprint)),
        leftovers=tuple(store.leftovers()),
        problems=found,
    )


def listing(repository: Repository, revision: str = "HEAD", *, interference: bool = False) -> list[Row]:
    """The patches in force, oldest first; ``interference``: what each does to the others (imports torch)."""
    stack = repository.stack(revision)
    norms = repository.catalogue.patch_norms()
    between = _interference(repository, stack) if interference else {}
    return [
        Row(
            name=patch.name,
            id=patch.id,
            facts=patch.count,
            rank=patch.rank,
            size=patch.size,
            date=commit.date if commit else None,
            author=commit.author if commit else None,
            commit=commit.id if commit else None,
            norm=norms.get(patch.id, (None, None))[0],
            share=norms.get(patch.id, (None, None))[1],
            interference=between.get(patch.name),
        )
        for patch, commit in stack.by_date(repository.store.history(revision))
    ]


def _interference(repository: Repository, stack: Stack) -> dict[str, dict[str, float] | None]:
    from patchkit.algebra.overlap import incomparable, pairwise

    patches = {stored.name: repository.patch(stored) for stored in stack.patches}
    if why := incomparable(patches.values()):
        raise BadInput(f"{why}; patchkit build --dry-run names the one that is not of this base")
    return pairwise(patches)


def _base(repository: Repository) -> tuple[str, str | None]:
    """How the base is called, and its fingerprint."""
    try:
        settings = repository.settings
    except PatchkitError as error:
        return f"not known: {error}", None
    revision, found = (
        f"@{settings.base_revision}" if settings.base_revision else "",
        settings.base_fingerprint,
    )
    return f"{settings.base_source}{revision} · {found[:19]}…", found


def _builds(repository: Repository, stack: Stack | None, base: str | None) -> list[Build]:
    rows = repository.catalogue.builds()
    if not rows:
        return []
    from patchkit.builds.record import BuildRecord, looks_whole

    wanted = None if stack is None else sorted(patch.id for patch in stack.patches)
    found = []
    for row in rows:
        folder = Path(row["folder"])
        try:
            record = BuildRecord.read(folder) if os.path.isdir(folder) else None
        except PatchkitError:
            found.append(Build(str(folder), "damaged"))
            continue
        if record is None:
            state = "gone"
        elif not record.finished:
            state = "unfinished"
        elif not looks_whole(folder, record):
            state = "damaged"
        elif repository.catalogue.written_since(folder):
            state = "perhaps altered"
        elif wanted is None:
            state = "not known"
        else:
            same = (
                record.base == base and list(record.patches) == wanted
            )  # two empty stacks are alike but for it
            state = "up to date" if same else "behind"
        found.append(Build(str(folder), state))
    return found
