"""What earlier versions wrote is read for ever: frozen repositories, and a catalogue of every schema.

The files under `frozen/` were written once, by the scripts beside them, and are never written again.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils
from git_helpers import git
from proof_helpers import expected_hashes, fine, here, one_line, person, tensor_hashes  # noqa: F401

from patchkit.catalogue import Catalogue
from patchkit.checkpoint import Checkpoint
from patchkit.database.schema import MIGRATIONS, migrate, steps
from patchkit.errors import BadInput, Misconfigured
from patchkit.patch import FORMAT, Header
from patchkit.repository import Repository
from patchkit.settings import BASE_KEY, parse_settings

sys.path.insert(0, str(Path(__file__).parent / "frozen"))
import catalogues
import repository as frozen_repository

pytestmark = pytest.mark.usefixtures("person")

FROZEN = Path(__file__).parent / "frozen"
SCHEMAS = range(1, len(MIGRATIONS) + 1)
NEWER = "insert into _sqlite_migrations(migration_set, name) values ('patchkit', 'm999_new')"
REPOSITORIES = sorted(FROZEN.glob("repository-*.bundle"))


# Repositories


@pytest.mark.parametrize("bundle", REPOSITORIES, ids=lambda path: path.stem)
def test_a_frozen_repository_is_what_it_was(bundle: Path, tmp_path: Path) -> None:
    base, kb = frozen_repository.make_base(tmp_path / "base"), tmp_path / "kb"
    git(tmp_path, "clone", "-q", "-b", "main", str(bundle), str(kb))
    git(kb, "branch", "-q", "side", "origin/side")
    git(kb, "config", BASE_KEY, str(base))
    repository = Repository.open(kb)
    assert repository.settings.base_fingerprint == Checkpoint.open(base).fingerprint()
    told = json.loads(bundle.with_suffix(".json").read_text("utf-8"))
    assert set(told) == {"main~3", "side", "v1", "main"}
    for rev, holds in told.items():
        assert repository.problems(rev) == []
        stack = repository.stack(rev)
        assert (stack.commit, stack.tree) == (holds["commit"], holds["tree"])
        assert {patch.name: patch.id for patch in stack.patches} == holds["patches"]
        lines = [[fact.to_line() for fact in patch.facts] for patch in stack.patches]
        assert lines == holds["facts"]
        out = tmp_path / "out"
        repository.build(out, revision=rev)
        assert tensor_hashes(out) == holds["tensors"]
    folders = [kb / "patches" / name for name in told["main"]["patches"]]
    assert told["main"]["tensors"] == expected_hashes(base, folders)  # in fractions, by another program
    assert told["main"]["tensors"] != told["v1"]["tensors"]
    assert repository.fsck(full=True) == []


def test_every_patch_format_has_its_frozen_repository() -> None:
    assert [path.stem for path in REPOSITORIES] == [f"repository-{number}" for number in range(1, FORMAT + 1)]


# Catalogues


def _frozen(number: int, path: Path) -> Catalogue:
    path.mkdir()
    with closing(sqlite3.connect(path / "catalogue.db")) as connection:
        connection.executescript(catalogues.frozen(number).read_text("utf-8"))
    return Catalogue(path)


def _schema(path: Path) -> dict[str, Any]:
    """Columns, references and indexes of every table, and the views' and triggers' SQL without spaces."""
    with closing(sqlite3.connect(path)) as connection:
        found: dict[str, Any] = {}
        for kind, name, sql in connection.execute("select type, name, sql from sqlite_master").fetchall():
            if kind == "table" and not name.startswith("facts_fts_"):
                found[name] = [
                    sorted(map(str, connection.execute(f'pragma {what}("{name}")').fetchall()))
                    for what in ("table_xinfo", "foreign_key_list", "index_list")
                ]
            elif kind in ("view", "trigger"):
                found[name] = "".join(sql.split())
        return found


def _rows(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        found = {}
        for table in catalogues.ROWS:
            if connection.execute("select 1 from sqlite_master where name = ?", [table]).fetchone():
                found[table] = connection.execute(f'select * from "{table}"').fetchall()
        return found


def test_dates_of_older_catalogues_are_brought_into_utc(tmp_path: Path) -> None:
    found = _frozen(4, tmp_path / "older")
    dates = {
        "c1": "2026-01-01T02:30:00+09:00",
        "c2": "2025-12-31T23:30:00-10:00",
        "c3": "1970-01-01T00:00:00+00:00",
    }
    with closing(sqlite3.connect(found.path)) as connection:
        connection.execute("delete from commits")
        connection.executemany("insert into commits (id, date) values (?, ?)", dates.items())
        connection.commit()
        migrate(sqlite_utils.Database(connection))
        now = dict(connection.execute("select id, date from commits").fetchall())
    wanted = {name: datetime.fromisoformat(date).astimezone(UTC).isoformat() for name, date in dates.items()}
    assert now == wanted


def test_every_schema_has_its_frozen_copy() -> None:
    assert tuple(step.name for step in steps()._migrations) == MIGRATIONS
    assert sorted(path.name for path in FROZEN.glob("catalogue-*.sql")) == [
        f"catalogue-{number}.sql" for number in SCHEMAS
    ]


@pytest.mark.parametrize("number", SCHEMAS)
def test_a_migration_that_was_applied_somewhere_is_not_changed(number: int, tmp_path: Path) -> None:
    """The first migrations, run now, give what the frozen copy is."""
    _frozen(number, tmp_path / "then")
    with closing(sqlite3.connect(tmp_path / "now.db")) as connection:
        connection.executescript(catalogues.dump(number))
    assert _schema(tmp_path / "now.db") == _schema(tmp_path / "then" / "catalogue.db")


@pytest.mark.parametrize("number", SCHEMAS)
def test_an_earlier_catalogue_becomes_todays_and_keeps_its_rows(number: int, tmp_path: Path) -> None:
    catalogue = _frozen(number, tmp_path / "then")
    before = _rows(catalogue.path)
    assert before
    assert all(len(rows) == 1 for rows in before.values())
    assert [row["subject"] for row in catalogue.rows("select subject from facts")] == ["Ann"]  # as it is
    with catalogue.writing():
        pass
    with Catalogue(tmp_path / "new").writing():
        pass
    assert _schema(catalogue.path) == _schema(tmp_path / "new" / "catalogue.db")
    after = _rows(catalogue.path)
    assert {table: after[table] for table in before} == before
    assert [row["subject"] for row in catalogue.search("ann")] == ["Ann"]
    if number >= 3:
        assert catalogue.timings("p1") == {"solve": 0.5}
        assert [row["after"] for row in catalogue.results("p1")] == [{"p": 0.9}]
    with closing(sqlite3.connect(catalogue.path)) as connection:
        assert connection.execute("pragma foreign_key_check").fetchall() == []
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]


# What a newer program wrote


def test_a_newer_catalogue_is_refused_by_name_and_not_written(tmp_path: Path) -> None:
    catalogue = _frozen(len(MIGRATIONS), tmp_path / "then")
    with closing(sqlite3.connect(catalogue.path)) as connection:
        connection.execute(f"{NEWER}, ('other', 'x')")
        connection.commit()
    before = catalogue.path.read_bytes()
    for ask in (lambda: catalogue.timings("p1"), lambda: catalogue.writing().__enter__()):
        with pytest.raises(Misconfigured, match=r"newer patchkit \(m999_new\); update patchkit$"):
            ask()
    assert catalogue.path.read_bytes() == before


def test_commands_name_a_newer_catalogue(tmp_path: Path) -> None:
    kb = tmp_path / "kb"
    git(tmp_path, "clone", "-q", "-b", "main", str(REPOSITORIES[0]), str(kb))
    fine(here("-C", kb, "reindex"))
    with closing(sqlite3.connect(kb / ".git" / "patchkit" / "catalogue.db")) as connection:
        connection.execute(NEWER)
        connection.commit()
    assert "update patchkit" in one_line(here("-C", kb, "reindex"), 78)
    assert "update patchkit" in one_line(here("-C", kb, "fsck"), 1)
    assert "update patchkit" in one_line(here("-C", kb, "fsck", "--repair"), 1)
    assert not list((kb / ".git" / "patchkit").glob("catalogue.db.damaged-*"))


def test_a_newer_settings_file_is_refused_by_name() -> None:
    text = f'format = 1\n[base]\nsource = "x"\nfingerprint = "sha256:{"0" * 64}"\n'
    assert parse_settings(text.encode()).base_source == "x"
    with pytest.raises(Misconfigured, match=r"^patchkit.toml: is in format 2, .*; update patchkit$"):
        parse_settings(text.replace("format = 1", "format = 2\nnew = 1").encode())
    for wrong in ("0", "true", '"2"', "1.0"):
        with pytest.raises(Misconfigured, match="format is not a number from 1"):
            parse_settings(text.replace("format = 1", f"format = {wrong}").encode())
    with pytest.raises(Misconfigured, match="update patchkit"):
        parse_settings((text + "[signing]\n").encode())


def test_a_newer_patch_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"^x: is in patch format 2, .*; update patchkit$"):
        Header.from_json({"format": 2, "new": 1}, "x")
    for wrong in (None, True, 0, "1", 1.0):
        with pytest.raises(BadInput, match="does not say its format"):
            Header.from_json({"format": wrong}, "x")
