"""`log`: its facts, searches and graph, against plain Git."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from command_helpers import Cli, cli
from git_helpers import add, fact, git, git_environment, make_store, numbers, patch, write

from patchkit.actions.log import history_of
from patchkit.facts import Fact
from patchkit.git.store import Changes, GitStore
from patchkit.repository import Repository

__all__ = ["cli", "git_environment"]

pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    return make_store(tmp_path / "knowledge")


def subjects(cli: Cli, store: GitStore, *args: str) -> list[str]:
    return [row["subject"] for row in cli.ok("-C", store.root, "log", "--json", *args).json]


def test_facts_are_those_of_the_files_that_git_compares(cli: Cli, store: GitStore) -> None:
    (name,) = add(store, numbers(1, 2), message="Two")
    store.record(Changes(patches={name: patch([fact(1, "chess"), fact(3)]).files()}), "Again")
    store.record(Changes(removed=(name,)), "Away")
    found = cli.ok("-C", store.root, "log", "--facts", "--json").json
    for row in found:
        raw = git(store.root, "show", "--format=", "--no-renames", row["id"], "--", "*.jsonl")
        lines = {
            sign: [json.loads(line[1:]) for line in raw.splitlines() if re.match(rf"\{sign}{{", line)]
            for sign in "+-"
        }
        came = {(f["subject"], f["target"]) for f in lines["+"]}
        went = {(f["subject"], f["target"]) for f in lines["-"]}
        moves = row["facts"]
        assert {(m["subject"], m["target"]) for m in moves if m["kind"] != "removed"} == came
        assert {(m["subject"], m["target"]) for m in moves if m["kind"] == "removed"} | {
            (m["subject"], m["target_before"]) for m in moves if m["kind"] == "changed"
        } == went
    assert [sorted((m["kind"], m["subject"]) for m in row["facts"]) for row in found] == [
        [("removed", "Person 1"), ("removed", "Person 3")],
        [("added", "Person 3"), ("changed", "Person 1"), ("removed", "Person 2")],
        [("added", "Person 1"), ("added", "Person 2")],
    ]
    text = cli.ok("-C", store.root, "log", "--facts").out
    assert "      ~ Person 1 plays the sport of → sport 1 ⇒ chess" in text
    assert "facts" not in cli.ok("-C", store.root, "log", "--json").json[0]


def test_a_fact_that_moves_to_another_patch_is_one_move(cli: Cli, store: GitStore) -> None:
    (old,) = add(store, numbers(1))
    new = patch([fact(1, "chess")])
    store.record(Changes(patches={new.name: new.files()}, removed=(old,)), "Replace")
    (move,) = cli.ok("-C", store.root, "log", "--facts", "-n", "1", "--json").json[0]["facts"]
    assert (move["kind"], move["patch_before"], move["patch"]) == ("changed", old, new.name)
    assert f"({old} ⇒ {new.name})" in cli.ok("-C", store.root, "log", "--facts").out


def test_subject_and_text_find_the_commits_that_touch_them(cli: Cli, store: GitStore) -> None:
    add(store, numbers(1, 2), message="one two")
    add(store, numbers(3), message="three")
    (four,) = add(
        store, patch([Fact("Person 4", "{} sings", "Rome", note="from a $[.*] book")]), message="four"
    )
    store.record(Changes(removed=(four,)), "away")
    assert subjects(cli, store, "--subject", "person  1") == ["one two"]
    assert subjects(cli, store, "--subject", "Person") == []
    assert subjects(cli, store, "-S", "Person 4 sings") == ["away", "four"]
    assert subjects(cli, store, "-S", "$[.*]") == ["away", "four"]
    assert subjects(cli, store, "-S", "person 4") == []
    assert subjects(cli, store, "-S", "sport", "-n", "1") == ["three"]
    assert subjects(cli, store, "-S", "sport", "--subject", "Person 3") == ["three"]
    assert subjects(cli, store, "HEAD~1", "-S", "Rome") == ["four"]
    (row,) = cli.ok("-C", store.root, "log", "--facts", "--subject", "Person 2", "--json").json
    assert [move["subject"] for move in row["facts"]] == ["Person 2"]
    assert cli.ok("-C", store.root, "log", "-S", "nothing").out == "no commit fits\n"


def test_a_text_is_found_where_plain_git_finds_it(cli: Cli, store: GitStore) -> None:
    for number in range(8):
        add(store, numbers(number), message=f"add {number}")
    git(store.root, "revert", "--no-edit", "HEAD~3")
    for text in ("sport 4", "sport 7", "Person", "nothing"):
        wanted = git(store.root, "log", f"-S{text}", "--format=%H", "--", "*.jsonl").split()
        found = [row["id"] for row in cli.ok("-C", store.root, "log", "-S", text, "--json").json]
        assert found == wanted


@pytest.mark.parametrize("span", ["v1..main", "v1..", "..a", "a..v1", "b..a", "v1..v1"])
def test_a_range_lists_what_git_lists(cli: Cli, store: GitStore, span: str) -> None:
    branched(store)
    git(store.root, "tag", "v1", "main~2")
    wanted = git(store.root, "log", "--format=%H", span, "--", "patches").split()
    rows = cli.ok("-C", store.root, "log", "--graph", *(["--facts"] if wanted else []), span).out
    found = {row["id"] for row in cli.ok("-C", store.root, "log", "--json", span).json}
    listed = git(store.root, "log", "--full-history", "--format=%H", span, "--", "patches").split()
    assert found == set(listed) >= set(wanted)
    assert all(commit[:10] in rows for commit in wanted)
    left = git(store.root, "log", "--format=%H", span.split("..")[0] or "HEAD").split()
    assert not any(commit[:10] in rows for commit in left)


@pytest.mark.parametrize(
    ("span", "said"),
    [
        ("v9..main", "'v9' names no commit"),
        ("main..v9", "'v9' names no commit"),
        ("a...b", "a range is A..B"),
    ],
)
def test_a_range_that_is_none_is_refused(cli: Cli, store: GitStore, span: str, said: str) -> None:
    add(store, numbers(1))
    assert said in cli("-C", store.root, "log", span).err


def branched(store: GitStore) -> None:
    """Two side branches, one merged into the other's merge, and an octopus."""
    add(store, numbers(1), message="c1")
    for side, number in (("a", 2), ("b", 3), ("c", 4), ("d", 5)):
        git(store.root, "switch", "-q", "-c", side, "main")
        add(store, numbers(number), message=f"on {side}")
        add(store, numbers(number + 10), message=f"more on {side}")
    git(store.root, "switch", "-q", "main")
    add(store, numbers(6), message="c2")
    git(store.root, "merge", "-q", "--no-ff", "-m", "merge a", "a")
    git(store.root, "merge", "-q", "--no-ff", "-m", "merge the others", "b", "c", "d")
    add(store, numbers(7), message="c3")
    (store.root / "README").write_text("not of the stack")
    git(store.root, "add", "-A")
    git(store.root, "commit", "-q", "-m", "Elsewhere")


