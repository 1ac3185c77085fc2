"""``patchkit revert``: take back a patch, a commit, or one fact of a patch."""

from __future__ import annotations

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import BAD, GOOD, WARNING, console, progress_bars, say

__all__ = ["command"]


@click.command("revert", short_help="Take back a patch, a commit, or one fact of a patch.")
@click.argument("words", nargs=-1, metavar="[PATCH…|COMMIT]")
@click.option("--fact", "facts", multiple=True, metavar="ID|LINE", help="Only these facts of the one PATCH.")
@click.option("-m", "--message", help="The commit's message.")
@click.option("--check", is_flag=True, help="Measure the facts of patches that were solved on what leaves.")
@click.option("--device", default="auto", show_default=True, help="Where --check runs the model.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    words: tuple[str, ...],
    facts: tuple[str, ...],
    message: str | None,
    check: bool,
    device: str,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take back PATCHes, or all that a COMMIT did to patches, in a new commit.

    Without arguments: the newest patch. Nothing is subtracted: the model is the base with the
    patches that remain, so that taking all of them back gives the base's very bytes. With --fact
    the patch is solved again without these facts (by their id, or their line in facts.jsonl),
    exactly and without a model.

    Patches that were solved on top of what leaves, or together with it, are named. --check measures
    their facts before and after; `patchkit refit` solves them again.

    \b
    Examples:
      patchkit revert
      patchkit revert lebron-james
      patchkit revert lebron-james --fact 2
      patchkit revert lebron-james --check --dry-run
    """
    with progress_bars(quiet or as_json) as progress:
        done = open_repository(directory).revert(
            *words,
            facts=facts,
            message=message,
            check=check,
            dry_run=dry_run,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(done.to_dict())
        return
    if quiet:
        return
    out = console()
    verb = "would take back" if dry_run else "took back"
    for name in done.removed:
        say(out, f"{verb} {name}", BAD)
    for taken in done.taken:
        for fact in taken.facts:
            say(out, f"{verb} {fact.text} → {fact.target}  (of {taken.patch})", BAD)
    for name in done.restored:
        say(out, f"{'would put' if dry_run else 'put'} back {name}", GOOD)
    for name in done.above:
        say(out, f"{name} was solved on top of what left; its facts may hold less well", WARNING)
    if done.checked:
        from patchkit.commands.results import results_table, summary_line
        from patchkit.evaluation.measure import summarise

        results_table(out, done.checked)
        say(out, summary_line(summarise(done.checked)))
    elif check:
        say(out, "no patch was solved on top of what left: nothing to measure")
    if done.refittable:
        say(out, f"solve again with: patchkit refit {' '.join(done.refittable)}", WARNING)
    if done.commit:
        say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
