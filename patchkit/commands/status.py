"""``patchkit status``: what is in force, and what is half done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json, quiet_option
from patchkit.commands.display import WARNING, console, counted, say
from patchkit.errors import BadInput
from patchkit.settings import FOLDER

if TYPE_CHECKING:
    from patchkit.actions.status import Status

__all__ = ["command"]

_ALTERED = " (its weights were written to since: patchkit build hashes them, and puts right what differs)"


def _base_hint(status: Status) -> str:
    """Where the base is not where it was, or nobody said where it is, how to go on."""
    by_name = not status.base.startswith(FOLDER)
    if status.base_here or status.fingerprint is None or (by_name and status.place is None):
        return ""
    gone = "" if status.place is None else f"is not at {status.place} any more; "
    if by_name:
        return f" ({gone}it is fetched by its name when it is needed)"
    return f" ({gone}say where it lies on this machine: patchkit base PATH)"


@click.command("status", short_help="Say what is in force, and what is half done.")
@directory_option
@quiet_option
@json_option
def command(directory: str, quiet: bool, as_json: bool) -> None:
    """Say where the repository stands: branch, base, patches in force, whether the tree can be
    believed, what is uncommitted or was left half done (with the command that clears it), and
    whether the build is up to date. Exit code 65 if the tree cannot be believed.

    \b
    Example:
      patchkit status
    """
    status = open_repository(directory).status()
    if as_json:
        print_json(status.to_dict())
    elif not quiet:
        out = console()
        say(out, f"on {status.branch}" + (f" at {status.commit[:10]}" if status.commit else ""))
        hint = _base_hint(status)
        say(out, f"base {status.base}{hint}", WARNING if hint else "")
        if status.patches is None or status.facts is None:
            say(out, "in force: not known, since the tree cannot be believed", WARNING)
        else:
            say(out, f"in force: {counted(status.patches, 'patch')}, {counted(status.facts, 'fact')}")
        for build in status.builds:
            hint = _ALTERED if build.state == "perhaps altered" else ""
            style = "" if build.state == "up to date" else WARNING
            say(out, f"build {build.folder}: {build.state}{hint}", style)
        for problem in status.leftovers:
            say(out, f"half done: {problem}", WARNING)
    if status.problems:
        raise BadInput("\n".join(str(problem) for problem in status.problems))
