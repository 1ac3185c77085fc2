"""Everything hashed again: Git's data, every patch in it, the work tree, the base, the builds.

With `full`, what can be derived is derived again too: ids, the edited tensors of builds, the catalogue.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.actions.base import at_hand, placed
from patchkit.actions.catalogue_check import check_catalogue, compare_catalogue
from patchkit.actions.versions import reached, versions
from patchkit.builds.record import BUILD_RECORD, verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.errors import PatchkitError
from patchkit.evaluation.answers import FOLDER, kept_answers, read_answers
from patchkit.files import is_held
from patchkit.git.check import fsck_git, fsck_worktree
from patchkit.git.locks import being_written
from patchkit.git.store import GitStore
from patchkit.git.writers import PATIENCE
from patchkit.problem import Problem, one_line
from patchkit.stack import problems

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["base_at_hand", "base_problems", "build_folders", "fsck", "undisturbed", "without_base"]

Progress = Callable[[str, int, int], None] | None
_MEND_BUILD = "patchkit fsck --repair"  # patchkit build believes a record where no file's time changed


def fsck(repository: Repository, *, full: bool = False, progress: Progress = None) -> list[Problem]:
    """Every byte that is not as it was written, and everything that keeps HEAD from being believed."""
    store = repository.store
    found = undisturbed(store)
    base: list[Problem] = []
    try:
        base = _base(repository, _told(progress, "base"))
    except PatchkitError as error:
        if not found:
            found.append(Problem(str(store.folder), error.message, "see patchkit status"))
    found += base
    catalogue = check_catalogue(repository)
    found += [*catalogue, *_answers(store)]
    for folder in _settled_builds(repository):
        lines = verify_build(folder, progress=_told(progress, "build"))
        if is_held(folder):
            continue  # begun meanwhile
        found += [Problem(str(folder), line.removeprefix(f"{folder}: "), _MEND_BUILD) for line in lines]
    if full:
        try:
            found += _derived(repository, not base, not catalogue, progress)
        except PatchkitError as error:
            found.append(
                Problem(str(store.folder), f"cannot be derived again ({error.message})", "mend that first")
            )
    return list(dict.fromkeys(found))


def undisturbed(store: GitStore, *, here: bool = True) -> list[Problem]:
    """What is wrong while nobody writes: half of another command's commit is no damage.

    Without ``here`` of Git's data alone, whatever is checked out.
    """
    until = time.monotonic() + PATIENCE
    while True:
        still = not being_written(store)
        before = _references(store)
        found = _of_git(store) if here else fsck_git(store)
        still = still and not being_written(store) and _references(store) == before
        if not found or still or time.monotonic() > until:
            return found
        time.sleep(0.05)


def _references(store: GitStore) -> bytes | None:
    """Where HEAD and every reference are; None where Git cannot say."""
    try:
        names = store.git.read("for_each_ref", "--format=%(objectname) %(refname)")
        return b"%s %s" % ((store.head() or "").encode(), names)
    except PatchkitError:
        return None


def _of_git(store: GitStore) -> list[Problem]:
    found = fsck_git(store)
    try:
        found += fsck_worktree(store)
        found += [problem for problem in problems(store) if problem not in found]
    except PatchkitError as error:
        if not found:  # what fsck_git found already is why the rest cannot be read
            found.append(Problem(str(store.folder), error.message, "see patchkit status"))
    return found


def build_folders(repository: Repository) -> list[Path]:
    """The builds that are there: those that the catalogue knows, and the default one.

    A folder without a record is one only where its weights are still those that were built: else it was taken
    away, and what lies there now is somebody's own.
    """
    catalogue = repository.catalogue
    try:
        listed = [Path(row["folder"]) for row in catalogue.builds()]
        known = [
            folder
            for folder in listed
            if os.path.lexists(folder / BUILD_RECORD) or catalogue.known_fingerprint(folder) is not None
        ]
    except (PatchkitError, ValueError):  # `check_catalogue` says why
        known = []
    default = Path(os.path.realpath(repository.build_folder))
    if os.path.lexists(default / BUILD_RECORD):
        known.append(default)
    return [folder for folder in dict.fromkeys(known) if os.path.lexists(folder)]


def _settled_builds(repository: Repository) -> list[Path]:
    """Those that no other command is writing: half of its build is no damage."""
    return [folder for folder in build_folders(repository) if not is_held(folder)]


def _answers(store: GitStore) -> list[Problem]:
    """What evaluations kept; an altered file is never believed, so that to lose it costs a computation."""
    found = []
    for path in kept_answers(store.private / FOLDER):
        try:
            read_answers(path)
        except (PatchkitError, ValueError) as error:
            message = f"kept answers of an evaluation: {one_line(str(error))}"
            found.append(Problem(str(path), message, f"rm -rf -- {shlex.quote(str(path))}"))
    return found


def base_at_hand(repository: Repository) -> Checkpoint | None:
    """The base where this machine has it; None also for one that is not what patchkit.toml names."""
    try:
        wanted = repository.settings.base_fingerprint
        place = at_hand(repository, repository.settings)
        found = Checkpoint.open(place) if place else None
        right = found is not None and found.fingerprint() == wanted
    except PatchkitError:
        return None
    return found if right else None


def _derived(
    repository: Repository, base_is_right: bool, catalogue_is_whole: bool, progress: Progress
) -> list[Problem]:
    from patchkit.actions.recheck import recheck_build, recheck_patches

    store = repository.store
    everything = reached(store, progress=progress)
    known = versions(store, everything, progress)
    found = [*known.problems, *recheck_patches(store, known, progress)]
    if base_is_right:
        checkpoint = base_at_hand(repository)
        for folder in _settled_builds(repository):
            found += recheck_build(store, folder, checkpoint, known, progress)
    if catalogue_is_whole:
        found += compare_catalogue(repository, everything, known, progress)
    return found


def _base(repository: Repository, progress: Callable[[int, int, str], None] | None) -> list[Problem]:
    """The base hashed anew, where this machine has it."""
    wanted = repository.settings.base_fingerprint
    place = at_hand(repository, repository.settings)
    return base_problems(str(place), wanted, progress) if place else []


def without_base(repository: Repository) -> str | None:
    """Why `fsck` did not look at the base; None where it did."""
    try:
        if at_hand(repository, repository.settings):
            return None
        place = placed(repository, repository.settings.base_fingerprint)
    except PatchkitError as error:
        return error.message
    return f"it is not at {place} any more" if place else "nobody said where it lies on this machine"


def base_problems(
    place: str, fingerprint: str, progress: Callable[[int, int, str], None] | None
) -> list[Problem]:
    """What keeps the checkpoint in ``place`` from being the base of this fingerprint."""
    remedy = "get the checkpoint again, or name another copy: patchkit base PATH"
    try:
        found = Checkpoint.open(Path(place)).fingerprint(progress)
    except PatchkitError as error:
        return [Problem(place, error.message.removeprefix(f"{place}: "), remedy)]
    if found != fingerprint:
        return [Problem(place, "is not the base that patchkit.toml names any more", remedy)]
    return []


def _told(progress: Progress, phase: str) -> Callable[[int, int, str], None] | None:
    return None if progress is None else lambda done, total, what: progress(phase, done, total)
