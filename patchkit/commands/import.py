"""``patchkit import``: an adapter from elsewhere becomes a patch."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.commands.commit import read_given, show
from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    is_text,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import progress_bars

__all__ = ["command"]


@click.group("import", short_help="Take in another program's adapter as a patch.")
def command() -> None:
    """Take in another program's adapter as a patch.

    \b
    Example:
      patchkit import peft adapter --facts facts.jsonl
    """


@command.command("peft", short_help="A LoRA adapter of PEFT's.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--facts", "file", metavar="FILE", help="What it is for (default: DIR/facts.jsonl).")
@click.option(
    "--fact",
    "inline",
    multiple=True,
    metavar="'SUBJECT | PROMPT | TARGET'",
    callback=is_text,
    help="The same, without a file.",
)
@click.option("-m", "--message", help="The commit's message.")
@click.option("--replace", is_flag=True, help="Take older facts with the same key out of their patches.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def peft(
    folder: Path,
    file: str | None,
    inline: tuple[str, ...],
    message: str | None,
    replace: bool,
    device: str,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Commit the LoRA adapter in DIR as a patch on this base.

    A patch says what it is for, so facts are needed: from --facts, --fact, or the facts.jsonl that
    patchkit's own exports hold. They are measured before and after, as those of a commit are; an
    adapter that does something else as well does that too. It must be a plain LoRA in safetensors
    on modules of the base: DoRA, biases, whole modules and fields that are not known are refused by
    name. Single facts cannot be taken out of it, since it has no keys.

    \b
    Examples:
      patchkit import peft ../adapter
      patchkit import peft ../lora --fact "LeBron James | {} plays the sport of | basketball"
    """
    if file is not None and inline:
        raise click.UsageError("give --facts or --fact, and not both")
    facts = read_given(file, inline) if file is not None or inline else None
    repository = open_repository(directory)
    with progress_bars(quiet or as_json) as progress:
        done = repository.take_in(
            folder, facts, message=message, replace=replace, dry_run=dry_run, device=device, progress=progress
        )
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        show(done)
