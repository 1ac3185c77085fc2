"""What `fsck --full` derives again: every version's id from its numbers, every edited tensor of builds.

An edited tensor is materialised anew from the base and the patches that the build's record names, and
its hash compared with the build's bytes: a build whose record was made to fit its bytes is found too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from patchkit.actions.versions import Versions
from patchkit.algebra.factors import Patch
from patchkit.algebra.rounding import materialise
from patchkit.builds.build import stacked
from patchkit.builds.record import BuildRecord
from patchkit.canonical import hash_bytes
from patchkit.checkpoint import Checkpoint, hash_range
from patchkit.errors import PatchkitError
from patchkit.git.store import GitStore
from patchkit.problem import Problem
from patchkit.stack import read_patch

__all__ = ["patches_of", "recheck_build", "recheck_patches", "wrong_tensors"]

Progress = Callable[[str, int, int], None] | None

_REBUILD = "bring it in line: patchkit fsck --repair"


def recheck_patches(store: GitStore, found: Versions, progress: Progress = None) -> Iterator[Problem]:
    """Versions whose files do not come out as they are when they are spelled again from their numbers."""
    for number, stored in enumerate(found.patches.values(), 1):
        try:
            if read_patch(store, stored).id != stored.id:
                yield Problem(
                    f"patches/{stored.name} ({stored.id[:12]}…)",
                    "is not spelled as its numbers are: its id cannot be derived again",
                    "put another version in its place: git checkout COMMIT -- FOLDER",
                )
        except PatchkitError as error:
            yield Problem(f"patches/{stored.name} ({stored.id[:12]}…)", str(error), "restore it from a clone")
        if progress is not None:
            progress("numbers", number, len(found.patches))


def patches_of(store: GitStore, record: BuildRecord, found: Versions) -> list[Patch] | None:
    """The patches in a build, read and checked; None where Git does not hold all of them any more."""
    if not set(record.patches) <= found.patches.keys():
        return None
    return [read_patch(store, found.patches[version]) for version in record.patches]


def recheck_build(
    store: GitStore,
    folder: Path,
    checkpoint: Checkpoint | None,
    found: Versions,
    progress: Progress = None,
) -> Iterator[Problem]:
    """What of a finished build is not base + patches; ``checkpoint``: the base, None where it is not here."""
    try:
        record = BuildRecord.read(folder)
        if record is None or not record.finished:
            return  # `verify_build` says so
        if checkpoint is None or checkpoint.fingerprint() != record.base:
            remedy = "say where its base is: patchkit base PATH"
            yield Problem(str(folder), "cannot be computed again: its base is not at hand", remedy)
            return
        patches = patches_of(store, record, found)
        if patches is None:
            message = "cannot be computed again: no branch or tag holds all of its patches"
            yield Problem(str(folder), message, "build again: patchkit build")
            return
        for name in wrong_tensors(checkpoint, patches, folder, record, progress):
            message = f"tensor {name!r} is not the base with the build's patches on it"
            yield Problem(str(folder), message, _REBUILD)
    except PatchkitError as error:
        yield Problem(str(folder), error.message.removeprefix(f"{folder}: "), _REBUILD)


def wrong_tensors(
    checkpoint: Checkpoint,
    patches: Sequence[Patch],
    folder: Path,
    record: BuildRecord,
    progress: Progress = None,
) -> list[str]:
    """Tensors of a build whose bytes are not what base and patches give: computed again where one is
    edited, the base's hash elsewhere. Those of files that are not there, or too short, count as wrong."""
    deltas = stacked(patches)
    wrong = []
    for number, (name, (file, info)) in enumerate(checkpoint.tensors.items(), 1):
        wanted = record.tensors.get(name)
        if name in deltas:
            weight = materialise(checkpoint.read(name), deltas[name], name)
            wanted = hash_bytes(weight.contiguous().view(torch.uint8).numpy().tobytes())
        try:
            right = hash_range(folder / file, info.start, info.end) == wanted
        except PatchkitError:
            right = False
        if not right:
            wrong.append(name)
        if progress is not None:
            progress("computing again", number, len(checkpoint.tensors))
    return wrong
