"""``patchkit eval``: what a stack does to facts, with the field's metrics and intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click
from rich.console import Console

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import (
    BAD,
    GOOD,
    QUIET,
    WARNING,
    Column,
    console,
    counted,
    progress_bars,
    say,
    table,
)
from patchkit.commands.display import text as cell
from patchkit.commands.results import harm_lines

if TYPE_CHECKING:
    from rich.text import Text

    from patchkit.actions.evaluate import Evaluation, Score
    from patchkit.evaluation.intervals import Interval

__all__ = ["command"]

WIDE = 100  # columns from which the intervals of both fit beside that of their difference


@click.command("eval", short_help="Score a stack on facts, beside the base or another stack.")
@click.argument("records", required=False, metavar="[RECORDS]")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    default=("base", "HEAD"),
    show_default="base HEAD",
    help='The two stacks: commits, or "base".',
)
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Ask N of the facts, drawn at random."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the sample and of the resamples.",
)
@click.option("--text", metavar="FILE", help="Compute perplexities and KL on this text.")
@click.option("--texts", is_flag=True, help="Let both models write, and measure the entropy (GE).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@json_option
def command(
    records: str | None,
    compare: tuple[str, str],
    sample: int | None,
    seed: int,
    text: str | None,
    texts: bool,
    device: str,
    directory: str,
    as_json: bool,
) -> None:
    """Score stack B beside stack A on the same facts: each score of both with its 95 % interval (where
    there are 100 columns for them), and the paired difference. Scores are in percent, GE in bits.

    RECORDS is a file of facts, or of CounterFact, zsRE, EasyEdit or KnowEdit records ("-" reads
    standard input); without it, the facts in force at B are asked. Nothing is edited. What was found
    is kept in the catalogue too (patchkit sql "select * from evaluations").

    ES, PS, NS and S are CounterFact's. "says" is free generation, in which nothing of the answer is
    given away; "argmax" and "tokens" hand the model the answer's tokens one after another. "tokens"
    of rewrites, paraphrases and neighbours are zsRE's efficacy, paraphrase and specificity.
    "neighbours kept" have the most probable next token that they have in A.

    \b
    Examples:
      patchkit eval
      patchkit eval counterfact.json --sample 100
      patchkit eval zsre.jsonl --sample 200 --compare v1 v2 --text held-out.txt
    """
    from patchkit.evaluation.cases import read_cases
    from patchkit.evaluation.texts import read_text

    a, b = compare
    cases = None if records is None else read_cases(records)
    running = (text, read_text(text)) if text is not None else None
    with progress_bars(as_json) as progress:
        found = open_repository(directory).evaluate(
            cases,
            a=a,
            b=b,
            sample=sample,
            seed=seed,
            text=running,
            texts=texts,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(console(), found)


def _show(out: Console, found: Evaluation) -> None:
    drawn = "" if found.sample is None else f", drawn with seed {found.seed}"
    say(out, f"{counted(found.cases, 'fact')} of {found.source}{drawn}", "bold")
    a, b = found.sides
    names = ("", a.name, b.name, f"{b.name} − {a.name}")
    columns = [Column(names[0]), *(Column(name, right=True) for name in names[1:])]
    bounds = out.width >= WIDE
    out.print(table(out, columns, [_row(score, bounds) for score in found.scores]))
    if found.text is not None:
        kl = found.text
        perplexities = (
            ""
            if kl.perplexity_old is None or kl.perplexity_new is None
            else f"perplexity {kl.perplexity_old:.4g} → {kl.perplexity_new:.4g}, "
        )
        say(out, f"{kl.text}: {perplexities}KL(A ‖ B) {kl.mean:.3g} nats a token", QUIET)
    for line in harm_lines(a.harm, b.harm):
        say(out, line, QUIET)
    for note in found.notes:
        say(out, note, WARNING)


def _row(score: Score, bounds: bool) -> list[str | Text]:
    apart = score.difference.low > 0 or score.difference.high < 0
    style = "" if not apart else GOOD if score.difference.value > 0 else BAD
    spell = "%.2f" if score.name == "GE" else "%.1f"
    return [
        score.name,
        _told(score.name, score.a, spell, bounds),
        _told(score.name, score.b, spell, bounds),
        cell(_told(score.name, score.difference, spell.replace("%", "%+"), True), style),
    ]


def _told(name: str, found: Interval, spell: str, bounds: bool) -> str:
    """A score, and perhaps its interval, in percent but for GE."""
    if math.isnan(found.value):
        return "–"
    factor = 1 if name == "GE" else 100
    value, low, high = (spell % (factor * number) for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if bounds and not math.isnan(found.low) else value
