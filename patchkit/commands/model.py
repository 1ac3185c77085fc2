"""``patchkit model``: bases that need no hub, and whether a base can be edited."""

from __future__ import annotations

import click

from patchkit.commands.common import json_option, print_json, quiet_option
from patchkit.commands.display import GOOD, Column, console, human_size, in_bytes, progress_bars, say, table
from patchkit.editing.many import SIZE, described
from patchkit.editing.recipe import format_layers

__all__ = ["command"]


@click.group("model", short_help="Check a base; fetch and list models that need no hub.")
def command() -> None:
    """Check whether a base can be edited; fetch and list models that come without a hub.

    \b
    Example:
      patchkit model get smollm2-135m
    """


@command.command("check", short_help="Say whether a base can be edited, and where.")
@click.argument("base")
@click.option("--revision", help="The base's revision on its hub; BASE@REVISION says the same.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@quiet_option
@json_option
def check(base: str, revision: str | None, device: str, quiet: bool, as_json: bool) -> None:
    """Load BASE, run a few tokens through it, and say what an edit would touch.

    Nothing is written. BASE is a checkpoint folder, a hub id or a short name, as for `patchkit init`.
    A base that cannot be edited is refused with the reason and a way out, and exit code 65.

    \b
    Example:
      patchkit model check smollm2-135m
    """
    from patchkit.actions.check_model import check_model

    with progress_bars(quiet or as_json) as bars:
        found = check_model(base, revision=revision, device=device, progress=in_bytes(bars))
    if as_json:
        print_json(found.to_dict())
        return
    if quiet:
        return
    out = console()
    recipe, layers = found.recipe, list(found.weights)
    order = "[d_in, d_out]" if found.transposed else "[d_out, d_in]"
    outlets = sorted(set(found.outlets.values()))
    source = "a guess from its depth and width" if recipe.guess else "measured or published for it"
    say(out, f"{found.source} can be edited: {found.architecture}", GOOD)
    say(out, f"{found.blocks} blocks, d_model {found.d_model}, d_ff {found.d_ff}", label="shape   ")
    say(out, f"{found.weights[layers[0]]}, {found.dtype}, {order}", label="edited  ")
    if len(layers) > 1:
        say(out, f"to {found.weights[layers[-1]]}", label="        ")
    say(out, f"what they write is {' or '.join(outlets)}", label="stream  ")
    named = format_layers(layers)
    say(out, f"{recipe.method}, layers {named}, λ {recipe.lambda_:g}: {source}", label="recipe  ")
    if found.many:
        large = f"from {found.many[SIZE]} facts in one batch on"
        say(out, f"{large}: {described(found.many)}", label="        ")


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
    columns = [
        Column("name"),
        Column("licence"),
        Column("in the cache", 1, wraps=True),
        Column("what it is", 1, wraps=True),
    ]
    out.print(table(out, columns, rows))
