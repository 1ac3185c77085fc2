"""What a section measured: rows for a table, bars to be met, and the same as JSON."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from patchkit.errors import BadInput
from patchkit.files import write_durably

__all__ = ["Bar", "Cell", "Effort", "Measured", "load", "markdown", "ratios", "save", "show"]

Cell = str | float | int | None
_UNBOUNDED = 10_000  # characters


class Effort(enum.Enum):
    """How much to measure: ``QUICK`` proves that a section works, its numbers say nothing."""

    QUICK = "quick"
    USUAL = "usual"
    FULL = "full"


@dataclass(frozen=True)
class Bar:
    """A promise about a number: at least ``bound``, or at most where ``most``."""

    what: str
    value: float
    bound: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound

    def __str__(self) -> str:
        verdict, side = "met" if self.met else "NOT MET", "at most" if self.most else "at least"
        return f"{self.what}: {number(self.value)}, {side} {number(self.bound)}: {verdict}"


@dataclass(frozen=True)
class Measured:
    """Rows with the same columns, and bars; ``notes`` say what a reader of the numbers must know."""

    rows: Sequence[Mapping[str, Any]]
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        bars = [{**asdict(bar), "met": bar.met} for bar in self.bars]
        return {"rows": [dict(row) for row in self.rows], "bars": bars, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Measured:
        bars = [Bar(bar["what"], bar["value"], bar["bound"], bar["most"]) for bar in table["bars"]]
        return cls(table["rows"], bars, table["notes"])


def number(value: Cell) -> str:
    """Three significant digits; what is text stays text."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return f"{value:,}" if isinstance(value, int) else value
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show(console: Console, name: str, measured: Measured) -> None:
    """A section on the terminal: its table, then a line for each bar and note.

    A table wider than the terminal lies on its side where it then needs fewer columns; where it has no room
    that way either, each row is a paragraph.
    """
    lines = [list(measured.rows[0]), *([number(value) for value in row.values()] for row in measured.rows)]
    sides: list[Sequence[Sequence[str]]] = (
        [lines, list(zip(*lines, strict=True))] if len(lines) < len(lines[0]) else [lines]
    )
    unbounded = console.options.update_width(_UNBOUNDED)
    tables = [_table(name, side) for side in sides]
    fitting = [t for t in tables if console.measure(t, options=unbounded).maximum <= console.width]
    if fitting:
        console.print(fitting[0])
    else:
        console.print(name, style="bold", highlight=False)
        for cells in lines[1:]:
            row = "; ".join(f"{title} {cell}" for title, cell in zip(lines[0], cells, strict=True))
            console.print(Padding(row, (0, 0, 0, 2)), highlight=False)
    for bar in measured.bars:
        console.print(str(bar), style="green" if bar.met else "bold red", highlight=False)
    for note in measured.notes:
        console.print(note, style="dim", highlight=False)
    console.print()


def _table(name: str, lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(lines[0]):
        table.add_column(column, justify="right" if place else "left")
    for cells in lines[1:]:
        table.add_row(*cells)
    return table


def markdown(name: str, entry: Mapping[str, Any]) -> str:
    """A section of a file of results as a page shows it: how it was made, its table, its bars and notes."""
    measured, machine = Measured.from_dict(entry), entry["machine"]
    effort = "" if entry["effort"] == Effort.USUAL.value else f" --{entry['effort']}"
    made = f"`python -m benchmarks {name}{effort}` on {entry['date']}: {machine['processor']}"
    threads = machine.get("threads", machine["cores"])
    made += f", {machine['cores']} cores" + (f", {threads} thread" if threads == 1 else "")
    made += f", Python {machine['python']}, torch {machine['torch']}"
    columns = list(measured.rows[0])
    lines = [f"{made}, transformers {machine['transformers']}.", ""]
    lines += [_line(columns), f"|{'---|' * len(columns)}"]
    lines += [_line([number(value) for value in row.values()]) for row in measured.rows]
    bars = [f"- {bar}" for bar in measured.bars]
    notes = [f"- {note}" for note in measured.notes]
    return "\n".join([*lines, "", *bars, *notes]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def load(path: Path) -> dict[str, Any]:
    """An earlier run's results; BadInput where the file holds something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as results ({error})") from None
    if not isinstance(results, dict) or not isinstance(results.get("sections"), dict):
        raise BadInput(f'{path}: holds no "sections"; it should be what --json wrote')
    return results


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results; sections of an earlier run in the same file that were not run again stay."""
    earlier = load(path)["sections"] if path.exists() else {}
    merged = {**results, "sections": {**earlier, **results["sections"]}}
    write_durably(path, (json.dumps(merged, indent=1, ensure_ascii=False) + "\n").encode())


def ratios(new: Measured, old: Measured) -> Measured:
    """Each number of ``new`` over the same of ``old``, row by row where the first columns agree."""
    rows = []
    before = {next(iter(row.values())): row for row in old.rows}
    for row in new.rows:
        (name, value), *numbers = row.items()
        earlier = before.get(value, {})
        rows.append({name: value, **{key: _ratio(now, earlier.get(key)) for key, now in numbers}})
    return Measured(rows)


def _ratio(new: Cell, old: Cell) -> Cell:
    if isinstance(new, str) or isinstance(old, str) or not old or new is None:
        return None
    return new / old
