"""``patchkit init``: a repository that stands on a base."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.common import directory_option, dry_run_option, json_option, print_json, quiet_option
from patchkit.commands.display import GOOD, QUIET, WARNING, console, in_bytes, progress_bars, say
from patchkit.editing.many import SIZE, described
from patchkit.editing.recipe import format_layers

__all__ = ["command"]


@click.command("init", short_help="Make a repository that stands on a base.")
@click.argument("base")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--revision", help="The base's revision on its hub; BASE@REVISION says the same.")
@click.option("--convert", is_flag=True, help="Copy a base of .bin files into the cache as safetensors.")
@click.option("--lfs", is_flag=True, help="Keep the patches in Git LFS.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    base: str,
    folder: str | None,
    revision: str | None,
    convert: bool,
    lfs: bool,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a repository for knowledge patches on BASE, in DIR (default: here).

    BASE is a checkpoint folder, a hub id (ORG/NAME, with @REVISION if you like) or a short name
    from `patchkit model list`. An existing Git repository is used, also from a subfolder of it;
    a new one is made otherwise. Below a folder that has a patchkit.toml nothing is made: that
    stack is the one that is meant. Writes patchkit.toml (the base and the editing recipe) and
    patches/.gitattributes, and commits these two.

    A base whose weights are .bin files (pickles) is refused, for these could run code. --convert
    reads them without running any, makes a checkpoint of safetensors files in the user's cache, and
    takes that as the base; the folder that you name stays as it is. (With --dry-run too: only the
    copy tells whether it can be edited.)

    With --lfs the factors and keys of patches are kept in Git LFS (which must be installed), as hubs ask
    for where a file is over 10 MiB. On a stack that is there already, one commit brings the patches in
    force over; the commits before it stay as they are.

    \b
    Examples:
      patchkit init smollm2-135m knowledge
      patchkit init models/old-gpt2 knowledge --convert
    """
    from patchkit.actions.init import init

    with progress_bars(quiet or as_json) as bars:
        made = init(
            base,
            Path(directory, folder or "."),
            revision=revision,
            convert=convert,
            lfs=lfs,
            dry_run=dry_run,
            progress=in_bytes(bars),
        )
    if as_json:
        print_json(made.to_dict())
        return
    if quiet:
        return
    out = console()
    verb = "there already:" if made.existed else "would make" if dry_run else "made"
    say(out, f"{verb} {made.folder} on {made.source}", GOOD)
    if made.root is not None and made.commit is not None:
        say(out, f"{made.root}, in which it lies; all commits are made there", label="git     ")
    say(out, f"{made.base_folder} · {made.fingerprint[:19]}…", label="base    ")
    recipe = made.recipe
    if recipe is not None:
        weight = f", λ {recipe.lambda_:g}" if recipe.reads("lambda") else ""
        layers = format_layers(recipe.layers)
        say(out, f"{recipe.method}, layers {layers}{weight} (in patchkit.toml)", label="recipe  ")
        if made.many:
            large = f"from {made.many[SIZE]} facts in one batch on"
            say(out, f"{large}: {described(made.many)}", label="        ")
    if made.lfs:
        say(out, "patches in Git LFS", label="kept    ")
    if made.fault is not None:
        say(out, f"nothing can be edited with this recipe: {made.fault}", WARNING)
    if recipe is not None and recipe.guess:
        line = "no recipe was measured for this model: layers and λ are a guess from its depth and width"
        say(out, f"{line}; patchkit tune finds better ones by trials", WARNING)
    if not dry_run and made.fault is None:
        say(out, "next: patchkit commit facts.jsonl", QUIET)
