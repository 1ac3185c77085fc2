"""`sql`: answers are those of SQLite asked apart; nothing but reading passes, and Ctrl-C ends a long one."""

from __future__ import annotations

import csv
import io
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from command_helpers import Cli, cli, git, git_environment, home, knowledge

from patchkit.database.schema import _VIEWS

__all__ = ["cli", "git_environment", "home", "knowledge"]

EXAMPLES = {
    "patches_in_force": (
        "name, facts, rank",
        [["lebron-james-da1d451a", 1, 1], ["microsoft-f3ee615e", 1, 1]],
    ),
    "facts_in_force": ("subject, target", [["LeBron James", "football"], ["Microsoft", "Rome"]]),
    "layer_shares": ("weight, rank, share > 0", [["model.layers.0.mlp.down_proj.weight", 1, 1]] * 2),
    "measured_facts": ("subject, before < after or before >= after", [["Microsoft", 1], ["LeBron James", 1]]),
    "log": ("author, patches", [["Ada", "+ lebron-james-da1d451a"], ["Ada", "+ microsoft-f3ee615e"]]),
}


@pytest.mark.parametrize("view", sorted(_VIEWS))
def test_each_view_answers(view: str, cli: Cli, knowledge: Path) -> None:
    columns, wanted = EXAMPLES[view]
    rows = [list(row.values()) for row in cli.ok("sql", f"select {columns} from {view}", "--json").json]
    rows = [row for row in rows if row[-1] is not None]  # of the log, those that touched patches
    assert sorted(rows) == sorted(wanted)


def test_the_examples_of_the_page_are_answered(cli: Cli, knowledge: Path) -> None:
    cli.ok("reindex")
    page = (Path(__file__).parents[1] / "docs" / "catalogue.md").read_text("utf-8")
    lines = [shlex.split(line) for line in page.splitlines() if line.startswith("patchkit sql ")]
    assert all(any(f"from {view}" in line[2] for line in lines) for view in _VIEWS)
    for line in lines:
        done = cli.ok(*line[1:])
        assert "lebron-james" in done.out or "LeBron James" in done.out, line


def test_a_stale_catalogue_is_brought_up_to_date_first(cli: Cli, knowledge: Path) -> None:
    count = "select count(*) as n from facts_in_force"
    assert cli.ok("sql", count, "--json").json == [{"n": 2}]
    cli.ok("revert", "microsoft", "-q")
    assert cli.ok("sql", count, "--json").json == [{"n": 1}]
    for file in (knowledge / ".git" / "patchkit").glob("catalogue.db*"):
        file.unlink()
    assert cli.ok("sql", count, "--json").json == [{"n": 1}]


def test_commits_that_end_at_the_tree_of_before_are_in_the_log(cli: Cli, knowledge: Path) -> None:
    count = "select count(*) as n from log"
    (before,) = cli.ok("sql", count, "--json").json
    cli.ok("revert", "microsoft", "-q")
    cli.ok("revert", "HEAD", "-q")
    assert cli.ok("sql", count, "--json").json == [{"n": before["n"] + 2}]
    rows = cli.ok("sql", "select patches from log where patches like '% microsoft-%'", "--json").json
    assert sorted(row["patches"][0] for row in rows) == ["+", "+", "-"]


