"""``patchkit undo``: take back the last command of patchkit on this branch."""

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
from patchkit.commands.display import GOOD, NAME, QUIET, console, say, say_patches

__all__ = ["command"]


@click.command("undo", short_help="Take back the last command of patchkit on this branch.")
@click.option("--list", "listed", is_flag=True, help="Show what can be undone, numbered; change nothing.")
@click.option("--to", "steps", type=click.IntRange(1), metavar="N", help="Back to before number N of --list.")
@click.option("--force", is_flag=True, help="Also where a remote-tracking branch has it already.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    listed: bool,
    steps: int | None,
    force: bool,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Put the current branch where its own reflog says that it was before the last command of
    patchkit that moved it (commit, revert, apply, refit, merge, stack squash, tune, pull, undo, …),
    as if that had not been. Undo twice, and the first is done again. What you changed or staged
    elsewhere stays; where it would be overwritten, nothing is done. What a remote-tracking branch
    has already is not undone without --force, since others may have it: `patchkit revert` takes it
    back in a new commit. Commits that are not patchkit's are never undone.

    \b
    Examples:
      patchkit undo
      patchkit undo --list
      patchkit undo --to 3
    """
    if listed and (steps or force or dry_run):
        raise click.UsageError("--list only shows; leave the other options out")
    repository = open_repository(directory)
    out = console()
    if listed:
        found = repository.undoable()
        if as_json:
            print_json([{"number": n, **step.to_dict()} for n, step in enumerate(found, 1)])
            return
        for number, step in enumerate(found if not quiet else [], 1):
            say(out, f"{step.date:%Y-%m-%d %H:%M}  {step.did}", label=f"{number:>3}  ", label_style=NAME)
        if not found and not quiet:
            say(out, "nothing can be undone here", QUIET)
        return
    done = repository.undo(steps or 1, force=force, dry_run=dry_run)
    if as_json:
        print_json(done.to_dict())
        return
    if quiet:
        return
    for step in done.steps:
        say(out, f"{'would undo' if dry_run else 'undid'} “{step.did}”")
    say_patches(out, done.added, done.changed, done.removed)
    say(
        out, f"{done.branch} {'would be' if dry_run else 'is'} at {done.new[:10]}, from {done.old[:10]}", GOOD
    )
