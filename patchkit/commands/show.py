"""``patchkit show``: one patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patchkit.actions.pages import percent
from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import (
    BEYOND,
    NAME,
    Column,
    console,
    human_size,
    say,
    table,
    weight_name,
)
from patchkit.commands.results import one_line

if TYPE_CHECKING:
    from patchkit.facts import Fact

__all__ = ["command"]


def _p(probability: float | None) -> str:
    """A dash where a model that broke down gave no number."""
    return "–" if probability is None else f"{probability:.3f}"


def _told(fact: Fact) -> str:
    """A fact with what a reviewer asks of it: what it replaces, where it is from."""
    was = f" (was {fact.was})" if fact.was is not None else ""
    origin = "".join(
        f" · {name} {value}" for name, value in (("source", fact.source), ("note", fact.note)) if value
    )
    return f"{fact.text} → {fact.target}{was}{origin}"


@click.command("show", short_help="Show one patch: facts, weights, results.")
@click.argument("patch", required=False, metavar="[PATCH]")
@click.option("--rev", "revision", default="HEAD", show_default=True, help="As it is at this commit.")
@directory_option
@json_option
def command(patch: str | None, revision: str, directory: str, as_json: bool) -> None:
    """Show PATCH (default: the newest): its facts with what was measured when it was committed,
    its rank and norm by layer, and the recipe that made it. Where nothing was measured on this machine,
    as in a clone, the sums stand there that its commit's message tells.

    \b
    Example:
      patchkit show lebron-james
    """
    shown = open_repository(directory).show(patch, revision)
    if as_json:
        print_json(shown.to_dict())
        return
    out = console()
    say(out, shown.name, f"bold {NAME}")
    for name, value in (
        ("id", shown.id),
        ("base", shown.base),
        ("commit", shown.commit or BEYOND),
        ("date", f"{shown.date:%Y-%m-%d %H:%M} {shown.author}" if shown.date else "–"),
        ("size", human_size(shown.size)),
        ("recipe", shown.recipe_line),
    ):
        say(out, value, label=f"{name:<8}")
    if shown.claimed is not None and not shown.results:
        say(out, f"{shown.claimed} (as its commit says; not measured on this machine)", label="results ")
    rows = []
    for line, fact in enumerate(shown.facts, 1):
        result = shown.results.get(line)
        measured = ("–", "–", "–")
        if result:
            before, after = result["before"]["rewrite"], result["after"]["rewrite"]
            measured = (_p(before["target"]), _p(after["target"]), one_line(after["text"] or ""))
        rows.append((line, _told(fact), *measured))
    out.print()
    out.print(
        table(
            out,
            [
                Column("line", right=True),
                Column("fact", 3, wraps=True),
                Column("P before", right=True),
                Column("P after", right=True),
                Column("says", 2),
            ],
            rows,
        )
    )
    out.print()
    out.print(
        table(
            out,
            [
                Column("weight", 1),
                Column("rank", right=True),
                Column("‖ΔW‖", right=True),
                Column("of ‖W‖", right=True),
            ],
            [
                (
                    weight_name(w.name),
                    w.rank,
                    f"{w.norm:.3g}",
                    percent(w.share, 2),
                )
                for w in shown.weights
            ],
        )
    )
