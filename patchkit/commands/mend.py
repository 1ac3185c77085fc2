"""``patchkit mend``: the hypernetwork of the editor mend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
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
    progress_bars,
    say,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from patchkit.actions.train_mend import Training

__all__ = ["command"]


@click.group("mend", short_help="Train the hypernetwork of the editor mend.")
def command() -> None:
    """The editor mend turns a fact's gradient into an edit with a network that is trained once a base.

    \b
    Example:
      patchkit mend train records.jsonl
    """


@command.command("train", short_help="Train it on records, for this base.")
@click.argument("records")
@click.option("--text", metavar="FILE", help="A text on which the edited model should stay as it is.")
@click.option("--layers", metavar="27-29", help="Layers to edit; by default the last three.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps of Adam at most."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    help="Minutes of training at most.",
)
@click.option(
    "--edits", type=click.IntRange(min=1), default=10, show_default=True, help="Facts edited together."
)
@click.option(
    "--rank", type=click.IntRange(min=1), default=128, show_default=True, help="Of the network's weights."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True, max=1),
    callback=finite,
    default=1e-4,
    show_default=True,
    help="Of Adam.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Of all that is drawn.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def train(records: str, directory: str, quiet: bool, as_json: bool, text: str | None, **options: Any) -> None:
    """Train the network that `commit --method mend` edits with, and keep it beside the statistics.

    RECORDS is a file of facts, or of CounterFact, zsRE, EasyEdit or KnowEdit records ("-" reads
    standard input). The network learns to make the edited model say a fact's target behind its prompt
    and its paraphrases, and to leave its neighbours, and TEXT, as they are; a tenth of the records is
    held out to judge that. Train with as many EDITS together as a commit will have. A run that was
    killed goes on where it was. Without --minutes the same command gives the same network.

    \b
    Examples:
      patchkit mend train counterfact.json --minutes 15
      patchkit mend train facts.jsonl --text held.txt --edits 1 --steps 500
    """
    from patchkit.evaluation.cases import read_cases
    from patchkit.evaluation.texts import read_text

    cases = read_cases(records)
    running = None if text is None else read_text(text)
    from patchkit.actions.train_mend import Settings, train_mend

    own = ("edits", "rank", "learning_rate", "seed")
    settings = Settings(**{name: options.pop(name) for name in own})
    with progress_bars(quiet or as_json) as progress:
        repository = open_repository(directory)
        done = train_mend(repository, cases, text=running, settings=settings, progress=progress, **options)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        _show(console(), done)


def _show(out: Console, done: Training) -> None:
    say(out, f"{counted(done.lessons, 'fact')} to train on, {done.held_out} held out")
    say(out, f"{counted(len(done.weights), 'weight')}, {done.weights[0]} to {done.weights[-1]}", QUIET)
    if done.report is None:
        say(out, "dry run: nothing was trained", WARNING)
        return
    found = done.report
    columns = [Column("held out"), Column("before", right=True), Column("after", right=True)]
    pairs = [
        ("-log p of targets", f"{found.before.nll:.2f}", f"{found.after.nll:.2f}"),
        ("targets said", f"{found.before.success:.1%}", f"{found.after.success:.1%}"),
        ("KL of what should stay", f"{found.before.kl:.3f}", f"{found.after.kl:.3f}"),
        ("next tokens kept", f"{found.before.kept:.1%}", f"{found.after.kept:.1%}"),
    ]
    out.print(table(out, columns, pairs))
    say(out, f"ended after {found.why}, {found.seconds:.0f} s; step {found.best} is kept", QUIET)
    if not found.best:
        say(out, "nothing was learned: train longer, or with a lower --learning-rate", WARNING)
    say(out, f"hypernetwork {str(done.digest)[:12]}: {done.path}", GOOD)
