"""``patchkit base``: where the base lies on this machine."""

from __future__ import annotations

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import console, in_bytes, progress_bars, say

__all__ = ["command"]


@click.command("base", short_help="Show or set where the base lies on this machine.")
@click.argument("place", metavar="[PATH]", required=False)
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(place: str | None, directory: str, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Show the base, or say that it lies at PATH on this machine (a folder, hub id or short name).

    PATH is taken only if its tensors have the fingerprint that patchkit.toml names. The place is
    kept in this machine's `git config patchkit.base` (in a subfolder: patchkit.FOLDER.base) and is
    never committed.

    \b
    Examples:
      patchkit base
      patchkit base /models/smollm2-135m
    """
    repository = open_repository(directory)
    if place is not None:
        with progress_bars(quiet or as_json) as bars:
            folder = repository.set_base(place, dry_run=dry_run, progress=in_bytes(bars))
    else:
        folder = repository.base_folder
    settings = repository.settings
    facts = {
        "source": settings.base_source,
        "revision": settings.base_revision,
        "fingerprint": settings.base_fingerprint,
        "folder": str(folder),
    }
    if as_json:
        print_json(facts)
    elif not quiet:
        out = console()
        for name, value in facts.items():
            say(out, value or "–", label=f"{name:<12}")
