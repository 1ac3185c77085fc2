"""``patchkit export``: patches as an adapter for another program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.text import Text

from patchkit.actions.pages import percent
from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    licence_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import (
    BAD,
    GOOD,
    WARNING,
    Column,
    console,
    counted,
    human_size,
    progress_bars,
    say,
    table,
    text,
    weight_name,
)
from patchkit.commands.results import one_line

if TYPE_CHECKING:
    from patchkit.actions.export import Exported, Shipped
    from patchkit.shipping.probe import Probed

__all__ = ["command"]

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group("export", short_help="Write patches as an adapter for another program.")
def command() -> None:
    """Write patches as an adapter that another program puts on the base.

    \b
    Examples:
      patchkit export peft --out adapter
      patchkit export peft lebron-james --for vllm --probe --out adapter
      patchkit export gguf --out adapter
    """


def export_options(command: Command) -> Command:
    """What every form of export takes."""
    for option in reversed(
        (
            click.argument("patches", nargs=-1, metavar="[PATCH…]"),
            click.option(
                "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A new folder."
            ),
            click.option(
                "--rev", "revision", default="HEAD", show_default=True, help="The stack at this commit."
            ),
            click.option(
                "--max-rank", type=click.IntRange(min=1), metavar="R", help="No more than R terms a module."
            ),
            click.option("--probe", is_flag=True, help="Ask it, and see that it does what the build does."),
            licence_option,
            click.option(
                "--push-to-hub",
                metavar="OWNER/NAME",
                help="Upload it to this model repository of the Hugging Face hub too.",
            ),
            click.option("--private", is_flag=True, help="Make that repository private, where it is new."),
            click.option(
                "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps."
            ),
            directory_option,
            dry_run_option,
            quiet_option,
            json_option,
        )
    ):
        command = option(command)
    return command


@command.command("peft", short_help="A LoRA adapter that PEFT loads.")
@click.option("--for", "runtime", type=click.Choice(["vllm"]), help="Of a form that this program accepts.")
@export_options
def peft(directory: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write PATCHes (default: the whole stack) as a PEFT LoRA adapter to the new folder DIR.

    It holds the factors as they are, side by side, so that the base with it computes what the build
    computes, up to the build's one rounding; of an update that is stored dense, singular factors.
    All modules have one rank and alpha is that rank: then every program scales alike. Nothing is
    written over.

    --max-rank keeps the R largest singular values; what that costs is said of each weight, and
    measured on each fact. --for vllm takes the next rank that vLLM accepts and refuses models for
    which it has no LoRA. --probe loads the adapter with PEFT, asks base, build and adapter for each
    fact and its neighbours, and writes nothing (exit code 1) where the adapter changes nothing,
    loses a fact, or moves a neighbour that the build leaves alone. --push-to-hub uploads what was
    written; log in first: hf auth login.

    \b
    Examples:
      patchkit export peft --out adapter --probe
      patchkit export peft lebron-james microsoft --rev v1.0 --out adapter
      patchkit export peft --max-rank 16 --for vllm --out adapter
    """
    _export("peft", directory, quiet, as_json, options)


@command.command("gguf", short_help="A LoRA adapter in GGUF, for llama.cpp.")
@export_options
def gguf(directory: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write PATCHes (default: the whole stack) as a LoRA in GGUF to the new folder DIR.

    adapter.gguf goes with the base in GGUF: llama-cli -m BASE.gguf --lora DIR/adapter.gguf. It is
    read back and compared tensor for tensor before it is at its place. Only weights of the
    feed-forward part are written, which llama.cpp keeps in the checkpoint's order.

    --max-rank and --probe are those of `export peft`; the probe asks PEFT with the factors that the
    file reads back as, and does not run llama.cpp.

    \b
    Examples:
      patchkit export gguf --out adapter
      patchkit export gguf lebron-james --probe --out adapter
    """
    _export("gguf", directory, quiet, as_json, options)


def _export(form: str, directory: str, quiet: bool, as_json: bool, options: dict[str, Any]) -> None:
    if options["probe"] and options["dry_run"]:
        raise click.UsageError("--probe asks what was written; leave out --dry-run")
    if options["private"] and options["push_to_hub"] is None:
        raise click.UsageError("--private is for the hub's repository; add --push-to-hub OWNER/NAME")
    repository = open_repository(directory)
    with progress_bars(quiet or as_json) as progress:
        done = repository.export(
            options.pop("patches"), options.pop("out"), form=form, progress=progress, **options
        )
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        show(console(), done)


def show(out: Console, done: Exported) -> None:
    """What was written, weight by weight; then what was measured, fact by fact."""
    what = f"{counted(len(done.patches), 'patch')}, {counted(done.facts, 'fact')}"
    size = human_size(sum(done.sizes.values()))
    modules = counted(len(done.weights), "module")
    place = "would write" if done.folder is None else f"{done.folder}:"
    say(out, f"{place} {what}, rank {done.rank} in {modules}, {size}")
    columns = [Column("weight", 1), *(Column(name, right=True) for name in ("terms", "‖ΔW‖", "error"))]
    out.print(table(out, columns, [_weight(w) for w in done.weights]))
    if done.probed is not None:
        out.print()
        _show_probed(out, done)
    for note in done.notes:
        say(out, note, WARNING)
    if done.pushed is not None:
        say(out, f"uploaded: {done.pushed}", GOOD)


def _weight(weight: Shipped) -> tuple[str, int, str, str]:
    error = percent(weight.error, 2) if weight.error else "none"
    return weight_name(weight.weight), weight.rank, f"{weight.norm:.3g}", error


def _show_probed(out: Console, done: Exported) -> None:
    assert done.probed is not None
    assert done.verdict is not None
    numbers = [Column(name, right=True) for name in ("P base", "P build", "P adapter")]
    columns = [
        Column(""),
        Column("fact", 3, wraps=True),
        *numbers,
        Column("says", 2),
        Column("neigh.", right=True),
    ]
    out.print(table(out, columns, [_probed(one) for one in done.probed]))
    told = done.verdict
    line = (
        f"takes effect on {told.effective} of {counted(told.facts, 'fact')}; "
        f"{told.took} prefer the target, {told.took_in_build} in the build"
    )
    if told.neighbors:
        line += (
            f"; {told.kept} of {counted(told.neighbors, 'neighbour')} kept, {told.kept_in_build} in the build"
        )
    say(out, line, GOOD if told.effective == told.facts and told.took >= told.took_in_build else WARNING)


def _probed(one: Probed) -> tuple[str | Text, ...]:
    good = not one.silent and not one.lost
    states = (one.base, one.build, one.shipped)
    return (
        Text("✓", style=GOOD) if good else Text("✗", style=BAD),
        text(f"{one.fact.subject} → {one.fact.target}"),
        *(f"{state.rewrite.target:.3f}" for state in states),
        text(one_line(one.shipped.rewrite.text or "")),
        f"{one.kept_neighbors}/{len(one.base.neighbors)}" if one.base.neighbors else "–",
    )
