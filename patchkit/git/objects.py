"""Git's objects, each hashed against its id before it is believed.

Git does not check an object that it reads (only `git fsck` does); here a blob, tree or commit
whose bytes do not hash to its id is `BadInput`. Works in SHA-1 and SHA-256 repositories, over one
`git cat-file` process for thousands of objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.errors import BadInput
from patchkit.git.command import Git
from patchkit.problem import one_line

__all__ = ["Info", "Objects", "TreeItem", "object_id"]

_CHUNK = 256  # requests written before answers are read: they must fit in a pipe


@dataclass(frozen=True, slots=True)
class Info:
    """What an object is, without its bytes (and so not believed yet)."""

    oid: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class TreeItem:
    """One name in a tree object; `mode` in octal, as Git writes it ("100644", "40000", ...)."""

    mode: str
    name: str
    oid: str


def object_id(kind: str, data: bytes, hash_name: str) -> str:
    """The id that Git gives these bytes."""
    digest = hashlib.new(hash_name, f"{kind} {len(data)}\0".encode(), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


class Objects:
    """Reads the objects of one repository; `hash_name` is "sha1" or "sha256"."""

    def __init__(self, git: Git, hash_name: str) -> None:
        self._process: Any = None
        self._git = git
        self.hash_name = hash_name

    def read(self, oid: str, kind: str = "blob") -> bytes:
        """The bytes of one object."""
        (data,) = self.read_all([oid], kind)
        return data

    def read_all(self, oids: Sequence[str], kind: str = "blob") -> Iterator[bytes]:
        """The bytes of many objects, in order, one in memory at a time."""
        finished = False
        try:
            for chunk in _chunks(oids):
                self._ask(f"contents {oid}" for oid in chunk)
                for oid in chunk:
                    yield self._content(oid, kind)
            finished = True
        finally:
            if not finished:  # answers that nobody read would be taken for the next question's
                self.close()

    def infos(self, oids: Sequence[str]) -> list[Info | None]:
        """Kind and size of many objects; None where one is not there."""
        found: list[Info | None] = []
        for chunk in _chunks(oids):
            self._ask(f"info {oid}" for oid in chunk)
            found += [self._info() for _ in chunk]
        return found

    def tree(self, oid: str) -> list[TreeItem]:
        """The names in one tree object."""
        return self.trees([oid])[0]

    def trees(self, oids: Sequence[str]) -> list[list[TreeItem]]:
        """The names in many tree objects."""
        return [
            _parse_tree(data, oid, len(oid) // 2)
            for oid, data in zip(oids, self.read_all(oids, "tree"), strict=True)
        ]

    def close(self) -> None:
        """End the process; the next question starts another."""
        process, self._process = self._process, None
        if process is not None:
            try:  # noqa: SIM105 - contextlib may be gone when the interpreter ends
                process.stdin.close()
            except OSError:
                pass
            process.stdout.close()
            process.stderr.close()
            process.wait()

    def __del__(self) -> None:
        self.close()

    def _ask(self, requests: Iterator[str]) -> None:
        if self._process is None:
            self._process = self._git.start("cat_file", "--batch-command", "--buffer")
        text = "".join(f"{request}\n" for request in requests) + "flush\n"
        try:
            self._process.stdin.write(text.encode("ascii"))
            self._process.stdin.flush()
        except OSError:
            raise self._broken("objects") from None

    def _info(self) -> Info | None:
        words = self._process.stdout.readline().split()
        if len(words) == 2 and words[1] == b"missing":
            return None
        if len(words) != 3:
            raise self._broken("an object")
        return Info(words[0].decode(), words[1].decode(), int(words[2]))

    def _content(self, oid: str, kind: str) -> bytes:
        info = self._info()
        if info is None:
            raise BadInput(
                f"Git's object {oid} is missing; get it from another clone (git fetch), then: git fsck --full"
            )
        data: bytes = self._process.stdout.read(info.size)
        if len(data) != info.size or self._process.stdout.read(1) != b"\n":
            raise self._broken(f"object {oid}")
        if info.kind != kind or object_id(info.kind, data, self.hash_name) != oid:
            raise BadInput(
                f"Git's object {oid} is damaged (its bytes are not the ones that were written); "
                "get it from another clone, then: git fsck --full"
            )
        return data

    def _broken(self, what: str) -> BadInput:
        """The process ended in the middle of an answer: Git could not read the object at all."""
        said = one_line(self._process.stderr.read().decode("utf-8", "replace"))[:300]
        self.close()
        return BadInput(
            f"Git cannot read {what} ({said or 'cut short'}); get it from another clone, see git fsck"
        )


def _chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def _parse_tree(data: bytes, oid: str, width: int) -> list[TreeItem]:
    items = []
    at = 0
    while at < len(data):
        end = data.find(b"\0", at)
        mode, space, name = data[at:end].partition(b" ")
        if end < 0 or not space or len(data) < end + 1 + width:
            raise BadInput(f"Git's tree {oid} cannot be read; look with: git fsck --full")
        at = end + 1 + width
        items.append(TreeItem(mode.decode("ascii", "replace"), _name(name), data[end + 1 : at].hex()))
    return items


def _name(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
