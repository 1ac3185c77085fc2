"""``patchkit build``: base and stack as an ordinary checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    licence_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import WARNING, console, counted, in_bytes, progress_bars, say

__all__ = ["command"]


@click.command("build", short_help="Write base and stack as an ordinary checkpoint folder.")
@click.argument("patches", nargs=-1, metavar="[PATCH…]")
@click.option(
    "--base", metavar="CHECKPOINT", help="Build from this base and PATCH folders, without a repository."
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to (default: `patchkit path build`)."
)
@click.option("--rev", "revision", default="HEAD", show_default=True, help="The stack at this commit.")
@click.option("--card", is_flag=True, help="With a model card as its README.md.")
@licence_option
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    patches: tuple[str, ...],
    base: str | None,
    out: Path | None,
    revision: str,
    card: bool,
    licence: str | None,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the base with the stack on it as a checkpoint folder that any program loads.

    Every file is the base's but for the bytes of the edited tensors, which are the exact sum,
    rounded once. Building again where a build is brings it up to date; config.json is put in
    last, so that an unfinished build cannot be loaded. With --base no repository is needed.

    --card puts a model card of the stack in it as README.md: base, facts with what was measured of
    them, patches, limits, how to take it off. The base's own README.md is left out then.

    \b
    Examples:
      patchkit build --out model
      patchkit build --out model --card --license apache-2.0
      patchkit build --base ./checkpoint patches/lebron-james-3f9a1c2e --out model
    """
    from patchkit.actions.build import build_from_patches

    if base is None and patches:
        raise click.UsageError("PATCH folders go with --base; a repository builds its whole stack")
    if base is not None and out is None:
        raise click.UsageError("--base needs --out DIR")
    if base is not None and card:
        raise click.UsageError("--card goes with a repository, which knows what was measured")
    if base is not None and revision != "HEAD":
        raise click.UsageError("--rev goes with a repository; name the PATCH folders themselves")
    if licence is not None and not card:
        raise click.UsageError("--license is for the card; add --card")
    with progress_bars(quiet or as_json) as bars:
        progress = in_bytes(bars)
        if base is None:
            built = open_repository(directory).build(
                out,
                revision=revision,
                card=card,
                licence=licence,
                dry_run=dry_run,
                progress=progress,
            )
        else:
            from patchkit.models.sources import resolve_base

            assert out is not None
            folder = resolve_base(base).folder
            built = build_from_patches(
                folder, [Path(p) for p in patches], out, dry_run=dry_run, progress=progress
            )
    if as_json:
        print_json(None if built is None else built.to_dict())
    elif not quiet:
        out_ = console()
        if built is None:
            say(out_, "dry run: the stack is sound and fits the base; nothing was written", WARNING)
        else:
            inside, tensors = counted(len(built.patches), "patch"), len(built.record.tensors)
            differ = f"{len(built.record.touched)} of {tensors} tensors differ from the base"
            say(out_, f"{built.folder}: {inside} in force, {differ}")
