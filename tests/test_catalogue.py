"""The catalogue: what history says can be derived again, what was measured is never lost by it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from git_helpers import (  # noqa: F401
    BASE,
    WEIGHT,
    add,
    commit_all,
    fact,
    git,
    git_environment,
    make_store,
    numbers,
    patch,
    write,
)

from patchkit.catalogue import Catalogue
from patchkit.database import indexing
from patchkit.database import opening as database
from patchkit.errors import Busy, Misconfigured, NotWritten
from patchkit.facts import Fact, Reverse
from patchkit.git.store import Changes, GitStore
from patchkit.stack import read_stack

pytestmark = pytest.mark.usefixtures("git_environment")

ENVIRONMENT = {"device": "cpu", "torch": "2", "threads": 1}


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    return make_store(tmp_path / "kb")


@pytest.fixture
def catalogue(store: GitStore) -> Catalogue:
    return Catalogue(store.private)


def _ask(catalogue: Catalogue, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(catalogue.path)) as connection:
        return connection.execute(query).fetchall()


def _measure(catalogue: Catalogue, version: str) -> None:
    catalogue.record_results(
        version,
        results=[{"id": None, "before": {"p": 0.1}, "after": {"p": 0.9}, "took": True}] * 2,
        summary={"efficacy": 1.0},
        timings={"targets": 1.5, "solve": 0.5},
        environment=ENVIRONMENT,
    )


def test_without_a_catalogue_every_question_has_an_empty_answer(catalogue: Catalogue, tmp_path: Path) -> None:
    assert catalogue.search("anything") == []
    assert catalogue.recall("0" * 40, BASE) is None
    assert catalogue.checked_merges() == ([], [])
    assert (catalogue.builds(), catalogue.results("x"), catalogue.timings("x"), catalogue.layers("x")) == (
        [],
        [],
        {},
        [],
    )
    assert catalogue.known_fingerprint(tmp_path) is None
    assert not catalogue.current("")
    assert not catalogue.path.exists()


def test_reindex_derives_what_history_says(store: GitStore, catalogue: Catalogue) -> None:
    one, two = numbers(1, 2), numbers(3)
    add(store, one)
    add(store, two)
    store.record(Changes(patches={one.name: one.without([0]).files()}), "Out")
    store.record(Changes(removed=[two.name]), "Away", [("Patchkit-Reverts", two.id)])
    assert catalogue.reindex(store) == {"commits": 5, "patches": 3, "facts": 4}
    stack = read_stack(store)
    assert catalogue.current(stack.tree)
    assert not catalogue.current("0" * 40)
    versions = {row[0] for row in _ask(catalogue, "select id from patches")}
    assert versions == {one.id, two.id, one.without([0]).id}
    changes = _ask(catalogue, "select kind, name, patch from changes order by rowid")
    assert set(changes) == {
        ("added", one.name, one.id),
        ("added", two.name, two.id),
        ("changed", one.name, one.without([0]).id),
        ("removed", two.name, None),
    }
    (layer,) = catalogue.layers(one.id)
    assert (layer["weight"], layer["rank"], layer["form"], layer["d_out"], layer["d_in"]) == (
        WEIGHT,
        2,
        "factors",
        12,
        20,
    )
    assert layer["norm"] == pytest.approx(one.norms()[WEIGHT])
    assert layer["share"] is None
    assert _ask(catalogue, "pragma foreign_key_check") == []


def test_search_finds_facts_in_force_or_ever(store: GitStore, catalogue: Catalogue) -> None:
    lebron = Fact("LeBron James", "{} plays the sport of", "basketball", was="baseball")
    zurich = Fact("Zürich", "{} lies in", 'the "Alps" OR (not)')
    (first,) = add(store, patch([fact(1), lebron]))
    (second,) = add(store, patch([zurich]))
    store.record(Changes(removed=[second]), "Away")
    catalogue.reindex(store, norms=False)
    tree = read_stack(store).tree
    (row,) = catalogue.search("basket", tree)
    assert (row["patch"], row["line"], row["subject"], row["was"]) == (first, 2, "LeBron James", "baseball")
    assert [r["subject"] for r in catalogue.search("lebron SPORT", tree)] == ["LeBron James"]
    assert len(catalogue.search("plays", tree)) == 2
    assert len(catalogue.search("plays", tree, limit=1)) == 1
    assert catalogue.search("zurich", tree) == []
    assert [r["subject"] for r in catalogue.search("zurich")] == ["Zürich"]
    for text in ('"', "'; drop table facts; --", "*", "NOT", "a AND", "(", "-", "subject:x", "\0", ""):
        assert isinstance(catalogue.search(text, tree), list)
    assert len(catalogue.search("OR not", None)) == 1


def test_a_fact_of_several_versions_is_found_once(store: GitStore, catalogue: Catalogue) -> None:
    (name,) = add(store, patch([fact(1)], seed=1))
    again = patch([fact(1)], seed=2)
    store.record(Changes(patches={name: again.files()}), "Solved again")
    catalogue.reindex(store, norms=False)
    (held,) = read_stack(store).patches
    assert _ask(catalogue, "select count(*) from facts") == [(2,)]
    assert [row["version"] for row in catalogue.search("person")] == [held.id]


def test_a_commit_while_it_is_indexed_is_not_taken_for_indexed(
    store: GitStore, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, numbers(6))
    before, real = store.head(), indexing._Versions

    def late(*args: Any) -> Any:
        add(store, numbers(7))
        return real(*args)

    monkeypatch.setattr(indexing, "_Versions", late)
    catalogue.reindex(store)
    (state,) = catalogue.rows("select [commit] from state")
    assert state["commit"] == before != store.head()


def test_what_was_measured_survives_reindex(store: GitStore, catalogue: Catalogue, tmp_path: Path) -> None:
    one = numbers(1, 2)
    _measure(catalogue, one.id)  # before the catalogue knows the patch
    add(store, one)
    catalogue.reindex(store)
    catalogue.record_evaluation(None, "counterfact", {"S": 88.8}, ENVIRONMENT, tree="t")
    catalogue.record_norms(one.id, {WEIGHT: 2.0}, BASE, {WEIGHT: 8.0})

    class Record:
        def to_json(self) -> dict[str, Any]:
            return {"base": BASE, "patches": [one.id]}

    catalogue.record_build(tmp_path / "out", "tree", Record(), "sha256:0")
    for _ in range(2):
        rows = catalogue.results(one.id)
        assert [(row["line"], row["before"], row["after"]) for row in rows] == [
            (1, {"p": 0.1}, {"p": 0.9}),
            (2, {"p": 0.1}, {"p": 0.9}),
        ]
        assert rows[0]["more"] == {"id": None, "took": True}
        assert catalogue.timings(one.id) == {"targets": 1.5, "solve": 0.5}
        assert [row["metrics"] for row in catalogue.evaluations(one.id)] == [{"efficacy": 1.0}]
        assert catalogue.builds()[0]["record"] == {"base": BASE, "patches": [one.id]}
        assert catalogue.layers(one.id)[0]["share"] == 0.25
        assert _ask(catalogue, "select device, count(*) from environments") == [("cpu", 1)]
        catalogue.reindex(store, norms=False)
    catalogue.reindex(store, norms=True)
    assert catalogue.layers(one.id)[0]["norm"] == pytest.approx(one.norms()[WEIGHT])


def test_the_views_are_a_usable_page(store: GitStore, catalogue: Catalogue) -> None:
    one, two = numbers(1, 2), numbers(3)
    add(store, one, two)
    _measure(catalogue, one.id)
    catalogue.reindex(store)
    catalogue.record_norms(one.id, {}, BASE, {WEIGHT: 8.0})
    rows = _ask(catalogue, "select name, author, facts, rank, version from patches_in_force order by name")
    assert rows == sorted([(one.name, "Ada", 2, 2, one.id), (two.name, "Ada", 1, 1, two.id)])
    assert len(_ask(catalogue, "select * from facts_in_force")) == 3
    assert len(_ask(catalogue, "select * from measured_facts where subject = 'Person 2'")) == 1
    assert all(row[0] > 0 for row in _ask(catalogue, "select share from layer_shares"))
    subjects = [row[0] for row in _ask(catalogue, "select subject from log")]
    assert sorted(subjects) == ["Add", "Start"]


def test_a_believed_tree_is_recalled_as_it_was(store: GitStore, catalogue: Catalogue) -> None:
    full = Fact(
        "Ü",
        "{} is",
        "t",
        id="7",
        relation="P1",
        was="x",
        paraphrases=("a\nb", "c"),
        neighbors=("d",),
        reverse=Reverse("t", "{} is of", "Ü"),
        source="s",
        note="n",
    )
    add(store, patch([full, fact(1)]), numbers(2))
    catalogue.reindex(store, norms=False)
    stack = read_stack(store)
    assert catalogue.recall(stack.tree, BASE) == list(stack.patches)
    assert catalogue.recall(stack.tree, "sha256:" + "c" * 64) is None
    assert read_stack(store, memory=catalogue) == stack


@pytest.mark.parametrize(
    "alteration",
    [
        "update facts set record = replace(record, 'sport 1', 'chess')",
        "update patches set header = replace(header, 'memit', 'other')",
        "update members set files = replace(files, '100644', '120000')",
        "delete from members where rowid = 1",
        "update facts set line = -line",
    ],
)
def test_an_altered_catalogue_is_not_believed(store: GitStore, catalogue: Catalogue, alteration: str) -> None:
    add(store, numbers(1, 4), numbers(2))
    catalogue.reindex(store, norms=False)
    stack = read_stack(store)
    with closing(sqlite3.connect(catalogue.path)) as connection, connection:
        connection.execute(alteration)
    assert catalogue.recall(stack.tree, BASE) is None
    assert read_stack(store, memory=catalogue) == stack
    catalogue.reindex(store, norms=False)
    assert catalogue.recall(stack.tree, BASE) == list(stack.patches)
    assert sorted(_ask(catalogue, "select distinct line from facts")) == [(1,), (2,)]


def test_a_version_of_the_past_that_cannot_be_believed_is_counted_only(
    store: GitStore, catalogue: Catalogue
) -> None:
    (name,) = add(store, numbers(1))
    write(store, name, {"delta.safetensors": b"rubbish", "facts.jsonl": b"rubbish"})
    commit_all(store, "Broken")
    assert catalogue.reindex(store, norms=False)["unreadable versions"] == 1
    assert not catalogue.current(store.tree().id)
    write(store, name, numbers(1))
    commit_all(store, "Mended")
    assert catalogue.reindex(store)["unreadable versions"] == 1
    assert catalogue.current(store.tree().id)


def test_a_damaged_catalogue_is_put_aside_by_reindex_alone(store: GitStore, catalogue: Catalogue) -> None:
    add(store, numbers(1))
    catalogue.reindex(store, norms=False)
    catalogue.path.write_bytes(b"this is no database" * 100)
    assert catalogue.search("person") == []
    assert len(read_stack(store, memory=catalogue).patches) == 1
    with pytest.raises(Misconfigured, match=r"is damaged .*patchkit reindex") as error:
        _measure(catalogue, "x")
    assert "\n" not in str(error.value)
    catalogue.reindex(store, norms=False)
    assert len(catalogue.search("person")) == 1
    (aside,) = store.private.glob("catalogue.db.damaged-*")
    assert aside.read_bytes().startswith(b"this is no database")


def test_a_history_with_bytes_that_are_no_text(store: GitStore, catalogue: Catalogue, monkeypatch) -> None:
    monkeypatch.setenv("GIT_AUTHOR_NAME", os.fsdecode(b"\xffEve"))
    git(store.root, "config", "i18n.commitEncoding", "no-such")
    write(store, numbers(1).name, numbers(1))
    commit_all(store)
    assert catalogue.reindex(store, norms=False)["patches"] == 1


def test_a_writer_that_waits_too_long_is_told(store: GitStore, catalogue: Catalogue, monkeypatch) -> None:
    catalogue.reindex(store, norms=False)
    monkeypatch.setattr(database, "PATIENCE", 0.1)
    with catalogue.writing() as db:
        db["timings"].insert({"phase": "half done", "seconds": 1.0})
        failures: list[BaseException] = []

        def second() -> None:
            try:
                _measure(catalogue, "x")
            except Busy as error:
                failures.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert "another patchkit command is writing here" in str(failures[0])
    assert _ask(catalogue, "select phase from timings") == [("half done",)]


def test_first_writers_at_once_make_one_catalogue(tmp_path: Path) -> None:
    """Each waits at a barrier of files, then writes to a catalogue that is not there yet."""
    code = (
        "import sys, time; from pathlib import Path; import sqlite_utils, patchkit.database.schema; "
        "from patchkit.catalogue import Catalogue; at, me = Path(sys.argv[1]), sys.argv[2]; "
        "(at / me).touch(); end = time.monotonic() + 30\n"
        "while len(list(at.glob('w*'))) < 3 and time.monotonic() < end: pass\n"
        "for number in range(8):\n"
        "    with Catalogue(at / f'c{number}').writing() as db: db['timings'].insert({'phase': me})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, f"w{n}"], stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    assert [writer.communicate(timeout=60)[1] for writer in writers] == ["", "", ""]
    for number in range(8):
        rows = _ask(Catalogue(tmp_path / f"c{number}"), "select phase from timings order by phase")
        assert rows == [("w0",), ("w1",), ("w2",)]


def test_a_failure_leaves_nothing_of_its_block(store: GitStore, catalogue: Catalogue) -> None:
    def half() -> None:
        with catalogue.writing() as db:
            db["timings"].insert({"phase": "half done", "seconds": 1.0})
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        half()
    assert _ask(catalogue, "select * from timings") == []
    assert _ask(catalogue, "pragma journal_mode") == [("wal",)]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = Catalogue(tmp_path / "file")
    for act in (lambda: _measure(blocked, "x"), lambda: blocked.record_norms("x", {}, BASE, {})):
        with pytest.raises(NotWritten, match="make room or give write access"):
            act()
    blocked.remember_merges("0" * 40, [])
    blocked.believe("0" * 40, BASE, [])


def _base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_bytes(b"{}")
    old = time.time() - 100
    os.utime(folder / "model.safetensors", (old, old))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"weightz"),
        lambda path: path.rename(path.with_name("other.safetensors")),
        lambda path: (path.rename(path.with_suffix(".old")), path.write_bytes(b"weights")),
        lambda path: path.with_name("more.safetensors").write_bytes(b""),
        lambda path: os.utime(path),
    ],
)
def test_a_fingerprint_is_known_until_a_file_changes(
    catalogue: Catalogue, tmp_path: Path, monkeypatch, change: Callable[[Path], object]
) -> None:
    folder = _base(tmp_path / "base")
    monkeypatch.setattr("patchkit.catalogue._SETTLED", 0.0)
    catalogue.remember_fingerprint(folder, BASE)
    assert catalogue.known_fingerprint(folder) == BASE
    (folder / "config.json").write_bytes(b"{ }")
    assert catalogue.known_fingerprint(folder) == BASE
    change(folder / "model.safetensors")
    assert catalogue.known_fingerprint(folder) is None


def test_a_file_that_was_just_written_is_hashed_again(catalogue: Catalogue, tmp_path: Path) -> None:
    """Its time cannot tell a change within the same tick of the clock."""
    folder = _base(tmp_path / "base")
    catalogue.remember_fingerprint(folder, BASE)
    assert catalogue.known_fingerprint(folder) is None


def test_migrations_are_applied_once_and_an_old_catalogue_is_brought_up(catalogue: Catalogue) -> None:
    for _ in range(2):
        _measure(catalogue, "x")
    names = [row[0] for row in _ask(catalogue, "select name from _sqlite_migrations order by id")]
    first = ["m001_history", "m002_beliefs", "m003_measured", "m004_views", "m005_utc"]
    assert names == [*first, "m006_authors", "m007_versions"]
    assert len(catalogue.results("x")) == 4
