"""What a person sees: at 80 and at 120 columns no line is longer, no fact is cut, and no colour is pale."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from command_helpers import Cli, cli, facts_file, git_environment, home, knowledge
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console

from patchkit.commands import display
from patchkit.commands.display import Column, duration, folded, progress_bars, say, table, time_told

__all__ = ["cli", "git_environment", "home", "knowledge"]

WIDTHS = (80, 120)
LONG = "The International Organisation for Standardisation of Names"
NAME = "the-international-organisation-for-stand"  # a slug as long as they get
HOSTILE = (
    {"subject": LONG, "prompt": "As all know who read it, the seat of {} is", "target": "a town near Rome"},
    {"subject": "東京都新宿区西新宿二丁目", "prompt": "{}は日本国の首都にある高い建物の", "target": "日本国"},
    {"subject": "E\u0301mile Zo\u0308la\u0323\u0301", "prompt": "{} lies in", "target": "Pa\u0301ri\u0308s"},
    {"subject": "[bold red][/foo] \U0001f469\u200d\U0001f680", "prompt": "{} lies in", "target": "Rome"},
)
FAULTY = (
    {**HOSTILE[0], "taget": 1},
    "no JSON at all, but a long line of words that somebody has put into a file of facts by mistake",
    {
        **HOSTILE[1],
        "prompt": "{}は{}日本国日本国日本国日本国日本国日本国日本国日本国日本国日本国日本国日本国の",
    },
    {**HOSTILE[0], "subject": "x" * 120, "prompt": "a prompt that does not name it"},
)
LOOKS = (
    *(("status",), ("log",), ("show",), ("show", NAME), ("stack",), ("diff",)),
    *(("diff", "base", "HEAD"), ("facts", "search", "a"), ("facts", "search", "nothingatall"), ("base",)),
    *(("editors",), ("model", "list"), ("reindex",), ("fsck",), ("build", "-n"), ("revert", "-n")),
    *(("log", "--graph", "--facts"), ("diff", "--weights"), ("diff", "--behavior"), ("blame", LONG)),
    *(("stack", "--interference"), ("blame", "--measure", "東京都" * 20)),
    *(("revert", "-n", NAME, "--fact", "1"), ("ask", "--tokens", "8", LONG, "東京都" * 13)),
)
ERRORS = (
    *(("show", "nothing" * 20), ("comit",), ("commit",), ("log", "--no-such-option"), ("diff", "nowhere")),
    *(("base", "/no/such/folder" * 12), ("facts", "check", "nothing.jsonl"), ("build", "a-patch")),
)
COLOURS = [getattr(display, name) for name in ("BAD", "CHANGED", "GOOD", "NAME", "QUIET", "WARNING")]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def words(text: str) -> str:
    return "".join(text.split())


def test_no_line_is_longer_than_the_terminal_and_no_fact_is_cut(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    facts, faulty = (
        facts_file(knowledge.parent, *HOSTILE),
        facts_file(knowledge.parent, *FAULTY, name="f.jsonl"),
    )
    long = "Correct what was said of many long and of many short things 日本国日本国日本国 in many scripts"
    shown = {("commit", 80): cli("commit", facts, "-m", long, "--set", "steps=2")}
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", f"{width}")
        for command in (*LOOKS, *ERRORS, ("facts", "check", f"{faulty}")):
            done = shown[" ".join(command), width] = cli(*command)
            assert (done.code == 0) == (command in LOOKS), f"{command}: {done.err}"
    for (command, width), done in shown.items():
        assert done.out or done.err, command
        for line in plain(done.out + done.err).splitlines():
            assert cell_len(line) <= width, f"{command} at {width}: {line}"
    for width in WIDTHS:
        for command in (f"show {NAME}", "diff", "facts search a"):
            told = words(plain(shown[command, width].out))
            for fact in HOSTILE if command != "facts search a" else HOSTILE[:1]:
                said = f"{fact['prompt'].replace('{}', fact['subject'])} → {fact['target']}"
                pieces = words(said) if command == "diff" else said.split(" ")[-1]
                assert pieces in told, f"{command} at {width} cuts {said}"
        assert words(long) in words(plain(shown["log", width].out))
        assert f"{NAME[:24]}" in plain(shown["stack", width].out)
        assert "…" not in plain(shown["stack", width].out)


@given(line=st.text(st.characters(exclude_categories=["C", "Zl", "Zp"])), width=st.integers(12, 40))
def test_a_line_that_goes_on_below_loses_nothing(line: str, width: int) -> None:
    parts = folded(line, width, before=6, hang=4)
    assert words("".join(parts)) == words(line)
    rooms = [width - 6, *([width - 4] * (len(parts) - 1))]
    assert all(cell_len(part) <= room for part, room in zip(parts, rooms, strict=True))


def test_what_goes_on_stands_under_the_text_of_its_label() -> None:
    out = Console(file=io.StringIO(), width=24, color_system=None)
    say(out, "one two three four five six", label="base    ")
    assert out.file.getvalue().splitlines() == ["base    one two three", "        four five six"]  # type: ignore[attr-defined]


def test_a_line_for_a_script_stays_one_line(cli: Cli, knowledge: Path) -> None:
    done = cli("show", "nothing" * 40)
    assert len(done.err.splitlines()) == 1


def test_a_column_that_wraps_keeps_its_text_whole() -> None:
    out = Console(file=io.StringIO(), width=30, color_system=None)
    out.print(
        table(out, [Column("n", right=True), Column("fact", 1, wraps=True)], [(1, LONG), (22, "short")])
    )
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert words("".join(lines)) == words(f"n fact 1 {LONG} 22 short")
    assert all(line.startswith("    ") for line in lines[2:-1])


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_read_on_black_and_on_white(colour: str) -> None:
    """By the contrast of WCAG 2; and no theme changes them, since they are none of the first sixteen."""
    parsed = Color.parse(colour)
    assert parsed.number is not None
    assert parsed.number >= 16
    red, green, blue = (
        (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for c in (channel / 255 for channel in parsed.get_truecolor())
    )
    bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (bright + 0.05) / 0.05 > 3.8
    assert 1.05 / (bright + 0.05) > 3.8


def test_no_command_names_a_colour_of_its_own() -> None:
    for path in Path(display.__file__).parent.glob("*.py"):
        found = re.search(r'"(bold )?(red|green|yellow|cyan|magenta|blue|dim)"', path.read_text("utf-8"))
        assert found is None, f"{path.name}: {found and found[0]}"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.6, "1 min"), (125, "2 min 05 s"), (3600, "1 h 00 min"), (86400, "24 h 00 min")],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_the_time_left_is_told_only_where_there_is_something_to_tell_it_from() -> None:
    assert time_told(1.0, 0.5) == "1 s"
    assert time_told(600.0, 0.0) == "10 min"
    assert time_told(30.0, 1.0) == "30 s"
    assert time_told(10.0, 0.5) == "10 s, 10 s left"
    assert time_told(90.0, 0.25) == "1 min 30 s, 4 min left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", WIDTHS)
def test_progress_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(display, "SOON", 0.0)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", f"{width}")
    with progress_bars() as bars:
        assert bars is not None
        for phase in ("loading", "contexts", "text", "statistics", "measuring before", "targets"):
            bars(phase, 0, 1000)
            bars(phase, 400, 1000)
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert any("measuring before" in line and "40 %" in line and "left" in line for line in lines)
    assert all(cell_len(line) <= width and "…" not in line for line in lines)
