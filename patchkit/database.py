"""Opens the catalogue's SQLite file: to ask (standard library alone) and to write (sqlite-utils, late).

Written in WAL mode with synchronous=FULL, foreign keys on, one transaction a block: a kill or a
power cut leaves all of the block or nothing. Failures are `PatchkitError`s in one line.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from patchkit.canonical import canonical_json
from patchkit.errors import Busy, Misconfigured, NotWritten, PatchkitError

__all__ = ["Database", "json_text"]

PATIENCE = 10.0  # seconds to wait for another writer


class Database:
    """A SQLite file; nothing is opened or made before it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A `sqlite_utils.Database` in one transaction: all of the block is written, durably, or nothing."""
        import sqlite_utils

        from patchkit.schema import migrate

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as connection:
                connection.execute("pragma journal_mode = wal")
                connection.execute("pragma synchronous = full")
                connection.execute("pragma foreign_keys = on")
                db = sqlite_utils.Database(connection, execute_plugins=False)
                migrate(db)
                connection.execute("begin immediate")
                try:
                    yield db
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """The rows that answer a question; none where there is no catalogue or it is damaged."""
        if not self.path.exists():
            return []
        given = values[0] if len(values) == 1 and isinstance(values[0], dict) else values
        uri = f"file:{quote(os.fsencode(self.path))}?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE)) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(query, given)]
        except sqlite3.Error:
            return []

    def _failure(self, error: Exception) -> PatchkitError:
        text = str(error)
        if isinstance(error, OSError) or re.search("readonly|full|unable to open|disk I/O", text):
            return NotWritten(f"{self.path}: cannot be written ({text}); make room or give write access")
        if "locked" in text:
            return Busy(f"{self.path}: another patchkit command is writing here; try again")
        return Misconfigured(
            f"{self.path}: is damaged ({text}); patchkit reindex puts it aside and makes another"
        )


def json_text(value: Any) -> str:
    """A value for a column that holds JSON."""
    return canonical_json(value).decode("utf-8")
