"""``patchkit stack``: the patches in force."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import QUIET, Column, console, human_size, say, table

__all__ = ["command"]


@click.command("stack", short_help="List the patches in force.")
@click.argument("revision", default="HEAD", metavar="[REV]")
@directory_option
@json_option
def command(revision: str, directory: str, as_json: bool) -> None:
    """List the patches in force at REV, oldest first. Their order does not matter to the numbers.

    \b
    Example:
      patchkit stack
    """
    repository = open_repository(directory)
    rows = repository.listing(revision)
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    out = console()
    if not rows:
        say(out, "no patch is in force: the model is the base", QUIET)
        return
    numbers = [Column(name, right=True) for name in ("facts", "rank", "size")]
    out.print(
        table(
            out,
            [Column("date"), Column("patch", 3, wraps=True), Column("author", 1), *numbers, Column("id")],
            [
                (
                    f"{row.date:%Y-%m-%d}" if row.date else "–",
                    row.name,
                    row.author or "–",
                    row.facts,
                    row.rank,
                    human_size(row.size),
                    row.id[:10],
                )
                for row in rows
            ],
        )
    )
