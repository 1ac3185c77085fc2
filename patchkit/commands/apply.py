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
@click.option("--scale", type=float, default=1.0, metavar="S", help="Take in ΔW times S, as a new version.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    folder: Path,
    message: str | None,
    replace: bool,
    scale: float,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the patch folder PATCH (made elsewhere, on the same base) and commit it as it is.

    It must stand on this repository's base, its hashes must hold, and none of its facts may be in
    force already; --replace takes those that are out of their patches, in the same commit. The
    model is not loaded.

    With --scale PATCH may also name a patch in force: it is scaled in its place, from what it is
    now. S is not 0; the patch's recipe says by how much it was scaled in all.

    \b
    Examples:
      patchkit apply ../colleague/patches/lebron-james-3f9a1c2e
      patchkit apply lebron-james --scale 0.5
    """
    repository = open_repository(directory)
    done = repository.apply(folder, message=message, replace=replace, scale=scale, dry_run=dry_run)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        out = console()
        verb = "would take in" if dry_run else "took in"
        facts = counted(len(done.patch.facts), "fact")
        times = "" if scale == 1.0 else f", ΔW times {scale:g}"
        say(out, f"{verb} {done.name}: {facts}{times}, id {done.patch.id[:12]}", GOOD)
        for taken in done.replaced:
            older = ", ".join(fact.text for fact in taken.facts)
            say(out, f"{'would replace' if dry_run else 'replaced'} in {taken.patch}: {older}", WARNING)
        for note in done.notes:
            say(out, note, WARNING)
        if done.commit:
            say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
