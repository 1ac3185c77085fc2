"""Everything hashed again: Git's data, every patch in it, the work tree, the base, the builds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.build_record import verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, PatchkitError
from patchkit.gitcheck import fsck_git, fsck_worktree
from patchkit.problem import Problem
from patchkit.stack import problems

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["fsck"]

Progress = Callable[[str, int, int], None] | None


def fsck(repository: Repository, *, progress: Progress = None) -> list[Problem]:
    """Every byte that is not as it was written, and everything that keeps HEAD from being believed."""
    found = fsck_git(repository.store)
    try:
        found += fsck_worktree(repository.store)
        found += [problem for problem in problems(repository.store) if problem not in found]
        found += _base(repository, _told(progress, "base"))
    except PatchkitError as error:
        if not found:  # what fsck_git found already is why the rest cannot be read
            found.append(Problem(str(repository.store.folder), error.message, "see patchkit status"))
    for row in repository.catalogue.builds():
        folder = Path(row["folder"])
        if os.path.lexists(folder):
            lines = verify_build(folder, progress=_told(progress, "build"))
            found += [
                Problem(str(folder), line.removeprefix(f"{folder}: "), "patchkit build") for line in lines
            ]
    return found


def _base(repository: Repository, progress: Callable[[int, int, str], None] | None) -> list[Problem]:
    """The base hashed anew, where this machine has it."""
    place = repository.store.config_get(repository.store.base_key)
    if place is None or not os.path.isdir(place):
        return []
    remedy = "get the checkpoint again, or name another copy: patchkit base PATH"
    try:
        found = Checkpoint.open(Path(place)).fingerprint(progress)
    except BadInput as error:
        return [Problem(place, error.message.removeprefix(f"{place}: "), remedy)]
    if found != repository.settings.base_fingerprint:
        return [Problem(place, "is not the base that patchkit.toml names any more", remedy)]
    return []


def _told(progress: Progress, phase: str) -> Callable[[int, int, str], None] | None:
    return None if progress is None else lambda done, total, what: progress(phase, done, total)
