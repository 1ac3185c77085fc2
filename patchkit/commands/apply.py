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
from patchkit.commands.display import GOOD, WARNING, console, counted, say

__all__ = ["command"]


@click.command("apply", short_help="Take in a patch folder from elsewhere.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="PATCH")
@click.option("-m", "--message", help="The commit's message.")
@click.option("--replace", is_flag=True, help="Take older facts with the same key out of their patches.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    folder: Path,
    message: str | None,
    replace: bool,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the patch folder PATCH (made elsewhere, on the same base) and commit it as it is.

    It must stand on this repository's base, its hashes must hold, and none of its facts may be in
    force already; --replace takes those that are out of their patches, in the same commit. The
    model is not loaded.

    \b
    Example:
      patchkit apply ../colleague/patches/lebron-james-3f9a1c2e
    """
    repository = open_repository(directory)
    done = repository.apply(folder, message=message, replace=replace, dry_run=dry_run)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        out = console()
        verb = "would take in" if dry_run else "took in"
        facts = counted(len(done.patch.facts), "fact")
        say(out, f"{verb} {done.name}: {facts}, id {done.patch.id[:12]}", GOOD)
        for taken in done.replaced:
            older = ", ".join(fact.text for fact in taken.facts)
            say(out, f"{'would replace' if dry_run else 'replaced'} in {taken.patch}: {older}", WARNING)
        for note in done.notes:
            say(out, note, WARNING)
        if done.commit:
            say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
