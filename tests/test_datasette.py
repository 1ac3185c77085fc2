"""The catalogue in Datasette: the metadata name what there is, and a running Datasette takes them."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from command_helpers import Cli, cli, git_environment, home, knowledge

from patchkit.database.datasette import metadata

__all__ = ["cli", "git_environment", "home", "knowledge"]

TABLES = metadata()["databases"]["catalogue"]["tables"]
Ask = Callable[[str], Any]


def test_the_metadata_name_every_table_and_view_and_only_columns_that_are_there(
    cli: Cli, knowledge: object
) -> None:
    cli.ok("reindex")
    with closing(sqlite3.connect(cli.ok("path", "catalogue").out.strip())) as connection:
        names = {row[0] for row in connection.execute("select name from sqlite_master where type != 'index'")}
        shown = {n for n in names if not n.startswith(("facts_", "sqlite_")) or n == "facts_in_force"}
        assert set(TABLES) == shown
        for name, about in TABLES.items():
            columns = {row[1] for row in connection.execute(f"pragma table_info([{name}])")}
            used = {about[key] for key in ("sort_desc", "label_column", "fts_pk") if key in about}
            assert used | set(about.get("facets", ())) <= columns, name
            assert about.get("hidden") or about["description"], name


@pytest.fixture
def ask(cli: Cli, knowledge: object, unused_port: int) -> Iterator[Ask]:
    """Asks a Datasette that serves the catalogue to this machine alone."""
    cli.ok("reindex")
    places = [cli.ok("path", what).out.strip() for what in ("catalogue", "datasette-metadata")]
    command = [
        sys.executable,
        "-m",
        "datasette",
        places[0],
        "--metadata",
        places[1],
        "--port",
        str(unused_port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/{path}", timeout=30) as answer:
            return json.load(answer)

    try:
        for _ in range(120):
            try:
                get("-/versions.json")
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.25)
        yield get
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.skipif(importlib.util.find_spec("datasette") is None, reason="datasette is not installed")
def test_datasette_shows_the_catalogue_with_its_facets_order_and_search(ask: Ask) -> None:
    assert ask("-/metadata.json")["title"] == "patchkit"
    hidden = {table["name"] for table in ask("catalogue.json")["tables"] if table["hidden"]}
    assert {"members", "state", "fingerprints"} <= hidden
    assert not {"facts", "patches"} & hidden
    patches = ask("catalogue/patches_in_force.json?_shape=objects&_extra=facet_results")
    dates = [row["date"] for row in patches["rows"]]
    assert dates == sorted(dates, reverse=True)
    facets = patches["facet_results"]
    assert "Ada" in json.dumps(facets)
    found = ask("catalogue/facts.json?_shape=objects&_search=rome")["rows"]
    assert [row["subject"] for row in found] == ["Microsoft"]
