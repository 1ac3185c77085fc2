"""``patchkit report``: a stack as one page for people without a terminal."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.common import directory_option, open_repository, quiet_option
from patchkit.commands.display import GOOD, WARNING, console, counted, say

__all__ = ["command"]


@click.command("report", short_help="Write the stack as one HTML page.")
@click.argument("revision", default="HEAD", metavar="[REV]")
@click.option(
    "--out", default="report.html", show_default=True, metavar="FILE", help="Where to; a report is replaced."
)
@directory_option
@quiet_option
def command(revision: str, out: str, directory: str, quiet: bool) -> None:
    """Write one HTML page of the stack at REV: history, patches, facts with what was measured before
    and after, norms by weight, interference, base and recipe, problems, how to apply and remove.

    The page holds no script and loads nothing, so it can be mailed and opened anywhere. A tree that
    cannot be believed is reported with its problems. Of large stacks the newest part is shown, and
    the page says so. No model is loaded.

    \b
    Examples:
      patchkit report
      patchkit report v1.0 --out v1.html
    """
    repository = open_repository(directory)
    found = repository.report(revision)
    from patchkit.actions.report_page import write_page

    write_page(found, Path(out))
    if not quiet:
        problems = f", {counted(len(found.problems), 'problem')}" if found.problems else ""
        say(console(), f"written: {Path(out).resolve()}{problems}", WARNING if problems else GOOD)
