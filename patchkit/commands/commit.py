"""``patchkit commit``: edit facts into the model and commit them as a patch."""

from __future__ import annotations

import functools
import sys
from typing import Any

import click

from patchkit.actions.pages import percent
from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    engine_options,
    is_text,
    json_option,
    open_repository,
    print_json,
    quiet_option,
    recipe_options,
    recipe_overrides,
)
from patchkit.commands.display import GOOD, QUIET, WARNING, console, human_size, progress_bars, say
from patchkit.facts import Batch, parse_inline, read_facts, with_reverses

__all__ = ["command", "read_given", "show"]


@click.command("commit", short_help="Edit facts into the model and commit them as a patch.")
@click.argument("facts", required=False, metavar="[FACTS]")
@click.option(
    "--fact",
    "inline",
    multiple=True,
    metavar="'SUBJECT | PROMPT | TARGET'",
    callback=is_text,
    help="One fact, instead of a file.",
)
@click.option("-m", "--message", help="The commit's message; made from the facts otherwise.")
@click.option("--replace", is_flag=True, help="Take older facts with the same key out of their patches.")
@click.option("--skip-known", is_flag=True, help="Leave out what the model already says.")
@click.option("--with-reverse", is_flag=True, help="Edit each fact's reverse too, as a fact of its own.")
@click.option(
    "--gate",
    multiple=True,
    metavar="NAME=NUMBER,…",
    help="Refuse below: efficacy, argmax, generation, paraphrases, neighbors, kept; above: perplexity, "
    "growth.",
)
@recipe_options
@engine_options
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    facts: str | None,
    inline: tuple[str, ...],
    message: str | None,
    gate: tuple[str, ...],
    directory: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Edit FACTS into the model and commit them as one patch.

    FACTS is a file of one JSON fact a line, CounterFact, zsRE or EasyEdit records, or - for
    standard input. Every fault in it is listed and nothing is written (exit code 65). The table
    shows what the edited model says, measured on the weights that a build of it holds; below it stands what
    happened to the rest: the perplexity of text that the base wrote itself, the norm of the edited
    weights, and how many of the facts in force before are still said. Of those, 100 are asked at most,
    the ones that the edit disturbs most; where that is not known or the same, others at each edit. An
    edit that fails its --gate is shown too, kept aside and refused (exit code 3).

    --gate names shares from 0 to 1 that an edit must reach, and multiples of the base's that the whole
    stack may not pass: perplexity=1.02, growth=1.05. "kept" is of the facts in force before that were
    asked and said; where none was, none is lost.

    An edit works in one direction: a fact that is to be said from its other end too is edited twice,
    by --with-reverse where it has a "reverse".

    \b
    Examples:
      patchkit commit facts.jsonl -m "Correct two founders"
      patchkit commit --fact "LeBron James | {} plays the sport of | basketball"
      patchkit commit facts.jsonl --gate efficacy=0.9,neighbors=0.95,perplexity=1.02
    """
    from patchkit.actions.changes import GateRefused
    from patchkit.actions.gates import parse_gate
    from patchkit.actions.given import checked

    if (facts is None) == (not inline):
        raise click.UsageError("give a file of facts, or --fact, and not both")
    gates = parse_gate(",".join(gate)) if gate else {}
    overrides = recipe_overrides(options)
    in_force = functools.cache(lambda: open_repository(directory).stack().facts_in_force())

    def read() -> Batch:
        batch = read_given(facts, inline)
        return with_reverses(batch, in_force()) if options["with_reverse"] else batch

    batch = checked(read, dict if options["replace"] else in_force)
    repository = open_repository(directory)
    try:
        with progress_bars(quiet or as_json) as progress:
            done = repository.commit(
                batch, message=message, gate=gates, overrides=overrides, progress=progress, **options
            )
    except GateRefused as refused:
        if as_json:
            print_json({**refused.done.to_dict(), "refused": refused.message})
        elif not quiet:
            show(refused.done, refused=True)
        raise
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        show(done)


def read_given(file: str | None, texts: tuple[str, ...]) -> Batch:
    """The facts of a file, or those on the command line."""
    if file is not None:
        return read_facts(file)
    facts = tuple(parse_inline(item) for item in texts)
    from patchkit.facts import dump_facts, parse_facts

    return parse_facts(dump_facts(facts), "--fact")  # finds duplicates as in a file


def show(done: Any, *, refused: bool = False) -> None:
    """The table, the sums, and what was recorded (nothing, where a gate refused it)."""
    from patchkit.commands.results import earlier_line, harm_lines, lost_line, results_table, summary_line

    out = console()
    if done.known:
        what = "left out" if done.skipped_known else "left in"
        names = ", ".join(fact.subject for fact in done.known)
        say(out, f"the model already says {len(done.known)} of them, {what}: {names}", WARNING)
    for item in done.replaced:
        say(out, f"replaced in {item.patch}: {', '.join(fact.text for fact in item.facts)}", WARNING)
    results_table(out, done.changes)
    say(out, summary_line(done.summary))
    for line in harm_lines(*done.harm):
        say(out, line, QUIET)
    if line := earlier_line(done.earlier):
        say(out, line, QUIET)
    if line := lost_line(done.earlier, committed=done.commit is not None):
        say(out, line, WARNING)
    for note in done.notes:
        say(out, note, WARNING)
    delta, share = done.norm
    phases = " · ".join(f"{phase} {seconds:.1f}" for phase, seconds in done.timings.items())
    say(out, f"{sum(done.timings.values()):.1f} s: {phases}", QUIET)
    say(out, f"patch {done.patch.name} · id {done.patch.id[:12]} · {human_size(done.size)}")
    say(out, f"‖ΔW‖ {delta:.3g}, {percent(share, 2)} of the edited weights'")
    if refused:
        pass  # the line on standard error says it
    elif done.unchanged:
        say(out, "the patch in force is this very one: there is nothing to commit", GOOD)
    elif done.commit is None:
        say(out, "dry run: nothing was written", WARNING)
    else:
        say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
    sys.stdout.flush()
