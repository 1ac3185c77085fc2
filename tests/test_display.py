"""What reaches a terminal: printable text, tables that fit, progress only where it is seen."""

from __future__ import annotations

import io
import sys
import unicodedata

import pytest
from command_helpers import cli, git_environment
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from patchkit.actions.pages import percent
from patchkit.commands.display import (
    Column,
    console,
    counted,
    human_size,
    in_bytes,
    printable,
    progress_bars,
    table,
    text,
)
from patchkit.commands.results import one_line

__all__ = ["cli", "git_environment"]


@given(st.text())
def test_printable_text_holds_nothing_that_a_terminal_acts_on(value: str) -> None:
    shown = printable(value)
    acting = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}
    assert all(unicodedata.category(c) not in acting or c == "\u200d" for c in shown)
    shown.encode("utf-8")  # can be printed
    harmless = "".join(c for c in value if unicodedata.category(c) not in acting)
    assert all(c in shown for c in harmless)


@pytest.mark.parametrize("value", ["Émile Zola", "日本", "👩\u200d🚀", "[bold]x[/bold]", "λ ‖ΔW‖ – 5 %"])
def test_printable_leaves_words_alone(value: str) -> None:
    assert printable(value) == value
    assert text(value).plain == value


def test_printable_shows_code_points() -> None:
    assert printable("a\x1b[31m\u202eb\n\ud800") == "a\\u001b[31m\\u202eb\\u000a\\ud800"


def shown(width: int, columns: list[Column], rows: list[tuple[object, ...]]) -> list[str]:
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(table(out, columns, rows))
    return out.file.getvalue().splitlines()  # type: ignore[attr-defined]


@given(
    width=st.integers(40, 140),
    rows=st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60), st.integers(0, 999)), max_size=4),
)
def test_tables_fit_and_never_wrap(width: int, rows: list[tuple[str, str, int]]) -> None:
    columns = [Column("subject", 2), Column("prompt", 1), Column("n", right=True)]
    lines = shown(width, columns, list(rows))
    assert len(lines) == len(rows) + 1
    assert all(cell_len(line) <= width for line in lines)
    assert [line.split()[-1] for line in lines[1:]] == [str(row[2]) for row in rows]


def test_a_long_cell_ends_in_an_ellipsis_and_a_short_one_is_whole() -> None:
    columns = [Column("a", 1), Column("b"), Column("c", 1)]
    (_, line) = shown(40, columns, [("x" * 80, "fixed", "short")])
    assert "…" in line
    assert "fixed" in line
    assert line.rstrip().endswith("short")


def test_markup_in_a_cell_is_text() -> None:
    assert "[red]x[/foo]" in shown(60, [Column("a", 1)], [("[red]x[/foo]",)])[1]


def test_numbers_for_people() -> None:
    assert [human_size(size) for size in (0, 999, 1000, 2340, 9_995_000, 3_000_000_000, 4 * 10**15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "2.34 kB",
        "9.99 MB",
        "3 GB",
        "4e+03 TB",
    ]
    assert [percent(share) for share in (None, 0.0, 1.0, 0.12345)] == ["–", "0 %", "100 %", "12.3 %"]
    assert [human_size(size) for size in (999_499, 999_700, 999_999_999)] == ["999 kB", "1 MB", "1 GB"]
    assert [percent(share, 2) for share in (0.0123, 0.996, 1.304, 25.6)] == [
        "1.2 %",
        "100 %",
        "130 %",
        "2560 %",
    ]
    assert [counted(n, noun) for n, noun in ((0, "fact"), (1, "fact"), (2, "patch"))] == [
        "0 facts",
        "1 fact",
        "2 patches",
    ]


def test_a_continuation_on_one_line() -> None:
    assert one_line(" a\n b\t c ") == "a b c"
    assert one_line("x" * 41) == "x" * 39 + "…"
    assert one_line("x" * 40) == "x" * 40


def test_the_console_is_plain_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    long = "word " * 60
    console().print(text(long, "bold red"))
    assert capsys.readouterr().out == f"{long}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    console().print(text("word", "bold red"))
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    console().print(text("word", "bold red"))
    assert "\x1b" not in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_only_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bars() as bars:
        assert bars is None
        assert in_bytes(bars) is None
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bars(quiet=True) as bars:
        assert bars is None
    monkeypatch.setenv("TERM", "xterm")
    with progress_bars() as bars:
        assert bars is not None
        bars("targets", 1, 4)
        bars("targets", 4, 4)
        bars("nothing", 0, 0)
        told = in_bytes(bars)
        assert told is not None
        told(5, 10, "hashing")
    for word in ("targets", "100 %", "hashing", "50 %"):
        assert word in screen.getvalue()
