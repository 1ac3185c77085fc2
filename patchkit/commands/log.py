"""``patchkit log``: the commits that changed what the model knows."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import BAD, CHANGED, GOOD, NAME, QUIET, console, say

__all__ = ["command"]


@click.command("log", short_help="Show the commits that changed what the model knows.")
@click.argument("revision", default="HEAD", metavar="[REV]")
@click.option("-n", "--max-count", "limit", type=click.IntRange(1), help="At most this many commits.")
@directory_option
@json_option
def command(revision: str, limit: int | None, directory: str, as_json: bool) -> None:
    """Show, newest first, the commits up to REV that added (+), solved again (~) or removed (-)
    patches. `git log` shows the same commits with everything else.

    \b
    Example:
      patchkit log -n 5
    """
    commits = open_repository(directory).history(revision, limit)
    if as_json:
        print_json([entry.to_dict() for entry in commits])
        return
    out = console()
    for entry in commits:
        who = f"{entry.date:%Y-%m-%d %H:%M}  {entry.author}"
        say(out, who, QUIET, label=f"{entry.id[:10]}  ", label_style=NAME)
        say(out, entry.subject, label="    ")
        for sign, names, style in (
            ("+", entry.added, GOOD),
            ("~", entry.changed, CHANGED),
            ("-", entry.removed, BAD),
        ):
            for name in names:
                say(out, name, style, label=f"    {sign} ")
    if not commits:
        say(out, "no patches yet; make one: patchkit commit facts.jsonl", QUIET)
