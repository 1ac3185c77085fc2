"""``patchkit card``: the model card of the patches in force."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.common import (
    directory_option,
    json_option,
    licence_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import console, say

__all__ = ["command"]


@click.command("card", short_help="Write the model card of the patches in force.")
@click.argument("patches", nargs=-1, metavar="[PATCH…]")
@click.option("--rev", "revision", default="HEAD", show_default=True, help="The stack at this commit.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="A new file; otherwise printed.")
@licence_option
@directory_option
@quiet_option
@json_option
def command(
    patches: tuple[str, ...],
    revision: str,
    out: Path | None,
    licence: str | None,
    directory: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the model card of PATCHes (default: the whole stack), as Markdown.

    It tells the base and its fingerprint, the facts with what was measured of them on this machine,
    the patches with their recipes, the weights, the limits, the licence, and how all of it is put
    on and taken off. Exports and `build --card` hold a card of their own. Facts are shown as text
    whatever they hold.

    \b
    Examples:
      patchkit card --license apache-2.0 --out README.md
      patchkit card lebron-james
    """
    text = open_repository(directory).card(patches, revision=revision, licence=licence)
    if out is not None:
        from patchkit.files import write_durably
        from patchkit.shipping.folder import refuse_existing

        refuse_existing(out)
        write_durably(out, text.encode("utf-8"))
    if as_json:
        print_json({"card": text, "file": None if out is None else str(out)})
    elif out is None:
        click.echo(text, nl=False)
    elif not quiet:
        say(console(), f"{out}: the card of the patches in force")
