"""What a build holds, written beside it, and the check that it still does.

Promises: the record says of every byte of the build which hash covers it; `verify_build` hashes them
all, trusts no time stamp, and finds a change in any of them, the record included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.canonical import canonical_json, hash_bytes, strict_json
from patchkit.checkpoint import CONFIG, Checkpoint, Progress, fingerprint_of, hash_range, hash_tensors
from patchkit.errors import BadInput, PatchkitError
from patchkit.files import reading
from patchkit.tensors import TensorFile, header_of_file

__all__ = ["BUILD_RECORD", "SIGNATURE", "BuildRecord", "Edited", "FileRecord", "looks_whole", "verify_build"]

BUILD_RECORD = "patchkit-build.json"
SIGNATURE = "model.sig"  # of `patchkit sign`, over all the rest
FINISHED, UNFINISHED = "finished", "unfinished"

_FORMAT = 1
_FIELDS = {
    "format",
    "state",
    "base",
    "patches",
    "files",
    "weights",
    "tensors",
    "touched",
    "pending",
    "left_out",
}
Edited = Mapping[str, Mapping[str, tuple[int, ...]]]  # patch id -> the tensors that it edits -> shapes
_CHECKSUM = "sha256"
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_RECORD = 256 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size in bytes and SHA-256 (of a weights file: of what stands before its first tensor)."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """``patchkit-build.json``. Every table is by name; hashes are SHA-256 in hex.

    ``tensors``: the base's hash of each; ``touched``: the hashes of those that the patches changed.
    ``pending``: in an unfinished build, the tensors that may be half written. ``left_out``: the base's
    files that hold its weights in another form, and would be a build's unedited twin.
    """

    state: str
    base: str
    patches: tuple[str, ...]
    files: dict[str, FileRecord]
    weights: dict[str, FileRecord]
    tensors: dict[str, str]
    touched: dict[str, str]
    pending: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return self.state == FINISHED

    def expected(self, tensor: str) -> str:
        """The hash that a tensor of the finished build has."""
        return self.touched.get(tensor, self.tensors[tensor])

    def fingerprint(self, checkpoint: Checkpoint) -> str:
        """Of the build as a checkpoint; ``checkpoint``: its base, whose dtypes and shapes it has."""
        hashes = {name: self.expected(name) for name in self.tensors}
        return fingerprint_of((info for _, info in checkpoint.tensors.values()), hashes)

    def still_right(self, edited: Edited, wanted: Edited) -> dict[str, str]:
        """The edited tensors, with their hashes, that the patches ``wanted`` edit as the build's own did.

        None where the build is not finished, or ``edited`` does not tell of all of its patches.
        """
        if not self.finished or not set(self.patches) <= edited.keys():
            return {}
        before = _by_tensor({patch: edited[patch] for patch in self.patches})
        after = _by_tensor(wanted)
        return {name: digest for name, digest in self.touched.items() if before.get(name) == after.get(name)}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "state": self.state,
            "base": self.base,
            "patches": list(self.patches),
            "files": _table(self.files),
            "weights": _table(self.weights),
            "tensors": dict(self.tensors),
            "touched": dict(self.touched),
            "pending": list(self.pending),
            "left_out": list(self.left_out),
        }

    def to_bytes(self) -> bytes:
        """Canonical JSON that carries its own hash, and a newline."""
        value = self.to_json()
        return canonical_json({**value, _CHECKSUM: hash_bytes(canonical_json(value))}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> BuildRecord:
        """Read what `to_bytes` wrote; `BadInput` for anything else."""
        try:
            value = strict_json(data)
            checksum = value.pop(_CHECKSUM, None) if isinstance(value, dict) else None
            if checksum != hash_bytes(canonical_json(value)):
                raise ValueError("it was changed")
            if type(number := value.get("format")) is int and number > _FORMAT:
                raise BadInput(f"{name}: is in build format {number}, not {_FORMAT}; update patchkit")
            if set(value) != _FIELDS:
                raise ValueError("it was changed")
            record = cls(
                value["state"],
                value["base"],
                _names(value["patches"]),
                _files(value["files"]),
                _files(value["weights"]),
                _hashes(value["tensors"]),
                _hashes(value["touched"]),
                _names(value["pending"]),
                _names(value["left_out"]),
            )
            if value["format"] != _FORMAT or record.to_bytes() != data:
                raise ValueError("it was changed")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(
                f"{name}: cannot be believed ({error}); remove the folder and build again"
            ) from None
        return record

    @classmethod
    def read(cls, folder: Path) -> BuildRecord | None:
        """The record in a build folder, None where there is none; `BadInput` for a damaged one."""
        path = folder / BUILD_RECORD
        if not os.path.lexists(path):
            return None
        with reading(path, follow=False) as file:
            return cls.from_bytes(file.read(_MAX_RECORD), str(path))


def _by_tensor(edited: Edited) -> dict[str, set[str]]:
    """For each tensor the patches that edit it."""
    found: dict[str, set[str]] = {}
    for patch, tensors in edited.items():
        for name in tensors:
            found.setdefault(name, set()).add(patch)
    return found


def looks_whole(folder: Path, record: BuildRecord) -> bool:
    """Whether every file of a build is there and as long as it was: a glance, which hashes nothing."""
    try:
        return all(
            os.lstat(folder / name).st_size == file.size
            for name, file in (record.files | record.weights).items()
        )
    except OSError:
        return False


def verify_build(
    folder: Path, checkpoint: Checkpoint | None = None, *, progress: Progress = None
) -> list[str]:
    """Hash every byte of a build and list, one line each, what is not as its record says.

    With ``checkpoint``, also whether it stands on that base. An empty list: all is well.
    """
    try:
        record = BuildRecord.read(folder)
    except PatchkitError as error:
        return [error.message]
    if record is None:
        return [f"{folder}: holds no {BUILD_RECORD}, so it is not a build"]
    problems = [] if record.finished else [f"{folder}: the build was interrupted; build again"]
    problems += _file_problems(folder, record)
    problems += _weight_problems(folder, record, progress)
    problems += _stray_files(folder, record)
    if checkpoint is not None and checkpoint.fingerprint(progress) != record.base:
        problems.append(f"{folder}: was built on another base than {checkpoint.folder}")
    return problems


def _file_problems(folder: Path, record: BuildRecord) -> list[str]:
    problems = [] if CONFIG in record.files else [f"{folder / BUILD_RECORD}: lists no {CONFIG}"]
    for name, file in sorted(record.files.items()):
        problems += _problem(folder / name, file, file.size)
    return problems


def _weight_problems(folder: Path, record: BuildRecord, progress: Progress) -> list[str]:
    problems = []
    headers: dict[str, TensorFile] = {}
    for name, file in sorted(record.weights.items()):
        try:
            header = header_of_file(folder / name)
        except PatchkitError as error:
            problems.append(error.message)
            continue
        problems += _problem(folder / name, file, header.data_start)
        headers[name] = header
    if len(headers) < len(record.weights):
        return problems
    tensors = {
        name: (file, info) for file, header in headers.items() for name, info in header.tensors.items()
    }
    if set(tensors) != set(record.tensors) or not set(record.touched) <= set(tensors):
        return [*problems, f"{folder}: its tensors are not those of its record; build again"]
    if fingerprint_of((info for _, info in tensors.values()), record.tensors) != record.base:
        problems.append(f"{folder / BUILD_RECORD}: its hashes are not those of its base")
    for name, found in hash_tensors(folder, tensors, progress).items():
        if found != record.expected(name):
            problems.append(f"{folder / tensors[name][0]}: tensor {name!r} was changed; {_MEND}")
    return problems


_MEND = "remove the folder and build again"


def _problem(path: Path, file: FileRecord, end: int) -> list[str]:
    """What is wrong with a file whose first ``end`` bytes should have the recorded hash."""
    try:
        status = os.lstat(path)
        if os.path.islink(path) or status.st_size != file.size or hash_range(path, 0, end) != file.sha256:
            return [f"{path}: was changed; {_MEND}"]
    except (OSError, PatchkitError):
        return [f"{path}: is missing or cannot be read; build again"]
    return []


def _stray_files(folder: Path, record: BuildRecord) -> list[str]:
    known = {BUILD_RECORD, SIGNATURE, *record.files, *record.weights}
    found = set()
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found |= {Path(place, name).relative_to(folder).as_posix() for name in (*names, *links)}
    return [f"{folder / name}: is not part of the build; move it away" for name in sorted(found - known)]


def _table(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: {"size": file.size, _CHECKSUM: file.sha256} for name, file in files.items()}


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("it was changed")
    return tuple(value)


def _files(value: dict[str, Any]) -> dict[str, FileRecord]:
    for name in value:
        if name.startswith("/") or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
            raise ValueError("it names a file outside the folder")
    return {name: FileRecord(file["size"], file[_CHECKSUM]) for name, file in value.items()}


def _hashes(value: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(item, str) and _HASH.fullmatch(item) for item in value.values()):
        raise ValueError("it holds a hash that is none")
    return dict(value)
