"""A base: a folder of safetensors weights, opened, fingerprinted and read, never written.

Promises: `Checkpoint.open` reads headers only and refuses what cannot be edited or believed, in one
line with a way out; the fingerprint stands for the tensors' names, dtypes, shapes and bytes and
for nothing else, so that sharding and file names do not matter to it; `as_read` adds the files beside
them, such as config.json, for what was computed with the model. torch is imported only to
hand out a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.canonical import canonical_json, hash_bytes, hash_file, strict_json
from patchkit.errors import BadInput, NotFound
from patchkit.files import reading
from patchkit.tensors import DTYPE_BITS, TensorFile, TensorInfo, header_of_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "Progress",
    "check_config",
    "fingerprint_of",
    "has_safetensors",
    "hash_range",
    "is_weights",
    "matching_names",
    "read_range",
    "weight_map",
]

Progress = Callable[[int, int, str], None] | None
"""Told (bytes done, bytes in all, what is being done)."""

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ADAPTER = "adapter_config.json"

_PIECE = 8 << 20
_MAX_JSON = 256 << 20
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pkl|gguf|h5|keras|pb|tflite|msgpack|ot|npz|nemo|mlmodel|onnx([._]data)?)$"
)
_READ = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
"""Files beside the weights that say how text becomes tokens and tokens become numbers."""
_EDITABLE = ("F32", "BF16", "F16")
_QUANTISED = ("quantization_config", "compression_config")
_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "transformer.",
    "gpt_neox.",
    "model.",
    "",
)


class Checkpoint:
    """The weights in a folder. ``tensors``: by stored name, the file that holds it and where."""

    def __init__(self, folder: Path, files: dict[str, TensorFile], fingerprint: str | None = None) -> None:
        self.folder = folder
        self.files = files
        self.tensors: dict[str, tuple[str, TensorInfo]] = {}
        for file, header in files.items():
            for name, info in header.tensors.items():
                if name in self.tensors:
                    raise BadInput(
                        f"{folder}: {name!r} is in {file} and in {self.tensors[name][0]}; keep one"
                    )
                self.tensors[name] = (file, info)
        self._hashes: dict[str, str] | None = None
        self._reading: str | None = None
        self._believed = fingerprint

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None = None) -> Checkpoint:
        """Open a folder of one safetensors file, or of shards and their index.

        ``fingerprint``: what is already known of this folder, so that it need not be hashed again to
        be named. `NotFound` without the folder or a shard, `BadInput` for what cannot be edited.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise NotFound(f"{folder}: there is no such checkpoint folder")
        check_config(folder)
        files = {name: header_of_file(folder / name) for name in _weight_files(folder)}
        checkpoint = cls(folder, files, fingerprint)
        checkpoint._check_complete()
        return checkpoint

    def _check_complete(self) -> None:
        if not self.tensors:
            raise BadInput(f"{self.folder}: holds no tensors")
        for name, (file, info) in self.tensors.items():
            if DTYPE_BITS[info.dtype] < 8 or info.dtype.startswith("F8"):
                raise _quantised(self.folder, f"{name!r} in {file} is {info.dtype}")
        if (self.folder / SINGLE).exists():
            return
        for name, file in weight_map(self.folder).items():
            if self.tensors.get(name, ("", None))[0] != file:
                raise BadInput(f"{self.folder}/{INDEX}: {name!r} is not in {file}; get the checkpoint again")

    def fingerprint(self, progress: Progress = None) -> str:
        """ "sha256:" and 64 hex digits over every tensor's name, dtype, shape and bytes."""
        if self._hashes is None and self._believed is not None:
            return self._believed
        return fingerprint_of((info for _, info in self.tensors.values()), self.hashes(progress))

    def reading(self) -> str:
        """SHA-256 over the names and hashes of the files beside the weights that say how these are read."""
        if self._reading is None:
            found = sorted(path for path in self.folder.iterdir() if path.suffix in _READ)
            files = {path.name: hash_file(path) for path in found if path.name != INDEX and path.is_file()}
            self._reading = hash_bytes(canonical_json(files))
        return self._reading

    def as_read(self) -> str:
        """What names the results of the model: its fingerprint, "+", and 16 digits of `reading`.

        A corrected config.json or tokenizer leaves the weights as they are and gives other numbers.
        """
        return f"{self.fingerprint()}+{self.reading()[:16]}"

    def hashes(self, progress: Progress = None) -> dict[str, str]:
        """The SHA-256 of each tensor's bytes, read from the disk once."""
        if self._hashes is None:
            self._hashes = hash_tensors(self.folder, self.tensors, progress)
        return self._hashes

    def read_bytes(self, name: str) -> bytearray:
        """A tensor's bytes as stored."""
        file, info = self._find(name)
        return read_range(self.folder / file, info.start, info.end)

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype and shape, in memory of its own."""
        _, info = self._find(name)
        return as_tensor(self.read_bytes(name), info)

    def check_editable(self, names: Iterable[str]) -> None:
        """BadInput where one of these tensors holds numbers to which no update can be added exactly."""
        for name in names:
            file, info = self._find(name)
            if info.dtype == "F64":
                raise BadInput(
                    f"{self.folder}: {name!r} is stored as F64; only float32, bfloat16 and float16 can be "
                    "edited; load it with transformers in dtype=torch.float32, save_pretrained it to a new "
                    "folder, and use that"
                )
            if info.dtype not in _EDITABLE:
                raise _quantised(self.folder, f"{name!r} in {file} is {info.dtype}")

    def _find(self, name: str) -> tuple[str, TensorInfo]:
        if name not in self.tensors:
            raise NotFound(f"{self.folder}: has no tensor {name[:120]!r}; is it another model's?")
        return self.tensors[name]

    def stored_name(self, parameter: str) -> str:
        """The stored name of a module's parameter: files and classes prefix them differently.

        `NotFound` when no stored name differs from it in a known prefix alone, or when several do.
        """
        if parameter in self.tensors:
            return parameter
        found = matching_names(parameter, self.tensors)
        if len(found) != 1:
            what = "several tensors" if found else "no tensor"
            raise NotFound(f"{self.folder}: {what} for {parameter!r}; is it another model's?")
        return found.pop()


def matching_names(parameter: str, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that are ``parameter`` or differ from it in a known prefix alone."""
    tails = {parameter.removeprefix(prefix) for prefix in _PREFIXES}
    return {prefix + tail for tail in tails for prefix in _PREFIXES}.intersection(names)


