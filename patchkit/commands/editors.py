"""``patchkit editors``: the editing methods that are installed."""

from __future__ import annotations

import click

from patchkit.commands.common import json_option, print_json
from patchkit.commands.display import Column, console, table

__all__ = ["command"]


@click.command("editors", short_help="List the editing methods.")
@json_option
def command(as_json: bool) -> None:
    """List the editors that `--method` takes: patchkit's own and those of installed packages.

    NAME-published, for those that search targets, searches as MEMIT's public
    code does, whatever was measured for the base: memit-published.

    \b
    Example:
      patchkit editors
    """
    from patchkit.editing.editor import about, editor_names

    found = [{"name": name, "about": about(name)} for name in editor_names()]
    if as_json:
        print_json(found)
    else:
        out = console()
        rows = [(row["name"], row["about"]) for row in found]
        out.print(table(out, [Column("method"), Column("what it does", 1, wraps=True)], rows))
