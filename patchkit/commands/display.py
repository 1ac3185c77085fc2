"""How patchkit looks at a terminal: tables, side-by-side answers, progress.

Facts, messages and what a model says are untrusted: every string passes :func:`printable` and
is never read as markup. Progress goes to stderr and only to a terminal.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "human_size", "in_bytes", "percent", "printable", "progress_bars", "table", "text"]

Bars = Callable[[str, int, int], None]


def console(*, stderr: bool = False) -> Console:
    """Plain where the output is no terminal or NO_COLOR is set; as wide as the terminal."""
    out = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not out.is_terminal:
        out.width = 120 if "COLUMNS" not in out._environ else out.width
    return out


def printable(value: str) -> str:
    """``value`` without anything a terminal would act on: control and direction characters are shown as code points."""
    return "".join(_visible(character) for character in value)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") and character != "\u200d":
        return f"\\u{ord(character):04x}"
    return character


def text(value: str, style: str = "") -> Text:
    """Untrusted text for a cell or a line."""
    return Text(printable(value), style=style)


def table(columns: Sequence[str | tuple[str, dict[str, Any]]], rows: Sequence[Sequence[Any]]) -> Table:
    """A borderless table; cells longer than the terminal allows end in an ellipsis, never wrap."""
    grid = Table(box=None, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        name, options = column if isinstance(column, tuple) else (column, {})
        grid.add_column(name, **{"no_wrap": True, "overflow": "ellipsis", **options})
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else text(str(cell)) for cell in row))
    return grid


def percent(share: float | None) -> str:
    """A share as a percentage; a dash where there was nothing to measure."""
    return "–" if share is None else f"{100 * share:.3g} %"


def human_size(size: int) -> str:
    """Bytes in the decimal units that disks and hubs use."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def in_bytes(bars: Bars | None) -> Callable[[int, int, str], None] | None:
    """The same bars for what tells (bytes done, bytes in all, what is being done)."""
    return None if bars is None else lambda done, total, what: bars(what, done, total)


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Bars | None]:
    """Yields ``progress(phase, done, total)``: one bar a phase, at a terminal only; else None."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
    )
    tasks: dict[str, TaskID] = {}

    def progress(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase, total=max(total, 1))
        bars.update(tasks[phase], completed=done, total=max(total, 1))

    with bars:
        yield progress
