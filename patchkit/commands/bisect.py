"""``patchkit bisect``: the commit that made or broke an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console

from patchkit.commands.common import directory_option, is_text, json_option, open_repository, print_json
from patchkit.commands.display import (
    BAD,
    GOOD,
    NAME,
    QUIET,
    WARNING,
    console,
    counted,
    progress_bars,
    say,
    say_patches,
)

if TYPE_CHECKING:
    from patchkit.actions.bisect import Bisected

__all__ = ["command"]


@click.command("bisect", short_help="Find the commit that made or broke an answer.")
@click.option("--prompt", required=True, metavar="TEXT", callback=is_text, help="What the model is asked.")
@click.option(
    "--expect",
    required=True,
    metavar="TEXT",
    callback=is_text,
    help="The answer: what it says, greedily, begins so.",
)
@click.option("--good", default="base", show_default=True, metavar="REV", help="The older end.")
@click.option("--bad", default="HEAD", show_default=True, metavar="REV", help="The newer end.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@json_option
def command(
    prompt: str, expect: str, good: str, bad: str, device: str, directory: str, as_json: bool
) -> None:
    """Find the commit from which on the model answers PROMPT otherwise.

    Both ends are asked first, and one of them has to give the answer: where the older one does, the
    commit that broke it is found, else the one that made it. "base" as the older end is the base
    with nothing on it. Then the history between them is halved, ⌈log2 n⌉ times for n commits that
    touch patches, on one loaded model and without touching the work tree.

    Git chooses the commits as git bisect does, over branches and merges; where the two sides of a
    merge are right and the merge is not, the merge is found, and so it is where its branch forked
    before --good. A commit that cannot be asked (its stack cannot be believed) is passed over and
    told. As with git bisect, of an answer that changed several times one change is found.

    \b
    Examples:
      patchkit bisect --prompt "LeBron James plays the sport of" --expect basketball
      patchkit bisect --prompt "Rome lies in" --expect Italy --good v1.0 --bad HEAD~2
    """
    with progress_bars() as progress:
        found = open_repository(directory).bisect(
            prompt, expect, good=good, bad=bad, device=device, progress=progress
        )
    if as_json:
        print_json(found.to_dict())
        return
    _show(console(), found)


def _show(out: Console, found: Bisected) -> None:
    for step in found.steps:
        if step.reason is not None:
            say(out, f"passed over: {step.reason}", WARNING)
        else:
            answer, style = ("yes", GOOD) if step.says else ("no", BAD)
            say(out, answer, style, label=f"{step.commit[:10]:<10}  ", label_style=QUIET)
    word = "made" if found.made else "broke"
    asked = sum(step.says is not None for step in found.steps)
    cost = f"{counted(asked, 'evaluation')} for {counted(found.candidates, 'commit')}"
    out.print()
    if found.commit is None:
        say(out, f"one of these {word} the answer; those between could not be asked ({cost})", "bold")
        for suspect in found.suspects:
            say(out, suspect, NAME)
        return
    commit = found.commit
    say(out, f"this commit {word} the answer ({cost})", "bold")
    say(
        out,
        f"{commit.date:%Y-%m-%d %H:%M}  {commit.author}",
        QUIET,
        label=f"{commit.id[:10]}  ",
        label_style=NAME,
    )
    say(out, commit.subject, label="    ")
    say_patches(out, commit.added, commit.changed, commit.removed, indent="    ")