def test_the_graph_is_the_one_that_git_draws(cli: Cli, store: GitStore) -> None:
    """Commits, merges and every line that turns, as `git log --graph` has them for entries of two lines."""
    branched(store)
    format = "--format=%h  %ad  %an%n    %s"
    wanted = git(
        store.root, "log", "--graph", "--full-history", "--simplify-merges", "--abbrev=10", format,
        "--date=format:%Y-%m-%d %H:%M", "--", "patches",
    ).splitlines()[:-2]  # fmt: skip
    drawn = cli.ok("-C", store.root, "log", "--graph").out.splitlines()
    said = re.compile(r"[0-9a-f]{10}  \d|    (on|more|merge|c\d)")
    assert [line for line in drawn if said.search(line)] == [line for line in wanted if said.search(line)]
    assert sum("merge" in line for line in drawn) == 2
    assert not any("Elsewhere" in line for line in drawn)


def test_each_commit_of_the_graph_hangs_on_its_parents(cli: Cli, store: GitStore) -> None:
    """The edges are followed down by their columns: they end in the parents that Git names."""
    branched(store)
    assert followed(cli.ok("-C", store.root, "log", "--graph").out) == parents(store)
    assert followed(cli.ok("-C", store.root, "log", "--graph", "--facts").out) == parents(store)


def parents(store: GitStore) -> dict[str, set[str]]:
    lines = git(
        store.root, "log", "--full-history", "--simplify-merges", "--parents",
        "--abbrev=10", "--format=%h %p", "--", "patches",
    ).splitlines()  # fmt: skip
    *rows, (start,) = map(str.split, lines)  # the commit that only made patches/.gitattributes
    return {row[0][:10]: {word[:10] for word in row[1:]} - {start[:10]} for row in rows}


