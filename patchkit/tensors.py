"""The safetensors format, read as what a stranger sent: every claim is checked before belief.

Promises: `read_header` raises `BadInput` (one line) or returns ranges that lie inside the file,
do not overlap, leave no byte unclaimed, and match their dtype and shape; it reads the header and
nothing else, and allocates no more than the file's own size. `to_bytes` spells a file in the one way
that the safetensors library does (header first, by dtype size, then name), the same on every run.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from patchkit.canonical import strict_json
from patchkit.errors import BadInput
from patchkit.files import reading

__all__ = [
    "DTYPE_BITS",
    "TensorFile",
    "TensorInfo",
    "head_of",
    "header_of",
    "header_of_file",
    "in_order",
    "read_header",
    "to_bytes",
]

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_NAME = 1024
_MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: dtype as safetensors spells it, and its absolute byte range [start, end) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A header: the tensors by name, the metadata, the header's own length and the file's, in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    data_start: int


def read_header(file: BinaryIO, size: int, name: str, most: int = _MAX_HEADER) -> TensorFile:
    """Read and check the header of a safetensors file of ``size`` bytes; ``name`` is for messages.

    A header of over ``most`` bytes is not read: as objects it could take thirty times that.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise BadInput(f"{name}: is not a safetensors file (too short); get the file again")
    if prefix == b"version ":
        raise BadInput(f"{name}: is a pointer of Git LFS, not the file; get the file: git lfs pull")
    length = int.from_bytes(prefix, "little")
    if most < length <= size - 8:
        raise BadInput(f"{name}: its header of {length} bytes is over the limit of {most}")
    if length > size - 8:
        raise BadInput(f"{name}: is cut short or not a safetensors file (its header claims {length} bytes)")
    raw = file.read(length)
    if len(raw) < length or not raw.startswith(b"{"):
        raise BadInput(f"{name}: is not a safetensors file (no header); get the file again")
    try:
        header = strict_json(raw)
    except ValueError as error:
        raise BadInput(f"{name}: the header is not JSON that can be believed ({_one_line(error)})") from None
    metadata = _metadata(header.pop(_METADATA, {}), name)
    start = 8 + length
    tensors = {key: _tensor(key, value, start, name) for key, value in header.items()}
    _check_cover(tensors, start, size, name)
    return TensorFile(tensors, metadata, size, start)


def header_of(data: bytes, name: str) -> TensorFile:
    """The header of a whole file held in memory."""
    return read_header(io.BytesIO(data), len(data), name)


def header_of_file(path: Path, most: int = _MAX_HEADER) -> TensorFile:
    """The header of a file (links followed); `NotFound` when it cannot be read."""
    with reading(path) as file:
        return read_header(file, os.fstat(file.fileno()).st_size, str(path), most)


def to_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: Mapping[str, str]) -> bytes:
    """Spell a safetensors file. ``tensors``: name -> (dtype, shape, little-endian bytes).

    At most one metadata key: the format promises no order for more, and equal patches must be equal bytes.
    """
    shapes = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    return b"".join([head_of(shapes, metadata), *(tensors[name][2] for name in in_order(shapes))])


def in_order(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The names in the order of their bytes: by dtype size, then name."""
    return sorted(shapes, key=lambda name: (-DTYPE_BITS[shapes[name][0]], name))


def head_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors' bytes. ``shapes``: name -> (dtype, shape)."""
    if len(metadata) > 1:
        raise ValueError("more than one metadata key has no one spelling")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name in in_order(shapes):
        dtype, shape = shapes[name]
        end = offset + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def _metadata(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadInput(f"{name}: the header's metadata is not a table of text")
    return value


def _tensor(key: str, value: Any, start: int, name: str) -> TensorInfo:
    where = f"{name}: tensor {_quoted(key)}"
    if not key or len(key) > _MAX_NAME or not key.isprintable():
        raise BadInput(f"{where} has a name that cannot be used")
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise BadInput(f"{where} does not have exactly a dtype, a shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadInput(f"{where} has the unknown dtype {_quoted(str(dtype))}; patchkit may be too old")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise BadInput(f"{where} has a shape that is not a list of counts")
    if not _counts(offsets) or len(offsets) != 2:
        raise BadInput(f"{where} has offsets that are not two counts")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise BadInput(f"{where} has {end - begin} bytes, which is not what its shape and dtype need")
    return TensorInfo(key, dtype, tuple(shape), start + begin, start + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_cover(tensors: dict[str, TensorInfo], start: int, size: int, name: str) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != at:
            raise BadInput(f"{name}: tensor {_quoted(tensor.name)} overlaps another or leaves a gap")
        at = tensor.end
    if at != size:
        what = "is cut short" if at > size else "has bytes that no tensor claims"
        raise BadInput(f"{name}: {what} ({size} bytes, the header describes {at}); get the file again")


def _quoted(text: str) -> str:
    """Untrusted text for a message: short, on one line, no control characters."""
    shown = text if len(text) <= 80 else text[:77] + "..."
    return repr(shown)


def _one_line(error: ValueError) -> str:
    return "".join(c if c.isprintable() else " " for c in str(error))[:120]
