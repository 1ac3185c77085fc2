"""Everything hashed again: Git's data, the patches of the whole history, the work tree, the base, the builds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.build import verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.errors import PatchkitError
from patchkit.gitcheck import fsck_git
from patchkit.problem import Problem

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["fsck"]

Progress = Callable[[str, int, int], None] | None


def fsck(repository: Repository, *, progress: Progress = None) -> list[Problem]:
    """Every byte that is not as it was written, and everything that keeps HEAD from being believed."""
    def told(phase: str) -> Callable[[int, int, str], None] | None:
        return None if progress is None else lambda done, total, what: progress(phase, done, total)

    found = list(fsck_git(repository.store))
    found += [problem for problem in repository.problems() if problem not in found]
    found += _base(repository, told("base"))
    for row in repository.catalogue.builds():
        folder = Path(row["folder"])
        if os.path.lexists(folder):
            lines = verify_build(folder, progress=told("build"))
            found += [Problem(str(folder), line.removeprefix(f"{folder}: "), "patchkit build") for line in lines]
    return found
