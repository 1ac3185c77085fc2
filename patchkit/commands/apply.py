"""``patchkit apply``: take in a patch folder from elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import GOOD, console, counted, say

__all__ = ["command"]


@click.command("apply", short_help="Take in a patch folder from elsewhere.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="PATCH")
@click.option("-m", "--message", help="The commit's message.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    folder: Path, message: str | None, directory: str, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    """Check the patch folder PATCH (made elsewhere, on the same base) and commit it as it is.

    It must stand on this repository's base, its hashes must hold, and none of its facts may be in
    force already. The model is not loaded.

    \b
    Example:
      patchkit apply ../colleague/patches/lebron-james-3f9a1c2e
    """
    done = open_repository(directory).apply(folder, message=message, dry_run=dry_run)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        out = console()
        verb = "would take in" if dry_run else "took in"
        facts = counted(len(done.patch.facts), "fact")
        say(out, f"{verb} {done.name}: {facts}, id {done.patch.id[:12]}", GOOD)
        if done.commit:
            say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
