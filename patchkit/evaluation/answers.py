"""What a model was asked before, kept on this machine, so that it need not be asked again.

One file for each model: its base, the patches on it, and everything else that its numbers depend on. A file
holds its own digest: one that was altered, or is of another format, counts as empty and is written anew. It
is replaced as a whole, so of two processes that ask at once each reads a whole file, and the later one's
stays with what it found there. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchkit.canonical import canonical_json, hash_bytes, strict_json
from patchkit.errors import PatchkitError
from patchkit.files import is_temporary, mark_used, reading, write_durably, writing

__all__ = ["FOLDER", "LIMIT", "Answers", "kept_answers", "read_answers"]

FOLDER = "answers"
"""In the private folder of a repository."""
LIMIT = 256 << 20
"""Bytes that the folder may hold; the files that were not used for longest go first."""
_FORMAT = 1

Row = tuple[float, int, int, int]
"""An object's log-probability, tokens, hits and next token, as `likelihood.Score` has them."""


class Answers:
    """One model's: ``scores`` by (prompt, object), ``texts`` by (prompt, number of new tokens).

    ``about`` names the model and all that its numbers depend on, in JSON's types. Without a folder nothing is
    read and nothing is kept.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self.about = {"format": _FORMAT, **about}
        self.path = None if folder is None else folder / f"{hash_bytes(canonical_json(self.about))[:32]}.json"
        self.scores: dict[tuple[str, str], Row] = {}
        self.texts: dict[tuple[str, int], str] = {}
        self._kept = self._read()

    def keep(self) -> None:
        """Write what is known, if that is more than was; NotWritten where the folder cannot be written."""
        if self.path is None or len(self.scores) + len(self.texts) == self._kept:
            return
        self._read()  # what another process has found meanwhile
        self._kept = len(self.scores) + len(self.texts)
        body = canonical_json(
            {
                "about": self.about,
                "scores": [[*asked, row[0].hex(), *row[1:]] for asked, row in sorted(self.scores.items())],
                "texts": [[*asked, text] for asked, text in sorted(self.texts.items())],
            }
        )
        if len(body) <= LIMIT:
            with writing(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, hash_bytes(body).encode() + b"\n" + body)
            _make_room(self.path)

    def _read(self) -> int:
        """Take over what the file holds, and say how much that is."""
        if self.path is None or not self.path.is_file():
            return 0
        try:
            value = read_answers(self.path)
            if value["about"] != self.about:
                return 0
            scores = {(p, o): (float.fromhex(log_p), *rest) for p, o, log_p, *rest in value["scores"]}
            texts = {(p, n): text for p, n, text in value["texts"]}
        except (PatchkitError, ValueError, KeyError, TypeError):
            return 0
        self.scores = scores | self.scores
        self.texts = texts | self.texts
        mark_used(self.path)
        return len(scores) + len(texts)


def read_answers(path: Path) -> Any:
    """What a file holds; ValueError where it is not as it was written, NotFound where it cannot be read."""
    with reading(path, follow=False) as file:
        digest, _, body = file.read().partition(b"\n")
    if digest != hash_bytes(body).encode():
        raise ValueError("is not as it was written")
    return strict_json(body)


def kept_answers(folder: Path) -> Iterator[Path]:
    """The files of a folder of answers, whole or not."""
    for path in sorted(folder.glob("*")):
        if not is_temporary(path.name):
            yield path


def _make_room(newest: Path) -> None:
    """Remove what was not used for longest until the folder is within `LIMIT`."""
    found = []
    for path in kept_answers(newest.parent):
        with suppress(OSError):  # another process made room as well
            status = path.stat()
            found.append((path == newest, status.st_mtime_ns, path, status.st_size))
    held = sum(size for *_, size in found)
    for _, _, path, size in sorted(found):
        if held <= LIMIT:
            break
        with suppress(OSError):
            path.unlink()
        held -= size
