"""Patches kept in Git LFS: pointers in Git, the files themselves in Git LFS's own store.

A stack made with `init --lfs` says so in `patches/.gitattributes`. Git LFS writes the pointers (its
clean filter, in `git add`); here they are read, and what they name is hashed before it is
believed, as everything that Git keeps. Pointers, store and attributes: https://github.com/git-lfs/git-lfs,
docs/spec.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput, Misconfigured, PatchkitError
from patchkit.files import fsync_folder, write_durably
from patchkit.git.command import Git

__all__ = ["ATTRIBUTES", "MAX_POINTER", "Media", "Pointer", "begins_pointer", "ensure_installed", "large"]

# As without Git LFS (see `recording`): whole files or a conflict, also of pointers.
ATTRIBUTES = b"* -text -merge\n*.safetensors -delta filter=lfs diff=lfs\n"

MAX_POINTER = 200  # bytes; one with the longest size that is read takes 139

_VERSION = "version https://git-lfs.github.com/spec/v1"
_POINTER = re.compile(
    rf"{re.escape(_VERSION)}\noid sha256:([0-9a-f]{{64}})\nsize ([1-9][0-9]{{0,14}})\n".encode()
)
_WAY = "install it (https://git-lfs.com), then: git lfs install"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What Git keeps in place of a file: its SHA-256 and its bytes."""

    sha256: str
    size: int

    @classmethod
    def to(cls, data: bytes) -> Pointer:
        """The pointer to a file of these bytes."""
        return cls(hash_bytes(data).removeprefix("sha256:"), len(data))

    @classmethod
    def read(cls, blob: bytes) -> Pointer | None:
        """The pointer that a blob is; None for any other blob."""
        found = _POINTER.fullmatch(blob) if len(blob) < MAX_POINTER else None
        return cls(found[1].decode(), int(found[2])) if found else None

    def __bytes__(self) -> bytes:
        return f"{_VERSION}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


class Media:
    """Git LFS's store of one repository."""

    def __init__(self, git: Git, common_dir: Path) -> None:
        self._git = git
        self._common_dir = common_dir

    @cached_property
    def _objects(self) -> Path:
        told = self._git.ask("config", "--null", "--type=path", "--get", "lfs.storage")
        place = Path(told.removesuffix(b"\0").decode("utf-8", "surrogateescape")) if told else Path("lfs")
        return self._common_dir / place / "objects"

    def place(self, pointer: Pointer) -> Path:
        """Where the file lies, if it is here."""
        return self._objects / pointer.sha256[:2] / pointer.sha256[2:4] / pointer.sha256

    def has(self, pointer: Pointer) -> bool:
        """Whether a file of that size is here (its bytes are not believed yet)."""
        try:
            return self.place(pointer).stat().st_size == pointer.size
        except OSError:
            return False

    def resolved(self, blob: bytes) -> bytes:
        """The file that a pointer names, its hash checked; any other blob as it is."""
        pointer = Pointer.read(blob)
        if pointer is None:
            return blob
        try:
            data = self.place(pointer).read_bytes()
        except OSError:
            raise BadInput(
                f"{pointer.sha256[:12]}… is kept in Git LFS and is not here; get it with: git lfs fetch --all"
            ) from None
        if Pointer.to(data) != pointer:
            raise BadInput(
                f"{pointer.sha256[:12]}…, kept in Git LFS, is damaged (its bytes are not the ones that were "
                f"written); take it away and get it again: rm -f {self.place(pointer)} && git lfs fetch --all"
            )
        return data

    def keep(self, data: bytes) -> None:
        """Put a file into the store, durably."""
        pointer = Pointer.to(data)
        if self.has(pointer):
            return
        place = self.place(pointer)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_durably(place, data)
        for folder in list(place.parents)[1:4]:
            fsync_folder(folder)


def large(path: str) -> bool:
    """Whether a file is of the kind that a stack with Git LFS keeps there."""
    return path.endswith(".safetensors")


def begins_pointer(blob: bytes) -> bool:
    """Whether a blob is meant as a pointer, of whatever version or size."""
    return blob.startswith(_VERSION.removesuffix("v1").encode())


def ensure_installed(git: Git, path: str) -> None:
    """`Misconfigured` where Git would store the bytes of ``path`` itself, because Git LFS is not set up."""
    try:
        git.read("lfs", "version")
    except PatchkitError:
        raise Misconfigured(
            f"{path}: is to be kept in Git LFS, which is not here, so Git would store it whole; {_WAY}"
        ) from None
    if not any(git.ask("config", "--get", f"filter.lfs.{way}") for way in ("process", "clean")):
        raise Misconfigured(
            f"{path}: is to be kept in Git LFS, which Git does not know of yet, so Git would store it whole; "
            "set it up: git lfs install"
        )
