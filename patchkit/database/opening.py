"""Opens the catalogue's SQLite file: to ask (standard library alone) and to write (sqlite-utils, late).

Written in WAL mode with synchronous=FULL, foreign keys on, one transaction a block: a kill or a
power cut leaves all of the block or nothing. Failures are `PatchkitError`s in one line.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from patchkit.canonical import canonical_json
from patchkit.database.schema import newer
from patchkit.errors import Busy, Misconfigured, NotWritten, PatchkitError
from patchkit.problem import one_line

__all__ = ["Database", "json_text", "open_to_read"]

PATIENCE = 10.0  # seconds to wait for another writer


class Database:
    """A SQLite file; nothing is opened or made before it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A `sqlite_utils.Database` in one transaction: all of the block is written, durably, or nothing."""
        import sqlite_utils

        from patchkit.database.schema import migrate, pending

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as connection:
                self._refuse_newer(connection)
                _to_wal(connection)
                connection.execute("pragma synchronous = full")
                connection.execute("pragma foreign_keys = on")
                db = sqlite_utils.Database(connection, execute_plugins=False)
                if pending(db):
                    connection.execute("begin immediate")  # of two first writers the second finds it all done
                    migrate(db)
                    connection.commit()
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
        """The rows that answer a question; none where there is no catalogue or it is damaged.

        `Misconfigured` where a newer patchkit wrote it: what its rows mean is not known here.
        """
        if not self.path.exists():
            return []
        given = values[0] if len(values) == 1 and isinstance(values[0], dict) else values
        try:
            with closing(open_to_read(self.path)) as connection:
                self._refuse_newer(connection)
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(query, given)]
        except sqlite3.Error:
            return []

    def value(self, text: str) -> Any:
        """What a column of JSON holds; `Misconfigured` where its bytes were altered."""
        try:
            return json.loads(text)
        except ValueError as error:
            raise self._damaged(one_line(str(error))) from error

    def note(self, *statements: tuple[Any, ...]) -> None:
        """Write what costs only time where it is lost, without importing sqlite-utils and without waiting.

        Nothing is written where there is no catalogue, another writes, or it is not of this format.
        """
        if not self.path.exists():
            return
        with suppress(sqlite3.Error, OSError, Misconfigured):
            address = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(address, uri=True, timeout=0)) as connection, connection:
                self._refuse_newer(connection)
                for query, *values in statements:
                    connection.execute(query, values)

    def _refuse_newer(self, connection: sqlite3.Connection) -> None:
        if (step := newer(connection)) is not None:
            raise Misconfigured(
                f"{self.path}: is in the format of a newer patchkit ({one_line(step)[:60]}); update patchkit"
            )

    def _failure(self, error: Exception) -> PatchkitError:
        text = str(error)
        if isinstance(error, OSError) or re.search("readonly|full|unable to open|disk I/O", text):
            return NotWritten(f"{self.path}: cannot be written ({text}); make room or give write access")
        if "locked" in text:
            return Busy(f"{self.path}: another patchkit command is writing here; try again")
        return self._damaged(text)

    def _damaged(self, why: str) -> Misconfigured:
        return Misconfigured(
            f"{self.path}: is damaged ({why}); patchkit reindex puts it aside and makes another"
        )


def _to_wal(connection: sqlite3.Connection) -> None:
    """SQLite itself does not wait here while another connection is open on a file that is new."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that cannot write; sqlite3.Error where the file cannot be opened or is no database.

    A file in WAL mode is read through a second one beside it. On a disk that takes no writes there may be
    none; nobody writes there, and the file is read as it stands, unless a log beside it holds more.
    """
    address = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=PATIENCE)
    try:
        connection.execute("select 1 from sqlite_master limit 1")
    except sqlite3.OperationalError:
        connection.close()
        log = path.with_name(f"{path.name}-wal")
        if os.access(path.parent, os.W_OK) or (log.exists() and log.stat().st_size):
            raise
        return sqlite3.connect(f"{address}&immutable=1", uri=True, timeout=PATIENCE)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def json_text(value: Any) -> str:
    """A value for a column that holds JSON."""
    return canonical_json(value).decode("utf-8")
