"""A person's question to the catalogue in SQL: it can read, and nothing else.

The file is opened read-only with `query_only`, and an authorizer lets nothing but reads be compiled: no
ATTACH, no pragma that sets something, no transaction, no extension.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.database.opening import open_to_read
from patchkit.errors import BadInput
from patchkit.problem import one_line

__all__ = ["Answer", "answer"]

_STEPS = 10_000  # of SQLite's machine between two looks at whether the user pressed Ctrl-C
_LARGEST = 64 << 20  # bytes of one value
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
_TELLING = {"data_version", "table_info", "table_xinfo", "table_list", "foreign_key_list", "index_list"}
_TELLING |= {"index_info", "index_xinfo"}  # pragmas that set nothing; full-text search asks the first


@dataclass(frozen=True)
class Answer:
    """Rows of SQLite's values (None, int, float, str, bytes); two columns may have one name."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


def answer(path: Path, query: str) -> Answer:
    """The rows that answer one statement; `BadInput` says in one line what is wrong with it.

    KeyboardInterrupt where the user pressed Ctrl-C, however long SQLite has been at it.
    """
    try:
        with closing(open_to_read(path)) as connection:
            connection.execute("pragma query_only = on")
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST)
            connection.set_progress_handler(lambda: 0, _STEPS)  # an interrupt raised here ends the query
            connection.execute(
                "select 1 from facts_fts limit 0"
            )  # opening it is what no authorizer lets pass
            connection.set_authorizer(_reads_only)
            cursor = connection.execute(query)
            if cursor.description is None:
                raise BadInput("the question is empty; ask a select, as in: select * from facts_in_force")
            return Answer(tuple(column[0] for column in cursor.description), cursor.fetchall())
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            raise KeyboardInterrupt from error
        raise BadInput(_told(error)) from error


def _reads_only(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second == "load_extension":
        return sqlite3.SQLITE_DENY
    # To open a virtual table (full text, json_each) SQLite notes it in memory as a change of its schema; a
    # statement that would change that table itself is not compiled at all.
    opens = action == sqlite3.SQLITE_UPDATE and first == "sqlite_master"
    if opens or action in _READS or (action == sqlite3.SQLITE_PRAGMA and first in _TELLING):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _told(error: Exception) -> str:
    said = one_line(str(error))
    if any(words in said for words in ("not authorized", "prohibited", "authorization denied")):
        return f"the question would do more than read ({said}); only select is answered"
    return f"the question cannot be answered ({said}); docs/catalogue.md lists tables and views"
