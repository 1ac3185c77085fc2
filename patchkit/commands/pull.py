"""``patchkit pull``: fetch, check what came, go forward to it."""

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
from patchkit.commands.display import GOOD, console, counted, in_bytes, progress_bars, say, say_patches

__all__ = ["command"]


@click.command("pull", short_help="Fetch, check what came, and go forward to it.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(directory: str, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Fetch the branch that the current one follows, check it as every tree is checked, and go
    forward to it; then bring the build in line, where there is one. What cannot be believed is
    not taken in. Where both sides have commits, nothing is done: `patchkit merge @{upstream}`
    joins them. With --dry-run objects are fetched, and no branch is moved, here or for the remote.

    \b
    Example:
      patchkit pull
    """
    with progress_bars(quiet or as_json) as bars:
        done = open_repository(directory).pull(dry_run=dry_run, progress=in_bytes(bars))
    if as_json:
        print_json(done.to_dict())
        return
    if quiet:
        return
    out = console()
    if done.old == done.new:
        say(out, f"{done.branch} has all that {done.upstream} has", GOOD)
        return
    verb = "would go" if dry_run else "went"
    say(out, f"{done.branch} {verb} from {done.old[:10]} to {done.new[:10]} ({done.upstream})", GOOD)
    say_patches(out, done.added, done.changed, done.removed)
    if done.build is not None:
        say(out, f"build {done.build.folder}: {counted(len(done.build.patches), 'patch')} in force")
