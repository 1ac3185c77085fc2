"""``patchkit clone``: a clone that is checked before it is checked out."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.common import directory_option, dry_run_option, json_option, print_json, quiet_option
from patchkit.commands.display import GOOD, QUIET, console, counted, in_bytes, progress_bars, say
from patchkit.settings import FOLDER

__all__ = ["command"]


@click.command("clone", short_help="Clone a repository, checked before it is checked out.")
@click.argument("url")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--base", metavar="PLACE", help="Where the base lies here: a folder, hub id or short name.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    url: str,
    folder: str | None,
    base: str | None,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Clone the repository at URL (or in a folder) into DIR, by default named after it.

    As `git clone`, but its patches are checked before anything of it is written to a work tree,
    and a clone that cannot be believed leaves nothing behind. Symbolic links come as plain files
    (core.symlinks=false stays set), submodules are not fetched, and of what lies in Git LFS only the
    patches. With --base the base's place is set, if it has the right fingerprint.

    \b
    Examples:
      patchkit clone https://example.org/team/knowledge.git
      patchkit clone ../knowledge mine --base /models/smollm2-135m
    """
    from patchkit.actions.clone import clone

    with progress_bars(quiet or as_json) as bars:
        done = clone(
            url, folder, directory=Path(directory), base=base, dry_run=dry_run, progress=in_bytes(bars)
        )
    if as_json:
        print_json(done.to_dict())
        return
    if quiet:
        return
    out = console()
    verb = "could be cloned into" if dry_run else "cloned into"
    say(out, f"{done.source} {verb} {done.folder}", GOOD)
    for stack in done.stacks if done.stacks != (".",) else ():
        say(out, stack, label="stack in  ")
    say(out, f"in force: {counted(done.patches, 'patch')}")
    if done.place is None and FOLDER in done.base:
        say(out, "next: patchkit base PATH (where the base lies on this machine)", QUIET)
