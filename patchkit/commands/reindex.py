"""``patchkit reindex``: derive the catalogue again from Git."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json, quiet_option
from patchkit.commands.display import console, say

__all__ = ["command"]

_ONE = {
    "commits": "commit",
    "patches": "patch",
    "facts": "fact",
    "unreadable versions": "unreadable version",
    "measurements taken over": "measurement taken over",
}


@click.command("reindex", short_help="Derive the catalogue again from Git.")
@directory_option
@quiet_option
@json_option
def command(directory: str, quiet: bool, as_json: bool) -> None:
    """Derive patches, facts, norms and commits in the catalogue again from Git's history. What
    cannot be derived (results, timings, builds) is kept.

    \b
    Example:
      patchkit reindex
    """
    counts = open_repository(directory).reindex()
    if as_json:
        print_json(dict(counts))
    elif not quiet:
        told = (f"{number} {_ONE[name] if number == 1 else name}" for name, number in counts.items())
        say(console(), "indexed " + ", ".join(told))
