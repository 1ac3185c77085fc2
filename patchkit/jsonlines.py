"""JSON values out of a file that nobody vouches for, each with the line on which it begins.

A file holds an object a line (JSON Lines), or is as a whole one array or one object. What cannot
be read is given as a ValueError in the value's place, so that one fault does not hide the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from patchkit.canonical import strict_json

__all__ = ["MAX_LINE", "numbered_values"]

MAX_LINE = 1 << 20  # bytes of one value
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"  # what JSON calls white space
_LINE = re.compile(rb"[^\n]+")


def numbered_values(data: bytes) -> Iterator[tuple[int, Any]]:
    """(line, value) for each value of the file; the value is a ValueError where it cannot be read.

    A byte order mark, empty lines and CRLF are passed over.
    """
    data = data.removeprefix(_BOM)
    first = data.lstrip()[:MAX_LINE].split(b"\n", 1)[0]
    if first.startswith(b"["):
        return _array(data)
    if first.startswith(b"{") and not _is_json(first) and _is_json(data):
        return _single(data)
    return _lines(data)


def _lines(data: bytes) -> Iterator[tuple[int, Any]]:
    number, counted = 1, 0
    for found in _LINE.finditer(data):
        number += data.count(b"\n", counted, found.start())
        counted = found.start()
        if line := found[0].strip():
            yield number, _value(line)


def _single(data: bytes) -> Iterator[tuple[int, Any]]:
    before = len(data) - len(data.lstrip())
    yield data.count(b"\n", 0, before) + 1, _value(data.strip())


def _array(data: bytes) -> Iterator[tuple[int, Any]]:
    """The items of a file that is one array; what follows a break in its JSON is not guessed at."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, ValueError("not UTF-8")
        return
    line, counted = 1, 0
    for start, item in _items(text):
        line += text.count("\n", counted, start)
        counted = start
        yield line, item if isinstance(item, ValueError) else _value(item.encode("utf-8"))


def _items(text: str) -> Iterator[tuple[int, str | ValueError]]:
    """(position, text) of each item of an array; ends with a ValueError where the JSON breaks."""
    decoder = json.JSONDecoder()
    at = _skip(text, _skip(text, 0) + 1)  # past the bracket that opens the array
    closed = text.startswith("]", at)
    while not closed:
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.pos, ValueError(f"not JSON: {error.msg}")
            return
        except (ValueError, RecursionError) as error:
            yield at, ValueError(f"not JSON: {error}")
            return
        yield at, text[at:end]
        at = _skip(text, end)
        closed = text.startswith("]", at)
        if not closed:
            if not text.startswith(",", at):
                yield at, ValueError('not JSON: the array goes on without "," and ends without "]"')
                return
            at = _skip(text, at + 1)
    rest = _skip(text, at + 1)
    if rest < len(text):
        yield rest, ValueError("not JSON: something follows the end of the array")


def _skip(text: str, at: int) -> int:
    """The next position that is not white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _value(data: bytes) -> Any:
    if len(data) > MAX_LINE:
        return ValueError(f"longer than {MAX_LINE >> 20} MiB")
    try:
        return strict_json(data)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:
        return error


def _is_json(data: bytes) -> bool:
    try:
        strict_json(data)
    except ValueError:
        return False
    return True
