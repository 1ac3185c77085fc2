"""The tensors of PyTorch's own files, read without running a pickle's code, as safetensors files.

Promises: ``torch.load`` is only ever called with ``weights_only=True`` and ``mmap=True``, so a file
that needs more than tensors is refused before anything of it runs, and no more than one tensor is in
memory at once; dtypes, shapes and bytes are those of the file; a weight that the model's class ties
to another and that equals it is stored once, under the name that transformers keeps.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.checkpoint import INDEX, SINGLE, matching_names
from patchkit.errors import BadInput
from patchkit.files import writing
from patchkit.models.loading import read_config, without_weights
from patchkit.models.pickles import shards_of
from patchkit.tensors import head_of, in_order

__all__ = ["unpickle"]

_PIECE = 8 << 20
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def unpickle(source: Path, folder: Path, tell: Callable[[int, int], None]) -> None:
    """Write ``source``'s tensors into ``folder``: one file, or as many as ``source`` has and an index.

    ``tell`` is told (bytes done, bytes in all). BadInput names the file that cannot be believed.
    """
    shards, said = shards_of(source)
    tables = {file: _read(source / file) for file in shards}
    _check_index(tables, said)
    _leave_out_twins(tables, _tied(source))
    total = sum(tensor.nbytes for table in tables.values() for tensor in table.values())
    done = 0
    written: dict[str, str] = {}
    parts = [table for table in tables.values() if table]
    for number, table in enumerate(parts, 1):
        name = SINGLE if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        with writing(folder / name), open(folder / name, "xb") as file:
            for piece in _spelled(table):
                file.write(piece)
                done += len(piece)
                tell(min(done, total), total)
        written |= dict.fromkeys(table, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _read(path: Path) -> dict[str, Tensor]:
    """The table of tensors in a file, mapped and not read."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise BadInput(
                f"{path.name}: is broken, or from before PyTorch 1.6; get it again, or load it with "
                "torch.load(…, weights_only=True) and torch.save it"
            )
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is no plain table"
        raise BadInput(
            f"{path.name}: holds more than tensors ({what}), which could run code; refused; choose a "
            "checkpoint in safetensors"
        ) from error
    except Exception as error:  # a zip file that is cut or torn fails in many ways
        reason = " ".join(str(error).split())[:100]
        raise BadInput(f"{path.name}: cannot be read ({reason}); get it again") from error
    return _checked(table, path.name)


def _checked(table: Any, file: str) -> dict[str, Tensor]:
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{file}: is no table of tensors; name a checkpoint that transformers can load")
    for name, tensor in table.items():
        plain = isinstance(name, str) and isinstance(tensor, Tensor)
        if not plain or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise BadInput(
                f"{file}: {str(name)[:80]!r} is no plain tensor ({what}); choose another checkpoint"
            )
    return {name: tensor.detach() for name, tensor in table.items()}


def _check_index(tables: Mapping[str, Mapping[str, Tensor]], said: Mapping[str, str]) -> None:
    """Each name stands in one file, and in the one that the index names."""
    seen: dict[str, str] = {}
    for file, table in tables.items():
        for name in table:
            if name in seen:
                raise BadInput(f"{file}: {name!r} is in {seen[name]} too; get the checkpoint again")
            seen[name] = file
    for name, file in said.items():
        if seen.get(name) != file:
            raise BadInput(f"{file}: lacks {name!r}, which the index names; get the checkpoint again")


def _tied(source: Path) -> dict[str, str]:
    """By the name of each weight that the model's class ties to another: that other's name."""
    return dict(without_weights(read_config(source), source).all_tied_weights_keys)


def _leave_out_twins(tables: Mapping[str, dict[str, Tensor]], tied: Mapping[str, str]) -> None:
    """Take out what is tied and equal; what only happens to be equal stays."""
    places = {name: table for table in tables.values() for name in table}
    for twin, kept in tied.items():
        for name in matching_names(twin, places):
            others = [other for other in matching_names(kept, places) if other != name]
            if any(torch.equal(places[name][name], places[other][other]) for other in others):
                del places.pop(name)[name]


def _spelled(table: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: its head, then each tensor's bytes in the head's order."""
    shapes = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in table.items()}
    yield head_of(shapes, {"format": "pt"})
    for name in in_order(shapes):
        data = table[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]