def followed(drawn: str) -> dict[str, set[str]]:
    """Commit -> its parents, off the picture: an edge goes on below "|", left below "/", right below "\\"."""
    found: dict[str, set[str]] = {}
    above: dict[int, set[str]] = {}  # column -> commits whose edge comes down to it
    for line in drawn.splitlines():
        edges = re.match(r"^[|\\/ _.*-]*", line)[0]  # type: ignore[index]
        oid = re.search(r"\*[|\\/ _.-]*([0-9a-f]{10})  ", line)
        below: dict[int, set[str]] = {}
        arms = re.search(r"\*((?:-*[-.])*)", edges)
        for column, character in enumerate(edges):
            here = above.get(column, set())
            if character == "|":
                below.setdefault(column, set()).update(here)
            elif character == "/":
                below.setdefault(column - 1, set()).update(above.get(column + 1, set()) | here)
            elif character == "\\":
                below.setdefault(column + 1, set()).update(above.get(column - 1, set()) | here)
            elif character == "*":
                assert oid is not None
                for child in here:
                    found[child].add(oid[1])
                found.setdefault(oid[1], set())
                below.setdefault(column, set()).add(oid[1])
                for arm in range(column + 2, column + 1 + len(arms[1] if arms else "")):
                    if edges[arm] in "-.":
                        below.setdefault(arm + 1, set()).add(oid[1])
        above = below
    return found


def test_a_searched_graph_shows_what_was_found_and_keeps_the_edges(cli: Cli, store: GitStore) -> None:
    branched(store)
    drawn = cli.ok("-C", store.root, "log", "--graph", "-S", "sport 2").out
    ids = re.findall(r"\* .*?([0-9a-f]{10})  ", drawn)
    wanted = git(
        store.root,
        "log",
        "--topo-order",
        "--no-patch",
        "--diff-merges=first-parent",
        "-Ssport 2",
        "--format=%h",
        "--abbrev=10",
        "--",
        "*.jsonl",
    )
    assert ids == wanted.split()
    assert followed(drawn)[ids[0]] == {ids[1]}
    assert cli("-C", store.root, "log", "--graph", "--json").code == 2


def test_a_linear_history_is_a_straight_graph(cli: Cli, store: GitStore) -> None:
    add(store, numbers(1), message="one")
    add(store, numbers(2), message="two")
    lines = cli.ok("-C", store.root, "log", "--graph").out.splitlines()
    assert [line[0] for line in lines] == ["*", "|", "|"] * 2
    assert len(cli.ok("-C", store.root, "log", "--graph", "-n", "1").out.splitlines()) == 3


def test_a_damaged_version_in_the_history_is_passed_over(cli: Cli, store: GitStore) -> None:
    (name,) = add(store, numbers(1), message="one")
    write(store, name, {"facts.jsonl": b"no facts\n"})
    git(store.root, "commit", "-q", "-am", "Broken")
    found = cli.ok("-C", store.root, "log", "--facts", "--json").json
    assert [[m["kind"] for m in row["facts"]] for row in found] == [["removed"], ["added"]]


def test_an_empty_history(cli: Cli, store: GitStore) -> None:
    for options in ((), ("--facts",), ("--graph",), ("--subject", "x")):
        assert cli.ok("-C", store.root, "log", *options).out.startswith("no "), options
    assert cli("-C", store.root, "log", "nowhere", "--facts").code == 66


def test_searching_a_thousand_commits_takes_less_than_seconds(store: GitStore) -> None:
    """Written by git fast-import; processor time of this process."""
    lines = []
    for number in range(1000):
        text = fact(number).to_line() + "\n"
        size = len(text.encode())
        lines.append(
            f"commit refs/heads/main\ncommitter A <a@x> {1_700_000_000 + number} +0000\ndata 1\nx\n"
            + ("from refs/heads/main^0\n" if not number else "")
            + f"M 100644 inline patches/person-{number:08x}/facts.jsonl\ndata {size}\n{text}\n"
        )
    stream = "".join(lines).encode()
    store.git.write("fast_import", "--quiet", "--force", stdin=stream)
    started = time.process_time()
    found = Repository.open(store.root).log(text="sport 17")
    assert time.process_time() - started < 3
    assert len(found.entries) == 11
    entries = history_of(store, store.history())
    assert next(entries).facts[0].fact.subject == "Person 999"  # type: ignore[index]
