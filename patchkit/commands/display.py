"""How patchkit looks at a terminal: lines, tables, progress, and the colours that they have.

Facts, messages and what a model says are untrusted: every string passes :func:`printable` and
is never read as markup. No line is longer than the terminal; where the output is no terminal, a
line stays one line. Progress goes to stderr and only to a terminal.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

__all__ = [
    "BAD",
    "BEYOND",
    "CHANGED",
    "GAP",
    "GOOD",
    "NAME",
    "QUIET",
    "WARNING",
    "Column",
    "console",
    "counted",
    "duration",
    "folded",
    "human_size",
    "in_bytes",
    "printable",
    "progress_bars",
    "say",
    "say_patches",
    "table",
    "text",
    "time_told",
    "weight_name",
]

# Of the 256 colours that no terminal's theme changes, those that are read on black and on white alike. The
# terminal's own yellow, green and cyan are pale on white, and its dim is what each terminal makes of it.
GOOD = "color(28)"
BAD = "color(160)"
CHANGED = "color(31)"
WARNING = "color(130)"
NAME = "color(130)"  # of a commit or a patch
QUIET = "color(243)"

BEYOND = "beyond the end of this shallow clone; get it: git fetch --unshallow"  # where a commit is not known

GAP = 2  # spaces between columns
INDENT = 4  # of what goes on with a line that has no label
MINIMUM = 6  # characters that a column keeps on the narrowest terminal
SOON = 3.0  # seconds before the time that is left is told

Bars = Callable[[str, int, int], None]
Cell = tuple[str, str | Style]  # printable text, and how it looks


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
    if out.width < 1:  # COLUMNS=0, as some runners set it where they do not know
        out.width = 80 if out.is_terminal else 120
    return out


def printable(value: str) -> str:
    """``value`` with the control and direction characters that a terminal would act on as code points."""
    if value.isascii() and value.isprintable():
        return value
    return "".join(_visible(character) for character in value)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") and character != "\u200d":
        return f"\\u{ord(character):04x}"
    return character


def text(value: str, style: str = "") -> Text:
    """Untrusted text for a cell or a line."""
    return Text(printable(value), style=style)


def say(out: Console, value: str, style: str = "", *, label: str = "", label_style: str = "") -> None:
    """A line of untrusted text behind a label; what the terminal has no room for goes on below.

    It stands under the text, not under the label, so that a list can still be read down its labels.
    """
    shown = printable(value)
    if out.soft_wrap:
        out.file.write(f"{label}{shown}\n")  # rich would take most of the time of a long listing
        return
    first, hang = Text(label, style=label_style or style), cell_len(label) or INDENT
    for number, line in enumerate(folded(shown, out.width, cell_len(label), hang)):
        out.print((Text(" " * hang) if number else first).append_text(Text(line, style=style)))


def say_patches(
    out: Console,
    added: Iterable[str],
    changed: Iterable[str],
    removed: Iterable[str],
    *,
    indent: str = "",
) -> None:
    """The patches that came (+), were solved again (~) and left (-), a line each."""
    for sign, names, style in (("+", added, GOOD), ("~", changed, CHANGED), ("-", removed, BAD)):
        for name in names:
            say(out, name, style, label=f"{indent}{sign} ")


def folded(line: str, width: int, before: int = 0, hang: int = INDENT) -> list[str]:
    """``line`` in parts that fit ``width`` cells, ``before`` taken of the first and ``hang`` of the others.

    It is parted at spaces; a word that fits on no line, as in scripts without spaces, where the line is full.
    """
    parts: list[str] = []
    room, current = max(width - before, 2), ""
    for number, word in enumerate(line.split(" ")):
        longer = f"{current} {word}" if number else word
        if cell_len(longer) > room and current.strip() and cell_len(word) <= max(width - hang, 2):
            parts.append(current.rstrip())
            room, longer = max(width - hang, 2), word
        while cell_len(longer) > room:
            head = chop_cells(longer, room)[0]
            parts.append(head)
            room, longer = max(width - hang, 2), longer[len(head) :]
        current = longer
    return [*parts, current]


def table(out: Console, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> Grid:
    """A borderless table as wide as ``out`` allows.

    A column's number is its share of what the fixed columns leave (0: it is fixed, as wide as its
    widest cell); a cell that is too long ends in an ellipsis, or goes on below where its column wraps.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    natural = [
        max(map(_cells, [column.name, *(row[i][0] for row in cells)])) for i, column in enumerate(columns)
    ]
    widths = _widths(natural, [column.share for column in columns], out.width - GAP * (len(columns) - 1))
    headings: list[Cell] = [(column.name, QUIET) for column in columns]
    return Grid(columns, widths, [*([headings] if any(c.name for c in columns) else []), *cells])


