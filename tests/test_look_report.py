"""`report`: a page with what Git, the catalogue and the factors say; hostile text, large stacks, a phone."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import pytest
from command_helpers import Cli, cli, git, git_environment, home, knowledge, tiny_base
from page_helpers import CHROMIUM, HOSTILE, Reader, opened

from patchkit.actions import report as reporting
from patchkit.actions.diff import WeightDifference
from patchkit.actions.log import Entry, History
from patchkit.actions.report import Measured, Overlap, Report, WeightNorm, most_interfering
from patchkit.actions.report_page import report_page
from patchkit.actions.status import Row
from patchkit.checkpoint import Checkpoint
from patchkit.errors import WouldOverwrite
from patchkit.facts import Fact
from patchkit.git.history import Commit, GraphRow
from patchkit.problem import Problem
from patchkit.repository import Repository
from patchkit.settings import Settings

__all__ = ["cli", "git_environment", "home", "knowledge"]

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
MARKUP = '<b onclick="x">&amp; {{ 7*7 }}</b>'


def written(cli: Cli, place: Path, *args: str) -> str:
    cli.ok("report", *args, "--out", place, "-q")
    return place.read_text("utf-8")


def a_report(word: str, count: int = 2) -> Report:
    """A report in which every text that someone else wrote is ``word``."""
    when = datetime(2026, 1, 2, tzinfo=UTC)
    names = tuple(f"{word}{number}" for number in range(count))
    commit = Commit("c" * 40, (), word, word, when, word, (), names, (), (), False, ())
    state = {"rewrite": {"target": 0.25, "says": False, "text": word}}
    result = {"before": state, "after": state}
    rows = tuple(Row(name, "d" * 64, 1, 1, 9, when, word, "c" * 40, 1.5, 0.01) for name in names)
    facts = [Measured(name, 1, Fact(word, "{} is", word), result) for name in names]
    values = tuple(tuple(None if i == j else 0.5 for j in range(count)) for i in range(count))
    return Report(
        name=word,
        revision=word,
        commit="c" * 40,
        settings=Settings(word, word, word, {word: word, "layers": [1, 2]}),
        problems=(Problem(word, word, word),),
        history=History((Entry(commit),), (GraphRow("c" * 40, ("* ", "| ")),)),
        commits=1,
        patches=count,
        rows=rows,
        facts_in_force=count,
        facts=tuple(facts),
        weights=(WeightNorm(WeightDifference(word, 2, 1.5, None), 0.02),),
        overlap=Overlap(names, values, count),
        left_out=None,
    )


def test_hostile_text_stays_text_in_the_page() -> None:
    harmless, hostile = (Reader(report_page(a_report(word))) for word in ("word", HOSTILE))
    assert hostile.tags == harmless.tags
    assert hostile.attributes == harmless.attributes
    assert not hostile.tags & {"script", "img", "iframe", "link", "object"}
    assert hostile.text.count("<script>alert(1)</script>") == harmless.text.count("word") > 20
    page = report_page(a_report("a\x1b[2J\u202eb\ud800c\0d"))
    assert not {"\x1b", "\u202e", "\ud800", "\0"} & set(page)


def test_a_repository_of_a_stranger_is_told_as_text(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
        monkeypatch.setenv(name, f"Eve {MARKUP.replace('<', '‹<').replace('>', '')}")
    fact = f"{MARKUP} | {{}} lies in | {MARKUP}"
    cli.ok("commit", "--fact", fact, "--set", "steps=1", "-m", f"Say {MARKUP}", "-q")
    read = Reader(written(cli, knowledge / "r.html"))
    assert not read.tags & {"b", "script"}
    assert not read.attributes & {"onclick", "src", "onload"}
    assert f"{MARKUP} lies in" in read.text
    assert f"Say {MARKUP}" in read.text
    assert 'Eve ‹b onclick="x"&amp; {{ 7*7 }}‹/b' in read.text


def test_the_page_says_what_git_and_the_factors_say(cli: Cli, knowledge: Path) -> None:
    page = written(cli, knowledge.parent / "r.html")
    text = " ".join(Reader(re.sub("(?=</[td][dht]>)", " ", page)).text.split())
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
    for line in git(knowledge, "log", "--format=%H %an|%s", "-2").splitlines():
        told, _, subject = line.partition("|")
        assert (
            f"* {told[:10]} {git(knowledge, 'log', '-1', '--format=%as, %an', told[:40])} | {subject}" in text
        )
    repository = Repository.open(knowledge)
    first, second = repository.patches().values()
    (name,) = first.deltas
    updates = {p.name: p.deltas[name].B.double() @ p.deltas[name].A.double() for p in (first, second)}
    base = Checkpoint.open(tiny_base()).read(name).double().norm()
    norm = float(sum(updates.values()).norm())
    assert f"{name} 2 {norm:.3g} {100 * norm / float(base):.3g} %" in text
    heat = text.partition("1 and more")[2]
    for patch, other in ((first, second), (second, first)):
        norm = float(updates[patch.name].norm())
        assert f"{patch.name} Ada 1 1 {norm:.3g} {100 * norm / float(base):.3g} %" in text
        moved = updates[other.name] @ patch.solution.keys[name][0].double()
        assert f"{patch.name} {float(moved.norm() / patch.deltas[name].B.double().norm()):.2g}" in heat
    shown = cli.ok("show", "lebron-james", "--json").json["facts"][0]["measured"]
    before, after = shown["before"]["rewrite"], shown["after"]["rewrite"]
    said = "yes" if after["says"] else "no"
    assert f"football {before['target']:.3f} {after['target']:.3f} {said}" in text
    assert repository.settings.base_fingerprint in text
    assert "learning_rate 1.0" in text
    assert "patchkit revert microsoft-f3ee615e" in text


def test_the_same_commit_gives_the_same_page(cli: Cli, knowledge: Path) -> None:
    first = written(cli, knowledge.parent / "a.html", "HEAD")
    assert written(cli, knowledge.parent / "a.html", "HEAD") == first
    older = written(cli, knowledge.parent / "a.html", "HEAD~1")
    assert "microsoft" not in older
    assert "Fewer than two patches" in older


def test_only_a_report_is_replaced(cli: Cli, knowledge: Path, home: Path) -> None:
    said = cli.ok("report", "--out", home / "r.html").out
    assert said == f"written: {home / 'r.html'}\n"
    (home / "mine.html").write_text("<!DOCTYPE html>\n<!-- mine -->")
    assert cli("report", "--out", home / "mine.html").code == WouldOverwrite.exit_code
    assert (home / "mine.html").read_text() == "<!DOCTYPE html>\n<!-- mine -->"
    assert cli("report", "--out", home).code == WouldOverwrite.exit_code
    assert cli("report", "--out", home / "no" / "r.html").code == 74


def test_a_tree_that_cannot_be_believed_is_reported_with_its_problems(cli: Cli, knowledge: Path) -> None:
    folder = next((knowledge / "patches").glob("lebron*"))
    (folder / "facts.jsonl").write_text("{}\n")
    git(knowledge, "commit", "-q", "-am", "Break it")
    done = cli.ok("report", "--out", knowledge / "r.html")
    assert done.out.endswith(", 1 problem\n")
    text = Reader((knowledge / "r.html").read_text()).text
    assert "cannot be believed" in text
    assert f"patches/{folder.name}/facts.jsonl" in text
    assert "Break it" in text


def test_without_a_patch_or_without_a_commit_there_is_a_page_too(cli: Cli, home: Path) -> None:
    cli.ok("init", tiny_base(), "new", "-q")
    text = Reader(written(cli, home / "r.html", "-C", "new")).text
    assert "No patch is in force: the model is the base." in text
    assert "No commit changed patches yet." in text


def test_of_a_large_stack_the_page_shows_a_part_and_says_so(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.ok("commit", "--fact", "Rome | {} lies in | Japan", "--set", "steps=1", "-q")
    for name, limit in (("ROWS", 1), ("FACTS", 2), ("LOADED", 2), ("CELLS", 1), ("COMMITS", 1)):
        monkeypatch.setattr(reporting, name, limit)
    text = " ".join(Reader(written(cli, knowledge / "r.html")).text.split())
    assert "3 patches with 3 facts" in text
    assert "The newest 1 of 3 are shown." in text.partition("Newest first")[2]
    assert "The newest 2 of 3 facts are shown." in text
    assert "patchkit diff base" in text
    assert (
        "The newest 2 of 3 patches were compared. The 1 that are disturbed or disturb most are shown." in text
    )
    assert "lebron-james" not in text


def test_the_patches_that_interfere_most_are_chosen_in_their_order() -> None:
    found = {"a": {"b": 0.1, "c": 0.0, "d": 0.0}, "b": {"a": 0.0, "c": 0.0, "d": 0.0}, "c": None}
    found["d"] = {"a": 0.0, "b": 0.0, "c": math.inf}
    assert most_interfering(found, 2) == ["c", "d"]
    assert most_interfering(found, 3) == ["a", "c", "d"]
    assert most_interfering(found, 9) == ["a", "b", "c", "d"]


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_scrolling_sideways(width: int, tmp_path: Path) -> None:
    """In a frame of that width, measured from outside: the page itself runs no script."""
    report = dataclasses.replace(a_report("unbroken" * 12, 20), name="A report")
    outer = tmp_path / "outer.html"
    measure = "document.title = this.contentDocument.documentElement.scrollWidth + ' wide'"
    frame = f'<iframe width="{width}" height="900" onload="{measure}" srcdoc="{escape(report_page(report))}">'
    outer.write_text(f"<title>waiting</title>{frame}</iframe>", "utf-8")
    document, asked = opened(outer, tmp_path / "browser")
    assert f"<title>{width} wide</title>" in document or f"<title>{width - 15} wide</title>" in document
    assert asked == []


@needs_chromium
def test_a_browser_runs_nothing_of_what_others_wrote(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(report_page(a_report(f"{HOSTILE}<script>document.title='owned'</script>")), "utf-8")
    document, asked = opened(page, tmp_path / "browser")
    assert "<title>owned" not in document
    assert 'class="heat"' in document
    assert asked == []
