"""``patchkit log``: the commits that changed what the model knows."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import console, text

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
        head = text(entry.id[:10], "yellow")
        head.append_text(text(f"  {entry.date:%Y-%m-%d %H:%M}  {entry.author}", "dim"))
        out.print(head)
        out.print(text(f"    {entry.subject}"), overflow="ellipsis", no_wrap=True)
        for sign, names, style in (
            ("+", entry.added, "green"),
            ("~", entry.changed, "cyan"),
            ("-", entry.removed, "red"),
        ):
            for name in names:
                out.print(text(f"    {sign} {name}", style))
    if not commits:
        out.print(text("no patches yet; make one: patchkit commit facts.jsonl", "dim"))
