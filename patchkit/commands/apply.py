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
from patchkit.commands.display import console, counted, text

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
        out.print(
            text(
                f"{verb} {done.name}: {counted(len(done.patch.facts), 'fact')}, id {done.patch.id[:12]}",
                "green",
            )
        )
        for taken in done.replaced:
            facts = ", ".join(fact.text for fact in taken.facts)
            what = "would replace" if dry_run else "replaced"
            out.print(text(f"{what} in {taken.patch}: {facts}", "yellow"))
        for note in done.notes:
            out.print(text(note, "yellow"))
        if done.commit:
            out.print(text(f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", "green"))
