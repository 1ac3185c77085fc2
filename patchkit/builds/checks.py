"""What a build refuses before it writes anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from patchkit.algebra.factors import Patch
from patchkit.algebra.rounding import FORMATS
from patchkit.builds.record import BUILD_RECORD, BuildRecord, Edited
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, WouldOverwrite
from patchkit.files import is_temporary, writing

__all__ = ["check_build", "check_place", "refuse_other_base", "shapes_of"]

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check_build(
    checkpoint: Checkpoint, patches: Mapping[str, Patch], out: Path, edited: Edited | None = None
) -> None:
    """Whether ``patches`` (by id) fit the base, and may be built in ``out``, a real path.

    `BadInput`, or `WouldOverwrite` for a folder that is not missing, empty, or a build.
    """
    check_place(checkpoint, out)
    _check_fit(checkpoint, patches, edited or shapes_of(patches))
    with writing(out):
        _check_claim(out)


def refuse_other_base(old: BuildRecord | None, base: str, out: Path) -> None:
    """`WouldOverwrite` where the build that is there is of another base."""
    if old is not None and old.base != base:
        raise WouldOverwrite(f"{out}: holds a build of another base; remove it or name another folder")


def shapes_of(patches: Mapping[str, Patch]) -> Edited:
    """The tensors that each patch edits, with their shapes in the base's files."""
    return {
        number: {
            name: delta.shape[::-1] if delta.transposed else delta.shape
            for name, delta in patch.deltas.items()
        }
        for number, patch in patches.items()
    }


def check_place(checkpoint: Checkpoint, out: Path) -> None:
    """BadInput where a build at ``out`` (a real path) would write into the base, or around it."""
    base = Path(os.path.realpath(checkpoint.folder))
    if out == base or base in out.parents or out in base.parents:
        raise BadInput(f"{out}: is the base, or inside it, or around it; name a folder elsewhere")


def _check_claim(out: Path) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise WouldOverwrite(f"{out}: is a file; name a folder")
    names = {path.name for path in out.iterdir() if not is_temporary(path.name)}
    if names and BUILD_RECORD not in names:
        raise WouldOverwrite(f"{out}: holds files that are no build of patchkit's; name another folder")


def _check_fit(checkpoint: Checkpoint, patches: Mapping[str, Patch], edited: Edited) -> None:
    for number in patches:
        for weight, shape in edited[number].items():
            if weight not in checkpoint.tensors:
                what = f"{checkpoint.folder} has no {weight!r}"
                raise BadInput(f"{patches[number].name}: {what}; it is another model's patch")
            _, info = checkpoint.tensors[weight]
            if info.shape != shape or _STORED.get(info.dtype) not in FORMATS:
                what = f"{weight!r} is {info.dtype} {list(info.shape)}, not a float {list(shape)}"
                raise BadInput(f"{patches[number].name}: {what}; it is another model's patch")
