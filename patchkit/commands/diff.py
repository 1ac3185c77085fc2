"""``patchkit diff``: two stacks compared."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import BAD, CHANGED, GOOD, QUIET, Column, console, say, table

__all__ = ["command"]


@click.command("diff", short_help="Compare two stacks: facts, and weights by layer.")
@click.argument("old", required=False, metavar="[A]")
@click.argument("new", required=False, metavar="[B]")
@directory_option
@json_option
def command(old: str | None, new: str | None, directory: str, as_json: bool) -> None:
    """Compare the stack at commit A with that at B: facts added (+), removed (-) and changed (~),
    and by layer the norm and rank of the difference of the two models' weights.

    "base" stands for the base with nothing on it. B is HEAD if left out; A is then HEAD's parent.

    \b
    Examples:
      patchkit diff
      patchkit diff base HEAD
      patchkit diff v1 v2
    """
    found = open_repository(directory).diff(old, new)
    if as_json:
        print_json(found.to_dict())
        return
    out = console()
    say(out, f"{found.old} → {found.new}", "bold")
    for fact, patch in found.removed:
        say(out, f"{fact.text} → {fact.target}  ({patch})", BAD, label="- ")
    for fact, patch in found.added:
        say(out, f"{fact.text} → {fact.target}  ({patch})", GOOD, label="+ ")
    for before, after, patch in found.changed:
        say(out, f"{after.text} → {before.target} ⇒ {after.target}  ({patch})", CHANGED, label="~ ")
    if not found.weights:
        say(out, "the weights are the same", QUIET)
        return
    out.print()
    out.print(
        table(
            out,
            [Column("weight", 1), Column("rank", right=True), Column("‖difference‖", right=True)],
            [(weight.name, weight.rank, f"{weight.norm:.3g}") for weight in found.weights],
        )
    )