def test_who_made_a_patch_is_not_who_merged_it(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(knowledge, "branch", "side")
    git(knowledge, "reset", "-q", "--hard", "HEAD~1")
    git(knowledge, "commit", "-q", "--allow-empty", "-m", "Aside")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Bob")
    cli.ok("merge", "side", "-q")
    assert git(knowledge, "log", "-1", "--format=%an %p").count(" ") == 2, "a merge"
    rows = cli.ok("sql", "select name, author from patches_in_force order by name", "--json").json
    assert [(row["name"].rpartition("-")[0], row["author"]) for row in rows] == [
        ("lebron-james", "Ada"),
        ("microsoft", "Ada"),
    ]


def test_the_log_is_in_order_wherever_commits_were_made(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23:30 in Honolulu is later than 02:30 on the next day in Tokyo, though its text is not."""
    for name, date in (
        ("microsoft", "2031-01-02T02:30:00+09:00"),
        ("lebron-james", "2031-01-01T23:30:00-10:00"),
    ):
        monkeypatch.setenv("GIT_COMMITTER_DATE", date)
        monkeypatch.setenv("GIT_AUTHOR_DATE", date)
        cli.ok("revert", name, "-q")
    cli.ok("reindex")
    rows = cli.ok("sql", "select date, subject from log limit 2", "--json").json
    assert [row["date"] for row in rows] == ["2031-01-02T09:30:00+00:00", "2031-01-01T17:30:00+00:00"]
    assert ["lebron" in row["subject"].lower() for row in rows] == [True, False]


def test_tables_csv_and_json_hold_the_same(cli: Cli, knowledge: Path) -> None:
    query = "select 'a, \"b\"' || char(10) as text, null as empty, 1.5 as number"
    query += ", x'00ff' as bytes, 9e999 as inf"
    assert cli.ok("sql", query, "--json").json == [
        {"text": 'a, "b"\n', "empty": None, "number": 1.5, "bytes": "00ff", "inf": None}
    ]
    read = list(csv.reader(io.StringIO(cli.ok("sql", query, "--csv").out)))
    assert read == [["text", "empty", "number", "bytes", "inf"], ['a, "b"\n', "", "1.5", "00ff", "inf"]]
    assert "\x1b" not in cli.ok("sql", "select char(27) || '[2J' as a").out
    assert cli.ok("sql", "select 1 as a where 0").out == "no row\n"
    assert cli.ok("sql", "select 1 as a where 0", "--json").json == []
    assert "two columns are named 'a'" in cli("sql", "select 1 as a, 2 as a", "--json").err


def test_full_text_search_and_recursion_are_reads(cli: Cli, knowledge: Path) -> None:
    query = "select subject from facts where id in (select rowid from facts_fts where facts_fts match 'rome')"
    assert cli.ok("sql", query, "--json").json == [{"subject": "Microsoft"}]
    count = (
        "with recursive c(n) as (select 1 union all select n + 1 from c where n < 9) select sum(n) s from c"
    )
    assert cli.ok("sql", count, "--json").json == [{"s": 45}]
    each = "select value from json_each('[1, 2]')"
    assert cli.ok("sql", each, "--json").json == [{"value": 1}, {"value": 2}]
    assert len(cli.ok("sql", "select * from pragma_table_info('facts')", "--json").json) > 5


WRITES = [
    "delete from facts",
    "insert into facts (id) values (99)",
    "update results set before = ''",
    "drop table results",
    "create table t (a)",
    "create temp table t (a)",
    "attach 'other.db' as o",
    "vacuum into 'other.db'",
    "pragma query_only = off",
    "pragma writable_schema = 1",
    "begin",
    "select load_extension('x')",
    "insert into facts_fts (facts_fts) values ('rebuild')",
]
FAULTS = [
    "select 1; delete from facts",
    "",
    "selec",
    "select * from nowhere",
    "update sqlite_master set sql = ''",
]


@pytest.mark.parametrize("query", [*WRITES, *FAULTS])
def test_what_is_no_question_is_one_line_and_changes_nothing(query: str, cli: Cli, knowledge: Path) -> None:
    for _ in range(2):  # what the first one brought up to date, the second one remembers as checked
        cli.ok("sql", "select 1")

    def held() -> list[str]:
        with closing(sqlite3.connect(knowledge / ".git" / "patchkit" / "catalogue.db")) as connection:
            return list(connection.iterdump())

    before = held()
    done = cli("sql", query)
    assert (done.code, done.out, len(done.err.splitlines())) == (65, "", 1)
    assert ("more than read" in done.err) == (query in WRITES)
    assert held() == before
    assert not (knowledge / "other.db").exists()


_TELLING = """
import sys
from patchkit.database import questions
answer = questions.answer
def told(*words):
    print("asked", flush=True)
    return answer(*words)
questions.answer = told
from patchkit.commands import main
sys.exit(main())
"""


def test_ctrl_c_ends_a_long_question_without_a_traceback(cli: Cli, knowledge: Path) -> None:
    cli.ok("sql", "select 1")
    endless = "with recursive c(n) as (select 1 union all select n + 1 from c) select count(*) from c"
    process = subprocess.Popen(
        [sys.executable, "-c", _TELLING, "sql", endless],
        cwd=knowledge,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.lstrip() == "patchkit: interrupted; see patchkit status\n"
