"""Commit messages: a text, and trailers in the last paragraph as `git interpret-trailers` reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from patchkit.errors import BadInput

__all__ = ["compose_message", "is_trailer"]

_TRAILER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*: \S.*")


def is_trailer(line: str) -> bool:
    """Whether Git reads a line of a message's last paragraph as a trailer."""
    return _TRAILER.fullmatch(line) is not None


def compose_message(message: str, trailers: Sequence[tuple[str, str]]) -> bytes:
    """The commit message, its trailers in the last paragraph as `git interpret-trailers` reads them."""
    if not message.strip() or "\0" in message:
        raise BadInput("a commit needs a message, without NUL characters; say it with -m TEXT")
    body = "\n".join(line.rstrip() for line in message.strip().splitlines())
    lines = [f"{key}: {' '.join(value.split())}" for key, value in trailers]
    if not lines:
        return f"{body}\n".encode("utf-8", "replace")
    paragraphs = body.split("\n\n")
    continues = len(paragraphs) > 1 and all(map(is_trailer, paragraphs[-1].split("\n")))
    return "".join([body, "\n" if continues else "\n\n", "\n".join(lines), "\n"]).encode("utf-8", "replace")
