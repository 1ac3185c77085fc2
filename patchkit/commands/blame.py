"""``patchkit blame``: which patch makes the model say something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console

from patchkit.commands.common import directory_option, is_text, json_option, open_repository, print_json
from patchkit.commands.display import BEYOND, NAME, QUIET, Column, console, progress_bars, say, table

if TYPE_CHECKING:
    from patchkit.actions.blame import Blamed, Responsible
    from patchkit.git.history import Commit

__all__ = ["command"]


@click.command("blame", short_help="Say which patch makes the model say something.")
@click.argument("text", metavar="FACT|PROMPT", callback=is_text)
@click.option("--measure", is_flag=True, help="Leave each patch out even where a fact says it.")
@click.option(
    "--answer",
    metavar="TEXT",
    callback=is_text,
    help="What to look for after PROMPT, instead of the model's first word.",
)
@click.option("--rev", "revision", default="HEAD", show_default=True, help="The stack at this commit.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@json_option
def command(
    text: str,
    measure: bool,
    answer: str | None,
    revision: str,
    device: str,
    directory: str,
    as_json: bool,
) -> None:
    """Say which patch makes the model say something, who committed it, when, and from what source.

    A fact in force is found by its id, its subject, its prompt or a paraphrase, with the target
    behind it or not; that needs no model. Any other prompt, or --measure, loads the model once and
    leaves each patch out in turn: the probability of the answer with and without it, and what is
    said without it; the patch that is missed most comes first.

    That costs, for n patches, n + 2 scorings and n + 1 generations of 12 tokens, and for each patch
    the subtraction of its factors from its own weights. The difference is not rounded to the base's
    dtype again: a build without the patch is the same up to that rounding.

    \b
    Examples:
      patchkit blame "LeBron James plays the sport of"
      patchkit blame "Who won the cup? It was" --answer "Brazil"
    """
    repository = open_repository(directory)
    facts = [] if measure or answer is not None else repository.blame(text, revision)
    if facts:
        if as_json:
            print_json({"facts": [item.to_dict() for item in facts], "measured": None})
            return
        for item in facts:
            _show_fact(console(), item)
        return
    with progress_bars() as progress:
        found = repository.measure_blame(
            text, answer=answer, revision=revision, device=device, progress=progress
        )
    if as_json:
        print_json({"facts": [], "measured": found.to_dict()})
        return
    _show_measured(console(), found)


def _show_fact(out: Console, item: Responsible) -> None:
    say(out, f"{item.fact.text} → {item.fact.target}", "bold")
    say(out, f"{item.patch}, line {item.line}", label="    patch   ", label_style=QUIET)
    if item.commit is None:
        say(out, BEYOND, label="    commit  ", label_style=QUIET)
    else:
        say(out, f"{item.commit.id[:10]} {item.commit.subject}", label="    commit  ", label_style=QUIET)
        say(out, _who(item.commit), label="    by      ", label_style=QUIET)
    if item.fact.source is not None:
        say(out, item.fact.source, label="    source  ", label_style=QUIET)


def _show_measured(out: Console, found: Blamed) -> None:
    say(out, f"{found.prompt} → {found.answer}", "bold")
    say(out, " ".join(found.says.split()), label="says  ", label_style=QUIET)
    say(out, f"P {found.probability:.3f} with the whole stack, {found.base:.3f} on the base", QUIET)
    out.print()
    columns = [Column("without", 2, wraps=True), Column("P", right=True), Column("change", right=True)]
    rows = [
        (
            item.patch,
            f"{item.without:.3f}",
            f"{item.without - found.probability:+.3f}",
            " ".join(item.says.split()),
        )
        for item in found.influences
    ]
    out.print(table(out, [*columns, Column("says then", 3, wraps=True)], rows))
    first = found.influences[0]
    if first.without >= found.probability:
        return
    out.print()
    if first.commit is None:
        say(out, f"the commit of {first.patch} is {BEYOND}")
    else:
        say(out, f"{first.commit.id[:10]}  {_who(first.commit)}", NAME)
        say(out, first.commit.subject, label="    ")


def _who(commit: Commit) -> str:
    return f"{commit.author}, {commit.date:%Y-%m-%d %H:%M}"
