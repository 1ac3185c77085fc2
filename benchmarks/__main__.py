"""The command line of the benchmarks."""

from __future__ import annotations

import datetime
import importlib
import sys
from pathlib import Path

import click
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.report import Effort, Measured, load, ratios, save, show
from patchkit.errors import PatchkitError

SECTIONS = (
    "machine",
    "solve",
    "commands",
    "switch",
    "build",
    "targets",
    "profile",
    "editors",
    "evaluation",
    "statistics",
    "refitting",
    "scale",
    "sinks",
    "recipe",
    "large",
    "depth",
    "mend",
    "methods",
    "sequences",
    "choose",
    "merging",
    "harm",
)
"""In the order in which they are run: the short ones first."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sections", nargs=-1, type=click.Choice(SECTIONS), metavar="[SECTION]...")
@click.option(
    "--json",
    "out",
    type=click.Path(path_type=Path),
    help="Write results to this file; its other sections stay.",
)
@click.option("--compare", type=click.Path(path_type=Path), help="Show ratios to the results in this file.")
@click.option("--quick", is_flag=True, help="Prove that each section works; the numbers say nothing.")
@click.option("--full", is_flag=True, help="The long measurements too.")
def main(sections: tuple[str, ...], out: Path | None, compare: Path | None, quick: bool, full: bool) -> None:
    """Measure patchkit, and print each promise as met or not met.

    Without SECTION all are run. Exits with 1 where a promise is not met.
    """
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other")
    effort = Effort.QUICK if quick else Effort.FULL if full else Effort.USUAL
    console = Console()
    machine = describe()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    console.print()
    earlier = load(compare)["sections"] if compare else {}
    kept = True
    for name in sections or SECTIONS:
        measured: Measured = importlib.import_module(f"benchmarks.{name}").measure(effort)
        if effort is Effort.QUICK:
            measured = Measured(measured.rows, (), measured.notes)
        show(console, name, measured)
        if name in earlier:
            show(console, f"{name}: now over then", ratios(measured, Measured.from_dict(earlier[name])))
        if out is not None:
            today = datetime.date.today().isoformat()
            entry = {"date": today, "effort": effort.value, "machine": machine, **measured.to_dict()}
            save(out, {"sections": {name: entry}})
        kept = kept and all(bar.met for bar in measured.bars)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    try:
        main(prog_name="python -m benchmarks")
    except PatchkitError as error:
        sys.exit(f"benchmarks: {error}")
