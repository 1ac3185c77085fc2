"""Rewrites tensors of a build where they stand, from the base's bytes and the updates of a stack.

Rows are read, edited, written where they differ and forgotten, so that memory does not grow with the
model. Tensors are independent of one another: as many are worked on at once as torch has threads, and
the bytes do not depend on that (`rounding`). A base that is not what its hash says is found when the last
row of a tensor has been read: until `rewrite` has returned, what was written is not to be believed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from patchkit.algebra.factors import Delta
from patchkit.algebra.rounding import materialise_rows
from patchkit.algebra.threads import side_by_side
from patchkit.checkpoint import Checkpoint, as_tensor
from patchkit.errors import BadInput
from patchkit.files import reading, sync

__all__ = ["rewrite"]

_PIECE = 8 << 20  # bytes of a tensor in memory at once


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    tensors: Mapping[str, str],
    deltas: Mapping[str, Sequence[Delta]],
    done: Callable[[int], None],
) -> dict[str, str]:
    """Write the ``tensors`` (name -> hash of the base's bytes) of ``out``'s files; the edited ones' hashes.

    Tensors without ``deltas`` become the base's again. ``done`` is told the bytes of each that is written;
    their files are synced. `BadInput` for a base that is not what its hash says, or an edit that overflows.
    """

    def one(name: str) -> str:
        return _Tensor(checkpoint, out, name, deltas.get(name, ())).write(tensors[name])

    hashes = {}
    with side_by_side(len(tensors)) as each:
        for name, digest in zip(tensors, each(one, tensors), strict=True):
            done(checkpoint.tensors[name][1].size)
            if name in deltas:
                hashes[name] = digest
    return hashes


class _Tensor:
    """One tensor of the base, on its way to the same place in a build's file."""

    def __init__(self, checkpoint: Checkpoint, out: Path, name: str, deltas: Sequence[Delta]) -> None:
        file, self.info = checkpoint.tensors[name]
        self.name = name
        self.source, self.target = checkpoint.folder / file, out / file
        self.deltas = deltas

    def write(self, wanted: str) -> str:
        """Every row, in order; the hash of what was written. `BadInput` unless the base's is ``wanted``."""
        base, written = hashlib.sha256(), hashlib.sha256()
        with _writing(self.target) as handle:
            at = self.info.start
            for first, data in self._rows():
                base.update(data)
                if self.deltas:
                    data = self._edited(data, first)
                    written.update(data)
                if not self.deltas or os.pread(handle, len(data), at) != data:
                    _put(handle, at, data)
                at += len(data)
            sync(handle)
        if base.hexdigest() != wanted:
            raise BadInput(f"{self.source}: {self.name!r} is not what the base's fingerprint stands for")
        return written.hexdigest()

    def _rows(self) -> Iterator[tuple[int, memoryview]]:
        """Number of the first row, and some rows' bytes, which the next ones take the place of."""
        width = max(1, self.info.size // max(1, *self.info.shape[:1], 1))
        step = max(1, _PIECE // width) * width
        piece = memoryview(bytearray(min(step, self.info.size)))
        with reading(self.source) as source:
            source.seek(self.info.start)
            for start in range(0, self.info.size, step):
                data = piece[: self.info.size - start]
                if source.readinto(data) != len(data):
                    message = "is shorter than its header says; get the checkpoint again"
                    raise BadInput(f"{self.source}: {message}")
                yield start // width, data

    def _edited(self, data: memoryview, first: int) -> memoryview:
        part = replace(self.info, shape=(-1, *self.info.shape[1:]))
        weight = materialise_rows(as_tensor(data, part), self.deltas, first, self.name)
        return weight.view(torch.uint8).numpy().data.cast("B")


@contextmanager
def _writing(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def _put(handle: int, start: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(handle, data, start)
        start, data = start + count, data[count:]
