"""``patchkit locate``: in which layers and at which tokens a model holds facts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import (
    QUIET,
    WARNING,
    Column,
    console,
    counted,
    in_bytes,
    progress_bars,
    say,
    table,
)

if TYPE_CHECKING:
    from patchkit.actions.locate import Located
    from patchkit.evaluation.intervals import Interval

__all__ = ["command"]

WIDE = 120  # columns from which the intervals fit


@click.command("locate", short_help="Find the layers that hold facts, by causal tracing.")
@click.argument("records", metavar="FACTS")
@click.option(
    "--rev", "revision", default="base", show_default=True, help='The stack at this commit, or "base".'
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Trace N of the facts that the model says, drawn at random.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 100),
    default=10,
    show_default=True,
    metavar="N",
    help="Samples of the noise for each fact.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 1000),
    default=3.0,
    show_default=True,
    help="Its standard deviation, as a multiple of that of the subjects' embeddings.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    metavar="N",
    help="Layers whose MLPs or attentions are restored together; by default 10 of 48, or that share.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the sample, the noise and the resamples.",
)
@click.option("--figure", metavar="FILE", help="Draw the heat maps: FILE.png or FILE.svg.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@json_option
def command(
    records: str,
    revision: str,
    sample: int | None,
    samples: int,
    noise: float,
    window: int | None,
    seed: int,
    figure: str | None,
    device: str,
    directory: str,
    as_json: bool,
) -> None:
    """Trace where the base holds the facts that it says (causal tracing, as in ROME): noise on the
    subject's embeddings takes the object's probability away (the total effect), and one state put
    back to what it was without the noise brings some of it back (the indirect effect).

    FACTS is a file of facts, or of CounterFact, zsRE, EasyEdit or ROME's known records ("-" reads
    standard input). Of each fact the object is traced that the model says, the target or what it
    `was`; facts of which it says neither are left out and counted. Nothing is edited.

    Shows for each class of tokens the layer with the highest average indirect effect, in percent
    points: of the hidden state behind a layer, and of the MLPs and the attentions of a window of layers
    around it. From 120 columns on, and in --json, with 95 % intervals over the facts.

    \b
    Examples:
      patchkit locate known.jsonl --sample 100 --figure where.png
      patchkit locate facts.jsonl --samples 3
      patchkit locate facts.jsonl --rev HEAD --json
    """
    from patchkit.evaluation.cases import read_cases

    if figure is not None:
        from patchkit.evaluation.figures import check_figure

        check_figure(Path(figure))
    with progress_bars(as_json) as progress:
        cases = read_cases(records, in_bytes(progress))
        found = open_repository(directory).locate(
            cases,
            revision=revision,
            sample=sample,
            samples=samples,
            noise=noise,
            window=window,
            seed=seed,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(console(), found)
    if figure is not None:  # last: what took so long to trace is told, whatever becomes of the file
        from patchkit.actions.locate import draw
        from patchkit.evaluation.figures import write_figure

        write_figure(draw(found), Path(figure))


def _show(out: Console, found: Located) -> None:
    from patchkit.evaluation.tracing import CLASSES, KINDS

    how = f"noise of {found.noise:g} σ, {counted(found.samples, 'sample')}"
    say(out, f"{counted(len(found.traced), 'fact')} of {found.source} on {found.revision}, {how}", "bold")
    clean, corrupted, total = (found.means[name] for name in ("clean", "corrupted", "total"))
    effect = f"total effect {_points(total, True)}"
    say(out, f"P(object) {100 * clean.value:.1f} % → {100 * corrupted.value:.1f} %: {effect}")
    window = counted(found.window, "layer")
    names = ("highest effect, at layer", "hidden", f"MLPs ({window})", f"attentions ({window})")
    columns = [Column(names[0]), *(Column(name, right=True) for name in names[1:])]
    bounds = out.width >= WIDE
    rows = [[place, *(_highest(found, kind, place, bounds) for kind in KINDS)] for place in CLASSES]
    out.print(table(out, columns, rows))
    if found.left_out:
        say(out, f"{counted(len(found.left_out), 'fact')} left out: the model does not say the object", QUIET)
    for note in found.notes:
        say(out, note, WARNING)


def _highest(found: Located, kind: str, place: str, bounds: bool) -> str:
    highest = found.highest(kind, place)
    if highest is None:
        return "–"
    layer, effect = highest
    return f"{_points(effect, bounds)} at {layer}"


def _points(effect: Interval, bounds: bool) -> str:
    """An effect in percent points, perhaps with its interval."""
    value, low, high = (f"{100 * number:+.1f}" for number in (effect.value, effect.low, effect.high))
    return f"{value} ({low} to {high})" if bounds and not math.isnan(effect.low) else value
