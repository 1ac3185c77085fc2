"""``patchkit merge``: another branch's facts, merged, checked and put right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from patchkit.commands.common import (
    directory_option,
    dry_run_option,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import (
    CHANGED,
    GOOD,
    QUIET,
    WARNING,
    Column,
    console,
    counted,
    say,
    say_patches,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from patchkit.actions.mergereport import Dispute, Merged, Told
    from patchkit.repository import Repository

__all__ = ["command"]

SHOWN = 5  # facts whose interference is told


@click.command("merge", short_help="Merge another branch's facts into this one.")
@click.argument("branch", required=False, metavar="[BRANCH]")
@click.option("--ours", is_flag=True, help="In every conflict keep what this branch holds.")
@click.option("--theirs", is_flag=True, help="In every conflict take what BRANCH holds.")
@click.option(
    "--fact",
    "facts",
    multiple=True,
    metavar="KEY=ours|theirs",
    help="One conflict's side: KEY is a fact's id, text or subject, or a patch.",
)
@click.option("--joint", is_flag=True, help="Solve the new patches of both sides together, as one batch.")
@click.option("--no-ff", is_flag=True, help="Make a merge commit also where this branch only moves forward.")
@click.option("-m", "--message", help="The commit's message.")
@click.option("--continue", "proceed", is_flag=True, help="Finish a merge that stopped for choices.")
@click.option("--abort", is_flag=True, help="Give a merge under way up, as git merge --abort does.")
@directory_option
@dry_run_option
@quiet_option
@json_option
def command(
    branch: str | None,
    ours: bool,
    theirs: bool,
    facts: tuple[str, ...],
    joint: bool,
    no_ff: bool,
    message: str | None,
    proceed: bool,
    abort: bool,
    directory: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge BRANCH (a branch, a tag or a commit) into this branch, fact by fact.

    Git merges the files; what is in force afterwards is the three-way merge of the facts, for which
    patches are solved again without a model where both sides took facts out. Where the sides want
    different things of one fact, or a patch would come back that was taken back here, you choose:
    by --ours, --theirs or --fact, or in the file that the message names, and then --continue. The
    choices are recorded in the commit. What --theirs would bring back has to be named.

    Afterwards the facts are listed that the other side's patches disturb most: how far these move a
    fact's output, against what its own patch wants there. --joint solves the new patches of both
    sides together and takes that away; it needs their keys, and one λ and one C.

    \b
    Examples:
      patchkit merge hospital-facts
      patchkit merge hospital-facts --fact "LeBron James=theirs"
      patchkit merge hospital-facts --joint
      patchkit merge --continue
    """
    from patchkit.actions.mergereport import MergeStopped

    choosing = bool(facts or ours or theirs or message)
    _refuse_mixtures(branch, ours and theirs, proceed, abort, joint or no_ff, choosing)
    repository = open_repository(directory)
    if abort:
        _abort(repository, dry_run, quiet, as_json)
        return
    side = "ours" if ours else "theirs" if theirs else None
    choices = _choices(facts)
    try:
        if proceed:
            done = repository.merge_continue(side=side, facts=choices, message=message, dry_run=dry_run)
        else:
            how = {"side": side, "facts": choices, "joint": joint, "forward": not no_ff}
            done = repository.merge(str(branch), **how, message=message, dry_run=dry_run)
    except MergeStopped as stopped:
        if as_json:
            print_json({**stopped.done.to_dict(), "refused": stopped.message})
        elif not quiet:
            _show_disputes(console(), [d for d in stopped.done.disputes if d.choice is None])
        raise
    if as_json:
        print_json(done.to_dict())
    elif not quiet:
        _show(console(), done, dry_run)


def _refuse_mixtures(
    branch: str | None, both: bool, proceed: bool, abort: bool, how: bool, choosing: bool
) -> None:
    if both:
        raise click.UsageError("--ours and --theirs exclude each other; --fact is for single facts")
    if (branch is not None) + proceed + abort != 1:
        raise click.UsageError("give a BRANCH, or --continue, or --abort")
    if (proceed or abort) and how:
        raise click.UsageError("--joint and --no-ff are for the beginning of a merge")
    if abort and choosing:
        raise click.UsageError("--abort goes with no choice and no message")