def _cell(value: Any) -> Cell:
    return (value.plain, value.style) if isinstance(value, Text) else (printable(str(value)), "")


@dataclass(frozen=True)
class Grid:
    """What `table` gives, to be printed; a thousand rows cost milliseconds, where rich's own cost seconds."""

    columns: Sequence[Column]
    widths: Sequence[int]
    rows: Sequence[Sequence[Cell]]

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Segment]:
        plain: list[str] = []  # rows without a style go out in one piece: rich looks at each piece
        for row in self.rows:
            styles = [style for _, style in row] if console.color_system else []
            if not any(styles):
                plain += ((" " * GAP).join(parts).rstrip() for parts in self._lines(row))
                continue
            yield from _whole(plain)
            for parts in self._lines(row):
                for place, (part, style) in enumerate(zip(parts, styles, strict=True)):
                    yield Segment(" " * GAP * bool(place))
                    yield Segment(part, console.get_style(style) if style else None)
                yield Segment.line()
        yield from _whole(plain)

    def _lines(self, row: Sequence[Cell]) -> Iterator[list[str]]:
        """The lines of a row, each a part a column."""
        if all(
            len(shown) == _cells(shown) <= width for (shown, _), width in zip(row, self.widths, strict=True)
        ):
            yield [
                shown.rjust(width) if column.right else shown.ljust(width)
                for (shown, _), column, width in zip(row, self.columns, self.widths, strict=True)
            ]
            return
        cells = [_lines(*cell) for cell in zip(row, self.columns, self.widths, strict=True)]
        for number in range(max(map(len, cells))):
            yield [
                lines[number] if number < len(lines) else " " * width
                for lines, width in zip(cells, self.widths, strict=True)
            ]


def _whole(lines: list[str]) -> Iterator[Segment]:
    """What was gathered, which is then taken up."""
    if lines:
        yield Segment("\n".join(lines) + "\n")
        lines.clear()


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, its share of the free width (0: fixed), numbers to the right.

    A cell too long for a column that ``wraps`` is whole, over several lines: for what loses its meaning when
    it is cut, as a fact does.
    """

    name: str
    share: int = 0
    right: bool = False
    wraps: bool = False


def _lines(cell: Cell, column: Column, width: int) -> list[str]:
    """A cell's lines, each as wide as its column."""
    shown = cell[0]
    if _cells(shown) <= width:
        parts = [shown]
    elif column.wraps:
        parts = folded(shown, width, hang=0)
    else:
        parts = [set_cell_size(shown, width - 1) + "…"]
    padding = [" " * (width - _cells(part)) for part in parts]
    return [
        f"{pad}{part}" if column.right else f"{part}{pad}" for part, pad in zip(parts, padding, strict=True)
    ]


def _cells(shown: str) -> int:
    """How wide text is at a terminal; of a thousand rows nearly all is ASCII, and that is quickly told."""
    return len(shown) if shown.isascii() else cell_len(shown)


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


def weight_name(name: str) -> str:
    """A weight for a table: nearly all names end alike."""
    return name.removesuffix(".weight")


def human_size(size: int) -> str:
    """Bytes in the decimal units that disks and hubs use."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:  # what rounds to 1,000 is one of the next unit
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
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn

    class Time(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = task.finished_time if task.finished else task.elapsed
            begun, total = task.fields["begun"], task.total or 1
            share = 1.0 if task.finished else (task.completed - begun) / max(total - begun, 1)
            return Text(time_told(elapsed or 0.0, share), style=QUIET)

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(20, style=QUIET, complete_style=GOOD, finished_style=GOOD),
        TextColumn("{task.percentage:>3.0f} %"),
        Time(),
        console=console(stderr=True),
    )
    tasks: dict[str, TaskID] = {}

    def progress(phase: str, done: int, total: int) -> None:
        if phase not in tasks:  # a resumed phase begins where it was, which says nothing of its speed
            tasks[phase] = bars.add_task(printable(phase), total=max(total, 1), begun=done)
        bars.update(tasks[phase], completed=done, total=max(total, 1))

    with bars:
        yield progress


def time_told(elapsed: float, share: float) -> str:
    """How long a phase took, or has run and will run: no guess before there is something to guess from."""
    if share >= 1 or share <= 0 or elapsed < SOON:
        return duration(elapsed)
    left = elapsed * (1 - share) / share
    return f"{duration(elapsed)}, {duration(left) if left < 60 else duration(60 * round(left / 60))} left"


def duration(seconds: float) -> str:
    """ "7 s", "2 min 05 s", "1 h 20 min"; a whole number of minutes without its seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes and not rest:
        return f"{minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
