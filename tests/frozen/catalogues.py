"""Writes the frozen catalogues: what each version of the schema was, as SQL, with a row in every table.

A file is written once, when its migration is new, and never again: ``python tests/frozen/catalogues.py``
writes only those that are missing. `tests/test_frozen.py` opens each with the program as it is now.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlite_utils

from patchkit.database.schema import MIGRATIONS, steps

FOLDER = Path(__file__).resolve().parent
_APPLIED = "2026-01-01 00:00:00+00:00"
_DERIVED = ("facts_fts_",)  # SQLite's own tables under the search index: made again by its triggers

ROWS = {
    "recipes": [("r1", "memit", '{"lambda":300.0}')],
    "patches": [("p1", "ann-0123abcd", "sha256:b", "memit", "r1", 1, 2, 100, "{}")],
    "commits": [("c1", "", "Ada", "a@example.org", "2026-01-01T00:00:00+00:00", "Add", "Add\n", "[]")],
    "changes": [("c1", "ann-0123abcd", "added", "p1")],
    "facts": [(1, "p1", 1, "Ann", "{} lies in", "Rome", None, None, '{"subject":"Ann"}')],
    "layers": [("p1", "w", 4, 3, "factors", 1, 0.5)],
    "base_weights": [("sha256:b", "w", 2.0)],
    "trees": [("t1", "sha256:b", "d1")],
    "members": [("t1", "ann-0123abcd", "p1", "{}")],
    "state": [(1, "t1", "c1")],
    "checked_tips": [(1, "c1")],
    "violations": [("v1", "c1", "{}")],
    "environments": [("e1", "cpu", "{}")],
    "results": [(1, "p1", "2026-01-01", "e1", 1, '{"p":0.1}', '{"p":0.9}', "{}")],
    "evaluations": [(1, "p1", "2026-01-01", "e1", None, "its own facts", '{"efficacy":1.0}')],
    "timings": [(1, "p1", "2026-01-01", "e1", "solve", 0.5)],
    "builds": [("out", "t1", "sha256:b", "2026-01-01", "{}")],
    "fingerprints": [("base", "[]", "sha256:b")],
}


def dump(version: int) -> str:
    """The SQL of a catalogue to which the first ``version`` migrations were applied, with ROWS in it."""
    with closing(sqlite3.connect(":memory:")) as connection:
        later = MIGRATIONS[version:]
        steps().apply(sqlite_utils.Database(connection), stop_before=later[:1])
        connection.execute("update _sqlite_migrations set applied_at = ?", [_APPLIED])
        objects = connection.execute(
            "select type, name, sql from sqlite_master where sql is not null and name not like 'sqlite_%'"
        ).fetchall()
        order = ("table", "index", "trigger", "view")
        objects = [row for row in objects if not row[1].startswith(_DERIVED)]
        lines = [f"{sql};" for kind in order for found, _, sql in objects if found == kind]
        tables = {name for kind, name, _ in objects if kind == "table"}
        applied = connection.execute("select * from _sqlite_migrations").fetchall()
    rows = {"_sqlite_migrations": applied, **ROWS}
    lines += [_insert(table, row) for table, found in rows.items() if table in tables for row in found]
    return "\n".join(lines) + "\n"


def _insert(table: str, row: tuple[object, ...]) -> str:
    values = ", ".join(_spelled(value) for value in row)
    return f'insert into "{table}" values ({values});'


def _spelled(value: object) -> str:
    if value is None:
        return "null"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def frozen(version: int) -> Path:
    return FOLDER / f"catalogue-{version}.sql"


if __name__ == "__main__":
    for number in range(1, len(MIGRATIONS) + 1):
        if not frozen(number).exists():
            frozen(number).write_text(dump(number), encoding="utf-8")
