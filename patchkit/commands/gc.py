"""``patchkit gc``: remove what this machine keeps for itself and nothing refers to any more."""

from __future__ import annotations

import math

import click

from patchkit.commands.common import (
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
    Column,
    console,
    counted,
    human_size,
    progress_bars,
    say,
    table,
)

__all__ = ["command"]

GRACE = 14.0  # as in `actions.gc`, which is not loaded for --help; a test holds them equal


@click.command("gc", short_help="Remove what this machine keeps and nothing refers to.")
@click.option(
    "--grace",
    type=float,
    default=GRACE,
    show_default=True,
    metavar="DAYS",
    help="Keep what was used within so many days.",
)
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(grace: float, directory: str, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Remove from the private folder (.git/patchkit): patches that were kept aside, targets
    of edits that were never finished, statistics and texts of bases and recipes that no patch or
    patchkit.toml of any branch, tag or reflog names, answers to evaluations of stacks whose patches
    are gone, damaged catalogues that were put aside, and files that a killed command left; and, from
    the catalogue, trees that nothing reaches.

    What was used within the last hour always stays, whatever --grace says: a running command may be
    using it. Git's own objects are not touched; for these there is `git gc`.

    \b
    Examples:
      patchkit gc --dry-run
      patchkit gc --grace 30
    """
    if not math.isfinite(grace) or grace < 0:
        raise click.BadParameter("a number of days from 0", param_hint="--grace")
    with progress_bars(quiet or as_json) as progress:
        done = open_repository(directory).gc(grace=grace, dry_run=dry_run, progress=progress)
    if as_json:
        print_json({**done.to_dict(), "dry_run": dry_run})
        return
    if quiet:
        return
    out = console()
    if done.removed:
        columns = [
            Column("what"),
            Column("size", right=True),
            Column("days", right=True),
            Column("where", 1, wraps=True),
        ]
        rows = [
            (each.kind, human_size(each.size), f"{each.age:.0f}", str(each.path)) for each in done.removed
        ]
        out.print(table(out, columns, rows))
    size = human_size(sum(each.size for each in done.removed))
    would = "would remove" if dry_run else "removed"
    say(out, f"{would} {counted(len(done.removed), 'leftover')}, {size}", GOOD)
    if done.trees:
        say(out, f"{would} {counted(done.trees, 'tree')} of the catalogue that nothing reaches", GOOD)
    if done.young:
        age = f"{grace:g} days (--grace)" if grace * 24 > 1 else "an hour, which may be in use"
        say(out, f"left as they are: {counted(len(done.young), 'leftover')} of less than {age}", QUIET)
    say(out, "Git's own objects: git gc", QUIET)
