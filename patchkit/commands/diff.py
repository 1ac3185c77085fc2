"""``patchkit diff``: two stacks compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from patchkit.actions.pages import percent
from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import (
    BAD,
    CHANGED,
    GOOD,
    QUIET,
    Column,
    console,
    progress_bars,
    say,
    table,
    weight_name,
)
from patchkit.commands.scores import kl_line
from patchkit.facts import told_change

if TYPE_CHECKING:
    from patchkit.actions.behaviour import Behaviour
    from patchkit.actions.diff import Difference, WeightDifference

__all__ = ["command"]


@click.command("diff", short_help="Compare two stacks: facts, weights, and what the models say.")
@click.argument("old", required=False, metavar="[A]")
@click.argument("new", required=False, metavar="[B]")
@click.option("--weights", "measure", is_flag=True, help="Measure how far and how alike, by weight.")
@click.option(
    "--behavior", is_flag=True, help="Ask both models about the facts that differ (loads the base)."
)
@click.option("--probe", metavar="FILE", help="Ask these too: a prompt a line, or facts. Implies --behavior.")
@click.option("--text", metavar="FILE", help="Compute KL on this text. Implies --behavior.")
@click.option("--html", metavar="FILE", help="Write a page with plots. Implies --weights.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@json_option
def command(
    old: str | None,
    new: str | None,
    measure: bool,
    behavior: bool,
    probe: str | None,
    text: str | None,
    html: str | None,
    device: str,
    directory: str,
    as_json: bool,
) -> None:
    """Compare the stack at commit A with that at B: facts added (+), removed (-) and changed (~; with
    two patches where another patch took the fact over), and by layer the norm and rank of the
    difference of the two models' weights.

    "base" stands for the base with nothing on it. B is HEAD if left out; A is then HEAD's parent.

    --weights adds: the norm as a share of the base's weight, the effective rank exp(-Σ p log p) with
    p = σ / Σ σ, the largest singular value, and between the two stacks' own ΔW the cosine and the
    smallest and largest principal angle of the spaces that they write to and read from.

    --behavior loads the base once and asks both models: the facts that differ, their neighbours and
    the probes. KL(A ‖ B) is of the next-token distributions over the text's first 4096 tokens, or
    over the prompts that were asked where no text is given.

    \b
    Examples:
      patchkit diff
      patchkit diff base HEAD --weights
      patchkit diff v1 v2 --behavior --probe prompts.txt --html diff.html
    """
    if html is not None:
        from patchkit.actions.difference_page import check_page

        check_page(Path(html))
    options = _behaviour_options(probe, text, device) if behavior or probe or text else None
    with progress_bars() as progress:
        if options is not None:
            options["progress"] = progress
        found = open_repository(directory).diff(
            old, new, measure=measure or html is not None, behaviour=options
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    if html is not None:  # last: what took so long to find is told, whatever becomes of the file
        from patchkit.actions.difference_page import write_page

        write_page(found, Path(html))
        if not as_json:
            say(console(), f"written: {html}", QUIET)


def _show(found: Difference) -> None:
    out = console()
    say(out, f"{found.old} → {found.new}", "bold")
    _show_facts(out, found)
    _show_weights(out, found.weights)
    if found.behaviour is not None:
        _show_behaviour(out, found.behaviour)


def _behaviour_options(probe: str | None, text: str | None, device: str) -> dict[str, Any]:
    from patchkit.actions.behaviour import read_probes
    from patchkit.evaluation.texts import read_text

    return {
        "probes": read_probes(probe) if probe is not None else None,
        "text": (text, read_text(text)) if text is not None else None,
        "device": device,
    }


def _show_facts(out: Console, found: Difference) -> None:
    for fact, patch in found.removed:
        say(out, f"{fact.text} → {fact.target}  ({patch})", BAD, label="- ")
    for fact, patch in found.added:
        say(out, f"{fact.text} → {fact.target}  ({patch})", GOOD, label="+ ")
    for before, after, patch in found.changed:
        say(out, f"{told_change(before, after)}  ({patch})", CHANGED, label="~ ")
    for item in found.superseded:
        patches = f"({item.old_patch} ⇒ {item.new_patch})"
        say(out, f"{told_change(item.before, item.after)}  {patches}", CHANGED, label="~ ")


def _show_weights(out: Console, weights: list[WeightDifference]) -> None:
    if not weights:
        say(out, "the weights are the same", QUIET)
        return
    measured = weights[0].measures is not None
    names = ("rank", "eff.", "‖difference‖", "of ‖W‖", "σ₁", "cos", "write", "read") if measured else (
        "rank", "‖difference‖"
    )  # fmt: skip
    columns = [Column("weight", 1, wraps=True), *(Column(name, right=True) for name in names)]
    out.print()
    out.print(table(out, columns, [_weight_row(weight) for weight in weights]))


def _weight_row(weight: WeightDifference) -> tuple[Any, ...]:
    found = weight.measures
    if found is None:
        return (weight_name(weight.name), weight.rank, f"{weight.norm:.3g}")
    return (
        weight_name(weight.name),
        weight.rank,
        f"{found.effective_rank:.1f}",
        f"{weight.norm:.3g}",
        percent(found.relative, 2),
        f"{found.spectral_norm:.3g}",
        "–" if found.cosine is None else f"{found.cosine:.2f}",
        _angles(found.output_angles),
        _angles(found.input_angles),
    )


def _angles(values: tuple[float, ...]) -> str:
    return "–" if not values else f"{values[0]:.0f}–{values[-1]:.0f}°"


def _show_behaviour(out: Console, found: Behaviour) -> None:
    if found.facts:
        out.print()
        columns = [Column("fact", 3, wraps=True), Column("P A", right=True), Column("P B", right=True)]
        columns += [Column("A says", 2, wraps=True), Column("B says", 2, wraps=True)]
        rows = [
            (
                f"{f.prompt} → {f.target}",
                f"{f.target_old:.3f}",
                f"{f.target_new:.3f}",
                *_said(f.says_old, f.says_new),
            )
            for f in found.facts
        ]
        out.print(table(out, columns, rows))
    if found.prompts:
        out.print()
        columns = [Column("", 0), Column("prompt", 1, wraps=True)]
        columns += [Column("A says", 1, wraps=True), Column("B says", 1, wraps=True)]
        rows = [("=" if p.same else "≠", p.prompt, *_said(p.old, p.new)) for p in found.prompts]
        out.print(table(out, columns, rows))
    if found.divergence is not None:
        out.print()
        kl = found.divergence
        say(
            out,
            f"{kl_line(kl)}, at most {kl.largest:.3g}: {kl.positions} positions of {kl.text}",
        )


def _said(*texts: str) -> list[str]:
    return [" ".join(said.split()) for said in texts]
