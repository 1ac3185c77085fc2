"""``patchkit tune``: choose the recipe for a base by trials, and confirm it on other facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    engine_options,
    finite,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import (
    GOOD,
    QUIET,
    WARNING,
    Column,
    console,
    counted,
    duration,
    in_bytes,
    progress_bars,
    say,
    table,
)
from patchkit.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from patchkit.actions.tune import Tuned
    from patchkit.evaluation.intervals import Interval

__all__ = ["command"]


@click.command("tune", short_help="Choose the recipe for the base by trials.")
@click.argument("records", metavar="FACTS")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    default=30.0,
    show_default=True,
    help="Time at most: no trial begins that would end later.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=8),
    default=96,
    show_default=True,
    metavar="N",
    help="Facts at most: half choose, half confirm.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the sample and the noise.",
)
@click.option(
    "--from-scratch",
    is_flag=True,
    help="Begin with the rule of thumb for such a model, not with the recipe in patchkit.toml.",
)
@engine_options
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(records: str, directory: str, dry_run: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Choose λ, layers and how targets are searched for the base, by edits that are scored and taken off.

    FACTS is a file of facts, or of CounterFact or EasyEdit records, or counterfact to have it
    fetched ("-" reads standard input). Facts that have `was`, paraphrases and neighbors are used.
    Half of them choose: causal tracing proposes layers, then one setting after another is tried, and
    what is better by CounterFact's S and by the paraphrases answered token for token takes over.

    The other half confirm. Where the new recipe is better there too, it is committed in patchkit.toml,
    with the reasons beside each field; else nothing is. Patches that are in force stay as they are.

    \b
    Examples:
      patchkit tune facts.jsonl
      patchkit tune counterfact --minutes 60 --sample 200
      patchkit tune facts.jsonl --from-scratch --dry-run
    """
    from patchkit.evaluation.cases import read_cases

    with progress_bars(quiet or as_json) as progress:
        cases = read_cases(records, in_bytes(progress))
        done = open_repository(directory).tune(cases, dry_run=dry_run, progress=progress, **options)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        _show(console(), done, dry_run)
    if done.failed is not None:
        raise BadInput(f"what was found could not be confirmed: {done.failed}; patchkit.toml stays")


def _show(out: Console, done: Tuned, dry_run: bool) -> None:
    say(
        out,
        f"{counted(done.chosen_by, 'fact')} of {done.source} choose, {done.held_out} are held out",
        "bold",
    )
    if done.middle is None:
        say(out, "not traced: no time, too few layers, or too few facts that the base says", QUIET)
    else:
        effect = f"{100 * done.effects[done.middle]:+.1f} points"
        say(
            out,
            f"traced {counted(done.traced, 'fact')}: the MLPs around layer {done.middle} bring back {effect}",
        )
    _show_trials(out, done)
    if done.untried:
        say(out, f"no time for {', '.join(done.untried)}; --minutes gives more", WARNING)
    for note in done.notes:
        say(out, note, WARNING)
    for trial in done.trials:
        if trial.failed is not None:
            say(out, f"{trial.name}: {trial.failed}", WARNING)
    if done.failed is not None:
        return
    if done.held is None:
        few = len(done.trials) == 1
        line = "nothing else was tried" if few else "no trial was better than the recipe as it is"
        say(out, f"{line}; patchkit.toml stays", WARNING if few else GOOD)
        return
    columns = [Column("held out"), *(Column(name, right=True) for name in ("as it was", "tuned", "gained"))]
    rows = [
        [
            name,
            _percent(done.held.was[name]),
            _percent(done.held.tuned[name]),
            _points(done.held.gained[name]),
        ]
        for name in done.held.was
    ]
    out.print(table(out, columns, rows))
    spent = f"{duration(done.seconds)} of {duration(60 * done.minutes)}"
    if not done.confirmed:
        say(out, f"not better on the facts that were held out; patchkit.toml stays ({spent})", WARNING)
    elif done.commit is None or dry_run:
        say(out, f"dry run: {_changes(done)} ({spent})", WARNING)
    else:
        say(out, f"{_changes(done)} ({spent})")
        say(out, f"committed {done.commit[:10]}: the recipe in patchkit.toml", GOOD)


def _show_trials(out: Console, done: Tuned) -> None:
    from patchkit.evaluation.tuning import SHOWN

    columns = [Column("tried", share=1), *(Column(name, right=True) for name in (*SHOWN, "s")), Column("")]
    rows = [
        [
            trial.name,
            *(_percent(trial.scores[name]) if trial.scores else "–" for name in SHOWN),
            f"{trial.seconds:.0f}",
            "✓" if trial.taken else "",
        ]
        for trial in done.trials
    ]
    out.print(table(out, columns, rows))


def _changes(done: Tuned) -> str:
    from patchkit.evaluation.tuning import shown

    return ", ".join(
        f"{name} {shown(name, value)}" for name, value in done.changed.items() if name != "guess"
    )


def _percent(found: Interval) -> str:
    return f"{100 * found.value:.1f}"


def _points(found: Interval) -> str:
    value, low, high = (f"{100 * number:+.1f}" for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"
