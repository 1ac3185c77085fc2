"""How patchkit looks at a terminal: tables, side-by-side answers, progress.

Facts, messages and what a model says are untrusted: every string passes :func:`printable` and
is never read as markup. Progress goes to stderr and only to a terminal.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "Column",
    "console",
    "counted",
    "human_size",
    "in_bytes",
    "percent",
    "printable",
    "progress_bars",
    "table",
    "text",
]

GAP = 2  # spaces between columns
MINIMUM = 6  # characters that a column keeps on the narrowest terminal

Bars = Callable[[str, int, int], None]


def console(*, stderr: bool = False) -> Console:
    """Plain where the output is no terminal or NO_COLOR is set; as wide as the terminal."""
    out = Console(
        stderr=stderr,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # rich alone leaves bold and dim
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )
    out.soft_wrap = not out.is_terminal  # a line for a script stays one line
    if not out.is_terminal:
        out.width = 120 if "COLUMNS" not in out._environ else out.width
    return out


def printable(value: str) -> str:
    """``value`` with the control and direction characters that a terminal would act on as code points."""
    return "".join(_visible(character) for character in value)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") and character != "\u200d":
        return f"\\u{ord(character):04x}"
    return character


def text(value: str, style: str = "") -> Text:
    """Untrusted text for a cell or a line."""
    return Text(printable(value), style=style)


def table(out: Console, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> Table:
    """A borderless table as wide as ``out`` allows.

    A column's number is its share of what the fixed columns leave (0: it is fixed, as wide as its
    widest cell); a cell that is too long ends in an ellipsis, and nothing ever wraps.
    """
    cells = [[cell if isinstance(cell, Text) else text(str(cell)) for cell in row] for row in rows]
    natural = [
        max([cell_len(column.name), *(row[i].cell_len for row in cells)]) for i, column in enumerate(columns)
    ]
    widths = _widths(natural, [column.share for column in columns], out.width - GAP * (len(columns) - 1))
    grid = Table(box=None, pad_edge=False, header_style="dim", show_edge=False, padding=(0, GAP, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        justify: Any = "right" if column.right else "left"
        grid.add_column(column.name, width=width, justify=justify, no_wrap=True, overflow="ellipsis")
    for row in cells:
        grid.add_row(*row)
    return grid


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, its share of the free width (0: fixed), numbers to the right."""

    name: str
    share: int = 0
    right: bool = False


def _widths(natural: list[int], shares: list[int], room: int) -> list[int]:
    """Fixed columns as wide as they need; the others no wider, sharing what is left."""
    widths = [0 if share else width for width, share in zip(natural, shares, strict=True)]
    flexible = sorted((i for i, share in enumerate(shares) if share), key=lambda i: natural[i] / shares[i])
    left, parts = room - sum(widths), sum(shares)
    for i in flexible:
        widths[i] = max(MINIMUM, min(natural[i], left * shares[i] // parts))
        left, parts = left - widths[i], parts - shares[i]
    return widths


def counted(number: int, noun: str) -> str:
    """ "1 fact", "2 facts", "3 patches"."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


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