def fingerprint_of(tensors: Iterable[TensorInfo], hashes: Mapping[str, str]) -> str:
    """The fingerprint of tensors with these hashes: SHA-256 of canonical JSON, sorted by name."""
    rows = sorted([info.name, info.dtype, list(info.shape), hashes[info.name]] for info in tensors)
    return f"sha256:{hash_bytes(canonical_json(rows))}"


def hash_tensors(
    folder: Path, tensors: Mapping[str, tuple[str, TensorInfo]], progress: Progress = None
) -> dict[str, str]:
    """The SHA-256 of each tensor's bytes; several at a time, since hashing leaves Python's lock."""
    total = sum(info.size for _, info in tensors.values())
    done = 0
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ranges = [(folder / file, info.start, info.end) for file, info in tensors.values()]
        for (name, (_, info)), found in zip(
            tensors.items(), pool.map(lambda part: hash_range(*part), ranges), strict=True
        ):
            hashes[name] = found
            done += info.size
            if progress is not None:
                progress(done, total, "hashing")
    return hashes


def hash_range(path: Path, start: int, end: int) -> str:
    """The SHA-256 of a file's bytes [start, end)."""
    digest = hashlib.sha256()
    with reading(path) as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(_PIECE, end - start))
            if not piece:
                raise BadInput(f"{path}: is shorter than its header says; get the checkpoint again")
            digest.update(piece)
            start += len(piece)
    return digest.hexdigest()


