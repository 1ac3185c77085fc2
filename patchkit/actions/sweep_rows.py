"""The folder of a sweep: what was asked of it, and a row for each trial, durable as it comes.

``sweep.json`` holds the settings, ``rows.jsonl`` an object a line. Which editors, how many facts, whose and
which λ may differ from command to command, since no row depends on another's; the settings name all that any
of them asked for. A folder of other settings is refused, and so is a second process. A line that a kill cut
off is taken away. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchkit.canonical import canonical_json, strict_json
from patchkit.errors import BadInput, Busy, WouldOverwrite
from patchkit.files import fsync_folder, is_temporary, sync, write_durably, writing

__all__ = ["Rows"]

Key = tuple[Any, ...]
_SETTINGS, _ROWS = "sweep.json", "rows.jsonl"
_LISTS = ("methods", "counts", "groups", "lambdas")
"""What a row is of; the trials of one command do not depend on those of another."""
_FREE = ("batch_size",)  # what memory is there for; no score depends on it
_RECIPES = "recipes"  # of each editor by itself
_MANY = "many"  # there where some batch is large, and of those alone
_LARGE = "large"  # [editor, facts] of those
_FIELDS = {"method", "group", "count", "lambda", "asked", "perplexity", "growth", "scores"}


class Rows:
    """The rows of one sweep by what they are of; see `open`."""

    def __init__(self, folder: Path, handle: int, rows: dict[Key, dict[str, Any]], *, whole: bool) -> None:
        self.folder, self._handle, self.by_key = folder, handle, rows
        self.whole = whole
        """The settings name all that was ever asked of the folder."""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Iterator[Rows]:
        """The folder, made, gone on with or extended; it is this process's alone until the end.

        WouldOverwrite where it holds something else, Busy where another process writes there, BadInput where
        its rows are damaged.
        """
        _refuse_another_use(folder)
        with writing(folder / _ROWS):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / _ROWS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Busy(f"{folder}: another sweep writes there; wait for it to end") from None
            fsync_folder(folder)
            rows = _read(folder / _ROWS, handle)
            yield cls(folder, handle, rows, whole=_claim(folder / _SETTINGS, settings, rows))
        finally:
            os.close(handle)

    def add(self, row: Mapping[str, Any]) -> None:
        """Put a row behind the others; it is on the disk when this returns."""
        line = canonical_json(row)
        with writing(self.folder / _ROWS):
            if os.write(self._handle, line + b"\n") <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(self._handle)
        self.by_key[_key(row)] = strict_json(line)  # as another run would read it


def _refuse_another_use(folder: Path) -> None:
    with writing(folder):
        names = os.listdir(folder) if folder.exists() else []
    there = {name for name in names if not is_temporary(name)}
    begun = there <= {_ROWS} and not _size(folder / _ROWS)  # killed before the settings were written
    if _SETTINGS not in there and not begun:
        raise WouldOverwrite(f"{folder}: holds files that are no sweep's; name another folder with --out")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _claim(path: Path, settings: Mapping[str, Any], rows: Collection[Key]) -> bool:
    """Write the settings, or join them to those that are there; the folder is this process's.

    Returns whether they name all that the folder's do. They are written before the first row that needs them.
    """
    if not path.exists():
        _write(path, settings)
        return True
    try:
        old = strict_json(path.read_bytes())
        other = [*_other(old, settings), *_resized(old, settings, rows)]
        joined = _joined(old, settings)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); name another folder with --out") from None
    if other:
        named = ", ".join(other)
        raise WouldOverwrite(
            f"{path.parent}: holds a sweep of other settings ({named}); name another folder with --out"
        )
    if joined != old:
        _write(path, joined)
    return all(set(joined[name]) <= set(settings[name]) for name in _LISTS if name in joined)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
    write_durably(path, f"{text}\n".encode())


def _other(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings for which a row that is there would be another one."""
    alone = (old.keys() ^ new.keys()) & {_MANY}
    compared = sorted((old.keys() | new.keys()) - {*_LISTS, *_FREE, _RECIPES, _LARGE} - alone)
    before, now = old.get(_RECIPES, {}), new.get(_RECIPES, {})
    recipes = [f"the recipe of {name}" for name in now if name in before and now[name] != before[name]]
    return [name for name in compared if old.get(name) != new.get(name)] + recipes


def _resized(old: Mapping[str, Any], new: Mapping[str, Any], rows: Collection[Key]) -> list[str]:
    """The batches there that had the recipe of many facts, and now have that of few, or the other way."""
    if _MANY in old and _LARGE not in old:  # from before that was written down
        return []
    before, now = (sorted(map(tuple, each.get(_LARGE, ()))) for each in (old, new))
    made = {(method, count) for method, _, count, _ in rows}
    asked = {(method, count) for method in new.get("methods", ()) for count in new.get("counts", ())}
    differ = sorted(pair for pair in made & asked if (pair in before) != (pair in now))
    return [f"the recipe of {method} for {count} facts" for method, count in differ]


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both: an editor's recipe stays, also where it is not asked for now, for its rows stay."""
    joined = {**old, **new}
    for name in joined.keys() & set(_LISTS):
        both = list(dict.fromkeys([*old.get(name, ()), *new.get(name, ())]))
        joined[name] = sorted(both) if name in ("counts", "lambdas") else both
    if _RECIPES in joined:
        joined[_RECIPES] = {**old.get(_RECIPES, {}), **new.get(_RECIPES, {})}
    if _LARGE in joined:
        joined[_LARGE] = sorted({*map(tuple, old.get(_LARGE, ())), *map(tuple, new.get(_LARGE, ()))})
    return joined


def _read(path: Path, handle: int) -> dict[Key, dict[str, Any]]:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with writing(path):
            os.ftruncate(handle, len(whole))
    rows = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = strict_json(line)
            if not set(row) >= _FIELDS or not all(len(found) == 3 for found in row["scores"].values()):
                raise ValueError
            rows[_key(row)] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path}:{number}: is no row of a sweep; remove the line and go on") from None
    return rows


def _key(row: Mapping[str, Any]) -> Key:
    return row["method"], row["group"], row["count"], row["lambda"]
