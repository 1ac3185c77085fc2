"""The rows of a sweep as tables: Markdown, CSV and JSON. Scores are in percent, GE in bits."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from patchkit.evaluation.studies import FREE, OF_CEILING, conditions, whole_of

__all__ = ["csv_table", "json_table", "markdown_table", "table_rows"]

Row = Mapping[str, Any]
_HEAD = {"method": "editor", "count": "facts", "group": "facts of", "lambda": "λ"}
_HARM = {"perplexity": "perplexity, times", "growth": "‖W + ΔW‖ / ‖W‖"}
_MARKS = re.compile(r"[\\`*\[\]!~@:]|(?<!\w)_|_(?!\w)")  # of links, pictures, emphasis and code
_BOUNDS = ("", "_low", "_high")
_NAMES = {
    "tokens S": "score",
    "rewrite tokens": "efficacy",
    "paraphrase tokens": "paraphrase",
    "neighbour tokens": "specificity",
}


def _shown_scores(rows: Sequence[Row]) -> list[str]:
    """The scores of the tables: the field's own, free generation, and those that were asked for besides."""
    there = {name for row in rows for name in row["scores"]}
    wanted = (
        *whole_of(rows),
        OF_CEILING,
        *FREE,
        "rewrite argmax",
        "paraphrase argmax",
        "neighbours kept",
        "GE",
        "RS",
    )
    return [name for name in wanted if name in there]


def table_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a score as its value and the bounds of its 95 % interval, then the harm."""
    leading = ["method", "count", *conditions(rows)]
    names = _shown_scores(rows)
    head = [*(_HEAD[name] for name in leading), *(_NAMES.get(name, name) for name in names), *_HARM.values()]
    return head, [
        [
            *(_text(row[name]) for name in leading),
            *(_score(name, row["scores"].get(name)) for name in names),
            *(_multiple(row, name) for name in _HARM),
        ]
        for row in rows
    ]


def markdown_table(rows: Sequence[Row]) -> bytes:
    head, cells = table_rows(rows)
    lines = [head, ["---"] * len(head), *(map(_in_markdown, line) for line in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).encode()


def csv_table(rows: Sequence[Row]) -> bytes:
    """One column for each score's value and for each of its bounds; empty where there is none."""
    names = _shown_scores(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bounds = [f"{name}{part}" for name in names for part in _BOUNDS]
    harm = [*(f"perplexity{part}" for part in _BOUNDS), "growth"]
    head = ["editor", "facts", "group", "lambda", "asked", *harm, *bounds]
    writer.writerow(name.replace("_", " ") for name in head)
    for row in rows:
        cells = [row.get(name) for name in ("method", "count", "group", "lambda", "asked", *harm)]
        for name in names:
            cells += _factored(name, row["scores"].get(name) or (None,) * 3)
        writer.writerow(["" if cell is None else _in_csv(cell) for cell in cells])
    return out.getvalue().encode()


def _in_markdown(cell: str) -> str:
    """Names of relations are anybody's: no cell ends where they say, and nothing is markup."""
    plain = cell.replace("&", "&amp;").replace("<", "&lt;")
    return _MARKS.sub(lambda found: f"&#{ord(found[0])};", plain).replace("|", "\\|")


def _in_csv(cell: Any) -> Any:
    """Text that a spreadsheet would take for a formula is text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def json_table(rows: Sequence[Row]) -> bytes:
    """The rows as they are: every score, as shares."""
    return (json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n").encode()


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _multiple(row: Row, name: str) -> str:
    """Of the base's; none where the model gives no numbers any more, and no bounds where the row has none."""
    value, low, high = (row.get(f"{name}{part}") for part in _BOUNDS)
    if value is None:
        return "–"
    if low is None or high is None or low == high:
        return _times(value)
    return f"{_times(value)} ({_times(low)} to {_times(high)})"


def _times(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.2e}"


def _factored(name: str, found: Sequence[float | None]) -> list[float | None]:
    factor = 1 if name == "GE" else 100
    return [None if value is None else factor * value for value in found]


def _score(name: str, found: Sequence[float | None] | None) -> str:
    value, low, high = _factored(name, found or (None,) * 3)
    if value is None:
        return "–"
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} ({low:.1f} to {high:.1f})"
