"""Takes over what was measured from a damaged catalogue, row by row, as far as SQLite can read it.

Git derives the rest again. Rows are read from both ends of a table, since a damaged page ends a reading;
one whose types or JSON are not what patchkit writes is left behind. The damaged file stays as it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from patchkit.canonical import hash_bytes, strict_json
from patchkit.database.opening import Database, open_to_read
from patchkit.database.schema import JSON

__all__ = ["take_over"]

_MEASURED = {
    "environments": ("id", "device", "versions"),
    "results": ("patch", "date", "environment", "line", "before", "after", "more"),
    "evaluations": ("patch", "date", "environment", "tree", "dataset", "metrics"),
    "timings": ("patch", "date", "environment", "phase", "seconds"),
    "builds": ("folder", "tree", "base", "date", "record"),
    "fingerprints": ("folder", "files", "fingerprint"),
    "base_weights": ("base", "weight", "norm"),
}
_NUMBERS = {"line": int, "seconds": float, "norm": float}


def take_over(new: Database, damaged: Path) -> int:
    """Measured rows of ``damaged`` into ``new``; how many there were."""
    found = {table: list(_readable(damaged, table, columns)) for table, columns in _MEASURED.items()}
    known = {row["id"] for row in found["environments"]}
    count = 0
    with new.writing() as db:
        for table, rows in found.items():
            for row in rows:
                if row.get("environment") is not None and row["environment"] not in known:
                    continue  # on what it was measured is lost, and with it what it says
                if row.get("patch") is not None:
                    db.execute("insert or ignore into patches(id) values (?)", [row["patch"]])
                db[table].insert(row, ignore=True)
                count += 1
    return count


def _readable(path: Path, table: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    seen = set()
    for order in ("asc", "desc"):
        with suppress(sqlite3.Error), closing(_opened(path)) as connection:
            names = ", ".join(f'"{name}"' for name in columns)
            for place, *values in connection.execute(
                f'select rowid, {names} from "{table}" order by rowid {order}'
            ):
                row = dict(zip(columns, values, strict=True))
                if place not in seen and _is_written_by_us(table, row):
                    seen.add(place)
                    yield row


def _opened(path: Path) -> sqlite3.Connection:
    connection = open_to_read(path)
    connection.text_factory = lambda data: data.decode("utf-8", "strict")
    return connection


def _is_written_by_us(table: str, row: dict[str, Any]) -> bool:
    try:
        for name, value in row.items():
            if value is not None and not isinstance(value, _NUMBERS.get(name, str)):
                return False
            if name in JSON.get(table, ()) and isinstance(value, str):
                strict_json(value.encode("utf-8"))
    except ValueError:
        return False
    if table == "environments":
        return bool(row["id"] == hash_bytes((row["versions"] or "").encode()))
    return True
