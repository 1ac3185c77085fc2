"""``patchkit switch``: go to a branch, and bring the build in line."""

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
from patchkit.commands.display import (
    GOOD,
    WARNING,
    console,
    counted,
    in_bytes,
    progress_bars,
    say,
    say_patches,
)

__all__ = ["command"]


@click.command("switch", short_help="Go to a branch, and bring the build in line.")
@click.argument("branch")
@click.argument("start", required=False, metavar="[START]")
@click.option("-c", "--create", is_flag=True, help="Make BRANCH first, at START (default: HEAD).")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    branch: str,
    start: str | None,
    create: bool,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Go to BRANCH as `git switch` does ("-" is the branch before), once its tree is checked; then
    bring the build in line, where there is one at its default place: only the tensors that the
    patches that came or went edit are written again.

    \b
    Examples:
      patchkit switch try-out
      patchkit switch -c spring main
      patchkit switch -
    """
    if start is not None and not create:
        raise click.UsageError("START goes with -c, which makes the branch")
    with progress_bars(quiet or as_json) as bars:
        done = open_repository(directory).switch(
            branch, create=create, start=start, dry_run=dry_run, progress=in_bytes(bars)
        )
    if as_json:
        print_json(done.to_dict())
        return
    if quiet:
        return
    out = console()
    say(out, f"{'would go to' if dry_run else 'on'} {done.branch} at {done.commit[:10]}", GOOD)
    say_patches(out, done.added, done.changed, done.removed)
    if done.left is not None:
        from patchkit.actions.switch import left_line

        say(out, left_line(done.left), WARNING)
    if done.build is not None:
        say(out, f"build {done.build.folder}: {counted(len(done.build.patches), 'patch')} in force")
