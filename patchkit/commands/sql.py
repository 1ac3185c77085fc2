"""``patchkit sql``: questions to the catalogue."""

from __future__ import annotations

import csv
import math
import sys
from typing import Any

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import QUIET, Column, console, printable, say, table
from patchkit.errors import BadInput

__all__ = ["command"]


@click.command("sql", short_help="Ask the catalogue a question in SQL.")
@click.argument("query", metavar="QUERY")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, with the columns' names first.")
@directory_option
@json_option
def command(query: str, as_csv: bool, directory: str, as_json: bool) -> None:
    """Answer QUERY, one SQL select, from the catalogue, brought up to date with HEAD's history first.

    It can only read: whatever would write, attach a file or set something is refused. The tables
    and the views (patches_in_force, facts_in_force, layer_shares, measured_facts, log) are described
    in docs/catalogue.md. In JSON a value of bytes is hex digits; what is no number is null.

    \b
    Examples:
      patchkit sql "select name, facts, rank from patches_in_force"
      patchkit sql "select subject, target from facts_in_force where subject like 'L%'" --csv
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    found = open_repository(directory).sql(query)
    if as_json:
        _refuse_doubled(found.columns)
        print_json([dict(zip(found.columns, map(_plain, row), strict=True)) for row in found.rows])
    elif as_csv:
        shown = printable if sys.stdout.isatty() else str
        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow([shown(name) for name in found.columns])
        lines.writerows([["" if v is None else shown(_text(v)) for v in row] for row in found.rows])
    elif not found.rows:
        say(console(), "no row", QUIET)
    else:
        out = console()
        cells = [["–" if value is None else _text(value) for value in row] for row in found.rows]
        out.print(
            table(out, [_column(i, found.columns, found.rows) for i in range(len(found.columns))], cells)
        )


def _refuse_doubled(columns: tuple[str, ...]) -> None:
    doubled = next((name for name in columns if columns.count(name) > 1), None)
    if doubled is not None:
        raise BadInput(f"two columns are named {printable(doubled)!r}; name one of them otherwise, with AS")


def _column(place: int, names: tuple[str, ...], rows: Any) -> Column:
    """Numbers to the right, as wide as they need; texts share what is left."""
    numbers = all(row[place] is None or isinstance(row[place], int | float) for row in rows)
    return Column(printable(names[place]), 0 if numbers else 1, right=numbers, wraps=not numbers)


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value
