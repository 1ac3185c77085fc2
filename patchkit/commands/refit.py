"""``patchkit refit``: solve patches again for their targets, on this stack or a new base."""

from __future__ import annotations

from typing import Any

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import GOOD, QUIET, WARNING, console, counted, progress_bars, say

__all__ = ["command"]


@click.command("refit", short_help="Solve patches again for their targets.")
@click.argument("words", nargs=-1, metavar="[PATCH…]")
@click.option("--base", metavar="NEW", help="Move every patch onto this base, of the same architecture.")
@click.option("--retry", is_flag=True, help="Optimise facts that do not take again.")
@click.option(
    "--corpus", metavar="FILE|DATASET", help="Text for the statistics C, where it lies elsewhere now."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("-m", "--message", help="The commit's message.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(words: tuple[str, ...], directory: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Solve PATCHes (all, where none is named) again for the targets that they hold.

    Keys and residuals are collected again, by forward passes only, with the base and the other
    patches in force: the mend after a patch below was reverted, refitted or scaled. Several patches
    are solved one after another, oldest first, each on what is in force by then. Files change in
    place, in one commit; a folder keeps its name. The table compares the stack before and after.

    With --base every patch moves onto another base, for instance one tuned from theirs, and
    patchkit.toml with them; the table compares that base alone with what stands on it. Facts that
    do not take are listed; --retry optimises these again, and no others.

    \b
    Examples:
      patchkit refit microsoft
      patchkit refit --base ./my-model-v2 --retry
    """
    with progress_bars(quiet or as_json) as progress:
        done = open_repository(directory).refit(*words, progress=progress, **options)
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        _show(done, dry_run=options["dry_run"])


def _show(done: Any, *, dry_run: bool) -> None:
    from patchkit.commands.results import results_table, summary_line

    out = console()
    results_table(out, done.changes)
    say(out, summary_line(done.summary))
    for one in done.patches:
        if one.retried:
            texts = ", ".join(fact.text for fact in one.retried)
            say(out, f"optimised again in {one.name}: {texts}", WARNING)
        for fact in one.lost:
            say(out, f"does not take: {fact.text} → {fact.target}  (of {one.name})", WARNING)
    for name in done.above:
        again = f"; refit it too: patchkit refit {name}" if name in done.refittable else ""
        say(out, f"{name} was solved on top of what changed{again}", WARNING)
    for note in done.notes:
        say(out, note, WARNING)
    phases = " · ".join(f"{phase} {seconds:.1f}" for phase, seconds in done.timings.items())
    say(out, f"{sum(done.timings.values()):.1f} s: {phases}", QUIET)
    for one in done.patches:
        say(out, f"{one.name}: {counted(len(one.patch.facts), 'fact')}, id {one.patch.id[:12]}")
    if done.base is not None:
        say(out, f"base {done.base.settings.base_source} · {done.base.settings.base_fingerprint[:19]}…")
    if done.commit:
        say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
    elif done.unchanged:
        say(out, "every patch is as it was: there is nothing to commit", GOOD)
    elif dry_run:
        say(out, "dry run: nothing was written", WARNING)
