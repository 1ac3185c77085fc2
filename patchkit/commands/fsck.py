"""``patchkit fsck``: hash everything again."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json, quiet_option
from patchkit.commands.display import GOOD, console, progress_bars, say
from patchkit.errors import CheckFailed

__all__ = ["command"]


@click.command("fsck", short_help="Hash everything again and find what was altered.")
@directory_option
@quiet_option
@json_option
def command(directory: str, quiet: bool, as_json: bool) -> None:
    """Hash Git's objects, every patch of the whole history, the work tree's patches, the base and
    the builds again, trusting no time stamps. Exit code 1 if anything is not as it was written.

    \b
    Example:
      patchkit fsck
    """
    with progress_bars(quiet or as_json) as progress:
        found = open_repository(directory).fsck(progress)
    if as_json:
        print_json({"problems": [problem.to_dict() for problem in found]})
    elif not found and not quiet:
        say(console(), "every byte is as it was written", GOOD)
    if found:
        raise CheckFailed("\n".join(str(problem) for problem in found))