def _choices(facts: Sequence[str]) -> dict[str, str]:
    choices: dict[str, str] = {}
    for word, side in map(_choice, facts):
        if choices.setdefault(word, side) != side:
            raise click.BadParameter(f"{word!r} is given both sides; choose one", param_hint="--fact")
    return choices


def _choice(text: str) -> tuple[str, str]:
    word, equals, side = text.rpartition("=")
    if not equals or not word.strip() or side not in ("ours", "theirs"):
        raise click.BadParameter(f"{text!r} is not KEY=ours or KEY=theirs", param_hint="--fact")
    return word.strip(), side


def _abort(repository: Repository, dry_run: bool, quiet: bool, as_json: bool) -> None:
    repository.merge_abort(dry_run=dry_run)
    if as_json:
        print_json({"how": "aborted", **({"dry_run": True} if dry_run else {})})
    elif not quiet:
        say(console(), "would give the merge up" if dry_run else "the merge was given up", WARNING)


def _show(out: Console, done: Merged, dry_run: bool) -> None:
    if done.how == "up to date":
        say(out, "already up to date")
        return
    would = "would " if dry_run else ""
    say_patches(out, done.brought, done.changed, done.removed)
    for name in done.again:
        say(out, f"{would}solve {name} again" if dry_run else f"solved {name} again", CHANGED)
    if done.joint:
        verb = "would solve" if dry_run else "solved"
        say(out, f"{verb} {counted(len(done.joint), 'patch')} together: {', '.join(done.joint)}", CHANGED)
    _show_disputes(out, done.disputes)
    _show_interference(out, done)
    for note in done.notes:
        say(out, note, WARNING)
    if done.how == "fast-forward":
        verb = "would move" if dry_run else "moved"
        say(out, f"{verb} this branch forward to {done.branch}", GOOD)
    elif done.commit:
        say(out, f"committed {done.commit[:10]}: {done.message.splitlines()[0]}", GOOD)
    else:
        say(out, "dry run: nothing was written", WARNING)


def _show_disputes(out: Console, disputes: list[Dispute] | tuple[Dispute, ...]) -> None:
    """A small table for each conflict: what each side says, who said so, when, and from where."""
    for dispute in disputes:
        chosen = f"; taken: {dispute.choice}" if dispute.choice else ""
        say(out, f"{dispute.conflict.name}: {dispute.conflict.says}{chosen}", WARNING)
        columns = [Column("side"), Column("says", 3, wraps=True), Column("author", 2), Column("date")]
        rows = [_row(side, getattr(dispute, side), dispute) for side in ("ours", "theirs")]
        out.print(table(out, [*columns, Column("source", 2, wraps=True)], rows))


def _row(side: str, told: Told, dispute: Dispute) -> tuple[str, ...]:
    commit, fact = told.commit, told.held.fact if told.held else None
    if dispute.conflict.key is None:
        says = "in force" if told.held else "not in force"
    else:
        says = fact.target if fact else "(not in force)"
    date = f"{commit.date:%Y-%m-%d}" if commit else "–"
    return side, says, commit.author if commit else "–", date, (fact.source if fact else None) or "–"


def _show_interference(out: Console, done: Merged) -> None:
    if not done.disturbed:
        return
    shown = done.disturbed[:SHOWN]
    rest = (
        f" (the {len(shown)} most disturbed of {len(done.disturbed)})" if len(done.disturbed) > SHOWN else ""
    )
    say(out, f"what the other side does to a fact, against its own edit{rest}:", QUIET)
    rows = [(item.fact.text, item.fact.target, f"{item.overall:.2g}", name) for name, item in shown]
    columns = [
        Column("fact", 3, wraps=True),
        Column("target", 1, wraps=True),
        Column("‖ΔW k‖/‖r‖", right=True),
    ]
    out.print(table(out, [*columns, Column("patch", 2, wraps=True)], rows))