def read_range(path: Path, start: int, end: int) -> bytearray:
    """A file's bytes [start, end)."""
    data = bytearray(end - start)
    with reading(path) as file:
        file.seek(start)
        if file.readinto(data) != len(data):
            raise BadInput(f"{path}: is shorter than its header says; get the checkpoint again")
    return data


def as_tensor(data: bytearray | memoryview, info: TensorInfo) -> Tensor:
    """The tensor in ``data``, sharing its memory."""
    import torch

    dtypes = {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
    if info.dtype not in dtypes:
        raise BadInput(f"{info.name!r} is stored as {info.dtype}, which cannot be edited")
    if not data:
        return torch.empty(info.shape, dtype=dtypes[info.dtype], device="cpu")
    return torch.frombuffer(data, dtype=dtypes[info.dtype]).reshape(info.shape)


def is_weights(name: str) -> bool:
    """Whether a file's name says that it holds weights, in whatever format."""
    return _WEIGHTS.search(name.lower()) is not None


def has_safetensors(folder: Path) -> bool:
    """Whether the folder holds weights as `Checkpoint` reads them, or an index of them."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def _weight_files(folder: Path) -> list[str]:
    # As transformers does: the single file first, an index beside it is not looked at.
    if (folder / SINGLE).exists():
        return [SINGLE]
    if (folder / INDEX).exists():
        return sorted(set(weight_map(folder).values()))
    if (folder / PICKLE).exists() or (folder / PICKLE_INDEX).exists():
        raise BadInput(
            f"{folder}: its weights are pickles (.bin), which could run code and cannot be patched in place; "
            f"run patchkit init {shlex.quote(str(folder))} --convert, which makes a safetensors copy without "
            "running any"
        )
    others = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
    if others:
        raise BadInput(
            f"{folder}: its weights are not in safetensors ({others[0]!r}); load it with transformers and "
            f"save_pretrained it to a new folder, then use that"
        )
    raise BadInput(f"{folder}: holds no {SINGLE} and no {INDEX}; name the folder of a checkpoint")


def weight_map(folder: Path, name: str = INDEX, ending: str = ".safetensors") -> dict[str, str]:
    """An index's table: stored name -> file. File names must be plain: no folders, nothing hidden."""
    where = f"{folder}/{name}"
    try:
        index = strict_json(_small(folder / name))
    except ValueError as error:
        raise BadInput(f"{where}: is not JSON that can be believed ({error})") from None
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{where}: has no weight_map; get the checkpoint again")
    for file in table.values():
        if not _is_plain(file, ending):
            raise BadInput(f"{where}: names a file that is not beside it ({str(file)[:120]!r})")
    return table


def _is_plain(file: Any, ending: str) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(ending)
        and file.isprintable()
        and not file.startswith(".")
        and not {"/", "\\"} & set(file)
    )


def check_config(folder: Path) -> None:
    """BadInput where config.json is missing, is no table or tells of quantised weights; and for adapters."""
    path = folder / CONFIG
    if (folder / _ADAPTER).exists():  # transformers would put it on the weights, or load another base for it
        raise BadInput(f"{folder}: holds a PEFT adapter ({_ADAPTER}); name the base itself, without adapters")
    if not path.exists():
        raise BadInput(f"{folder}: holds no {CONFIG}; name the folder of a transformers checkpoint")
    try:
        config = json.loads(_small(path))
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: is not JSON; get the checkpoint again") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path}: is not a table; get the checkpoint again")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if any(part.get(key) for key in _QUANTISED):
            raise _quantised(folder, f"{CONFIG} says so")


def _small(path: Path) -> bytes:
    """A JSON file's bytes; `BadInput` when it is far too large to be one."""
    with reading(path) as file:
        data = file.read(_MAX_JSON)
    if len(data) == _MAX_JSON:
        raise BadInput(f"{path}: is too large to be what its name says")
    return data


def _quantised(folder: Path, reason: str) -> BadInput:
    return BadInput(
        f"{folder}: is quantised ({reason}), and an update cannot be added to it; use the float32, float16 "
        f"or bfloat16 checkpoint as the base and quantise the build"
    )
