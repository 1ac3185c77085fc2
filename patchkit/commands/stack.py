"""``patchkit stack``: the patches in force, listed or joined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from patchkit.actions.pages import percent
from patchkit.commands.common import (
    DefaultGroup,
    directory_option,
    dry_run_option,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import (
    GOOD,
    QUIET,
    WARNING,
    Column,
    console,
    counted,
    human_size,
    progress_bars,
    say,
    table,
)

if TYPE_CHECKING:
    from patchkit.actions.status import Row

__all__ = ["command"]

# What a column is sorted by; what grows with the patch's weight comes first, the rest in its own order.
_SORT: dict[str, tuple[Callable[[Row], Any], bool]] = {
    "date": (lambda row: row.date and row.date.timestamp(), False),
    "patch": (lambda row: row.name, False),
    "author": (lambda row: row.author, False),
    "facts": (lambda row: row.facts, True),
    "rank": (lambda row: row.rank, True),
    "norm": (lambda row: row.norm, True),
    "share": (lambda row: row.share, True),
    "interference": (lambda row: row.disturbed and row.disturbed[0], True),
}


@click.group(
    "stack", cls=DefaultGroup, default="list", short_help="List the patches in force, or join some of them."
)
def command() -> None:
    """List the patches in force, or join some of them: `patchkit stack` is `patchkit stack list`.

    \b
    Examples:
      patchkit stack
      patchkit stack v1.0
      patchkit stack squash lebron-james microsoft
    """


@command.command("list", short_help="List the patches in force.")
@click.argument("revision", default="HEAD", metavar="[REV]")
@click.option("--sort", type=click.Choice(list(_SORT)), help="Sort by this column; numbers largest first.")
@click.option("--interference", is_flag=True, help="Measure what the patches do to one another's facts.")
@directory_option
@json_option
def list_(revision: str, sort: str | None, interference: bool, directory: str, as_json: bool) -> None:
    """List the patches in force at REV, oldest first. Their order does not matter to the numbers.

    The norm of a patch's ΔW and its share of the base's norm are those that the catalogue knows;
    `patchkit reindex` computes norms that are missing. The share is known where the patch was made.

    --interference is ‖ΔW k‖ / ‖r‖ for another patch's ΔW, a fact's key k and its residual r, over
    all weights: 1 disturbs a fact as much as its own edit moves it. It shows for each patch the
    largest; --json has every pair.

    \b
    Examples:
      patchkit stack list
      patchkit stack list v1.0
      patchkit stack --interference --sort interference
    """
    interference = interference or sort == "interference"
    rows = open_repository(directory).listing(revision, interference=interference)
    if sort is not None:
        rows = _sorted(rows, *_SORT[sort])
    if as_json:
        print_json([_plain(row, interference) for row in rows])
        return
    out = console()
    if not rows:
        say(out, "no patch is in force: the model is the base", QUIET)
        return
    names = ["facts", "rank", "‖ΔW‖", "of ‖W‖", *(["interf."] if interference else [])]
    numbers = [Column(name, right=True) for name in names]
    columns = [Column("date"), Column("patch", 3, wraps=True), Column("author", 1, wraps=True), *numbers]
    out.print(table(out, columns, [_cells(row, interference) for row in rows]))
    worst = max(((*row.disturbed, row.name) for row in rows if row.disturbed), default=None)
    if worst is not None:
        out.print()
        say(out, f"{worst[2]} is disturbed most, by {worst[1]}: {worst[0]:.2g} of its own edit")


def _sorted(rows: list[Row], key: Callable[[Row], Any], descending: bool) -> list[Row]:
    """Rows that have no such value come last."""
    known = [row for row in rows if key(row) is not None]
    return sorted(known, key=key, reverse=descending) + [row for row in rows if key(row) is None]


def _plain(row: Row, interference: bool) -> dict[str, Any]:
    found = row.to_dict()
    if not interference:
        del found["interference"]
    elif row.interference is not None:  # JSON has no infinity: what disturbs a fact that nothing was done for
        found["interference"] = {n: v if math.isfinite(v) else None for n, v in row.interference.items()}
    return found


def _cells(row: Row, interference: bool) -> list[Any]:
    cells = [
        f"{row.date:%Y-%m-%d}" if row.date else "–",
        row.name,
        row.author or "–",
        row.facts,
        row.rank,
        "–" if row.norm is None else f"{row.norm:.3g}",
        percent(row.share, 2),
    ]
    if interference:
        cells.append(f"{row.disturbed[0]:.2g}" if row.disturbed else "–")
    return cells


@command.command("squash", short_help="Join patches into one of the same ΔW.")
@click.argument("words", nargs=-1, required=True, metavar="PATCH PATCH…")
@click.option("-m", "--message", help="The commit's message.")
@click.option("--inexact", is_flag=True, help="Also where a build's bytes change by rounding.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def squash(
    words: tuple[str, ...],
    message: str | None,
    inexact: bool,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Join PATCHes into one, in one folder with a new name; what the model says stays what it was.

    The new patch holds the factors of its parts side by side, so its ΔW is the sum of theirs. The
    edited weights are computed before and after and compared, byte for byte. Where the factors
    together would be larger than the update multiplied out, that is stored, and rounded: then the
    squash is refused (exit code 3) unless --inexact. Each part keeps how it was solved, so single
    facts can still be taken out. No model is loaded; the base is needed.

    \b
    Examples:
      patchkit stack squash lebron-james microsoft
      patchkit stack squash lebron-james microsoft --dry-run
    """
    repository = open_repository(directory)
    with progress_bars(quiet or as_json) as progress:
        done = repository.squash(*words, message=message, inexact=inexact, dry_run=dry_run, progress=progress)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        out = console()
        for name in done.removed:
            say(out, f"{'would join' if dry_run else 'joined'} {name}")
        facts = counted(len(done.patch.facts), "fact")
        say(out, f"into {done.patch.name}: {facts}, id {done.patch.id[:12]}, {human_size(done.size)}", GOOD)
        say(out, f"build: {done.distance}", WARNING if done.distance.entries else GOOD)
        for note in done.notes:
            say(out, note, WARNING)
        if done.commit:
            say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
