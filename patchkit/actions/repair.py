"""Mends what `fsck` finds where nothing can be lost by it, and says of the rest why it was left.

Mended: the catalogue (derived again; what was measured is kept), builds (their tensors written again),
what a killed patchkit left, altered answers of evaluations (removed). Never touched: Git's objects,
references and locks, and the user's files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.catalogue_check import check_catalogue, compare_catalogue
from patchkit.actions.fsck import base_at_hand, build_folders, fsck
from patchkit.actions.versions import Reached, Versions, reached, versions
from patchkit.builds.record import BuildRecord, verify_build
from patchkit.canonical import canonical_json, hash_bytes
from patchkit.database.beliefs import put_patches
from patchkit.errors import PatchkitError
from patchkit.evaluation.answers import FOLDER
from patchkit.files import is_temporary, writing
from patchkit.git.writers import INCOMING, LOCK, writers_lock
from patchkit.problem import Problem
from patchkit.stack import read_patch

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Repair", "repair"]

Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Repair:
    """One problem, whether it is no more, and what was done or why nothing was."""

    problem: Problem
    mended: bool
    what: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.problem.to_dict(), "mended": self.mended, "what": self.what}


def repair(repository: Repository, *, full: bool = False, progress: Progress = None) -> list[Repair]:
    """Check as `fsck` does, mend what can be mended, and tell what became of each problem."""
    found = fsck(repository, full=full, progress=progress)
    mender = _Mender(repository, progress)
    done = mender.leftovers()  # first: a lock that is held stops the rest
    return done + [mender.mend(problem) for problem in found]


class _Mender:
    """Knows by a problem's place who can mend it; what was mended once is not mended again."""

    def __init__(self, repository: Repository, progress: Progress) -> None:
        self.repository, self.store, self.progress = repository, repository.store, progress
        self.builds = {str(folder): folder for folder in build_folders(repository)}
        self.outcomes: dict[str, tuple[bool, str]] = {}

    @cached_property
    def reached(self) -> Reached:
        return reached(self.store, progress=self.progress)

    @cached_property
    def versions(self) -> Versions:
        return versions(self.store, self.reached, self.progress)

    def mend(self, problem: Problem) -> Repair:
        """The outcome for one problem of `fsck`."""
        if problem.path == str(self.repository.catalogue.path) and problem.remedy != "update patchkit":
            how = self._catalogue
        elif problem.path in self.builds:
            how = self._build
        elif Path(problem.path).parent == self.store.private / FOLDER:
            how = self._answers
        else:
            return Repair(problem, False, f"it is not patchkit's to change; {problem.remedy}")
        if problem.path not in self.outcomes:
            try:
                self.outcomes[problem.path] = how(problem.path)
            except PatchkitError as error:
                self.outcomes[problem.path] = False, error.message
        return Repair(problem, *self.outcomes[problem.path])

    def leftovers(self) -> list[Repair]:
        """What a killed patchkit left goes; a lock of Git's stays, since nothing proves that it is stale."""
        found = [problem for problem in self.store.leftovers() if os.path.isabs(problem.path)]
        ours = [problem for problem in found if self._is_ours(Path(problem.path))]
        done = []
        if ours:
            with writers_lock(self.store):  # nobody else writes, and what a killed writer staged is gone
                done = [_clear(problem, Path(problem.path)) for problem in ours]
        for problem in found:
            if problem.path.endswith((".lock", "packed-refs.new", f"/{LOCK}")):
                why = f"nothing proves that no command holds it; where none runs: {problem.remedy}"
                done.append(Repair(problem, False, why))
        return done

    def _is_ours(self, path: Path) -> bool:
        temporary = path.parent == self.store.folder and is_temporary(path.name)
        return temporary or path == self.store.private / INCOMING

    def _answers(self, path: str) -> tuple[bool, str]:
        with writing(Path(path)):
            Path(path).unlink(missing_ok=True)
        return True, "removed; the next evaluation asks the model again"

    def _catalogue(self, path: str) -> tuple[bool, str]:
        catalogue = self.repository.catalogue
        damaged = bool(check_catalogue(self.repository))
        if not damaged:
            self._write_versions()
        counts = catalogue.reindex(self.store, anew=damaged)
        left = check_catalogue(self.repository)
        left = left or compare_catalogue(self.repository, self.reached, self.versions)
        if left:
            return False, f"was derived again from Git, and still {left[0].message}"
        kept = counts.get("measurements taken over")
        if kept is None:
            return True, "derived again from Git; what was measured is as it was"
        return True, f"put aside and derived again from Git; {kept} measured rows could be read and were kept"

    def _write_versions(self) -> None:
        """The rows of every version that a reference reaches, on whichever branch, written anew."""
        patches = list(self.versions.patches.values())
        norms = {stored.id: read_patch(self.store, stored).norms() for stored in patches}
        with self.repository.catalogue.writing() as db:
            for stored in patches:
                for table in ("facts", "layers"):
                    db[table].delete_where("patch = ?", [stored.id])
            put_patches(db, patches)
            for version, told in norms.items():
                rows = ({"patch": version, "weight": name, "norm": norm} for name, norm in told.items())
                db["layers"].upsert_all(rows, pk=("patch", "weight"))

    def _build(self, path: str) -> tuple[bool, str]:
        from patchkit.actions.recheck import patches_of, wrong_tensors
        from patchkit.builds.mending import mend_build

        folder = self.builds[path]
        record = self._record(folder)
        if record is None:
            return False, "its record cannot be read here or in the catalogue; remove it and build again"
        checkpoint = base_at_hand(self.repository)
        if checkpoint is None or checkpoint.fingerprint() != record.base:
            return False, "its base is not at hand or is altered; say where it is: patchkit base PATH"
        patches = patches_of(self.store, record, self.versions)
        if patches is None:
            return False, "no branch or tag holds all of its patches; remove it and build again"
        wrong = wrong_tensors(checkpoint, patches, folder, record, self.progress)
        by_id = {patch.id: patch for patch in patches}
        new = mend_build(checkpoint, by_id, folder, record, wrong)
        if left := verify_build(folder):
            return False, left[0].removeprefix(f"{folder}: ")
        row = next((row for row in self.repository.catalogue.builds() if row["folder"] == path), None)
        if row is not None:
            self.repository.catalogue.record_build(folder, row["tree"], new, new.fingerprint(checkpoint))
        count = len(wrong)
        return True, f"brought in line: {count} tensor{'' if count == 1 else 's'} written again"

    def _record(self, folder: Path) -> BuildRecord | None:
        """The build's own record, or the one that the catalogue keeps of it."""
        try:
            if (found := BuildRecord.read(folder)) is not None:
                return found
        except PatchkitError:
            pass
        for row in self.repository.catalogue.builds():
            if row["folder"] == str(folder):
                value = row["record"]
                data = canonical_json({**value, "sha256": hash_bytes(canonical_json(value))}) + b"\n"
                try:
                    return BuildRecord.from_bytes(data, str(folder))
                except PatchkitError:
                    return None
        return None


def _clear(problem: Problem, path: Path) -> Repair:
    """With the writers' lock held: remove a temporary file or folder that a killed writer left."""
    if path.name != INCOMING and path.is_dir() and not path.is_symlink():
        if (path / ".git").exists() or not any(path.iterdir()):
            return Repair(problem, False, f"a clone may be on its way there; else: {problem.remedy}")
        with writing(path):
            shutil.rmtree(path)
    elif path.name != INCOMING:
        with writing(path):
            path.unlink(missing_ok=True)
    return Repair(problem, True, "removed")
