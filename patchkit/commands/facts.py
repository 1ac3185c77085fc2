"""``patchkit facts``: search the facts in force, or check a file of facts."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json, quiet_option
from patchkit.commands.display import GOOD, QUIET, WARNING, Column, console, counted, say, table
from patchkit.errors import NotFound
from patchkit.facts import Fact, FactsError, Key, dump_facts, one_way, read_facts

__all__ = ["command"]


@click.group("facts", short_help="Search the facts in force, or check a file of facts.")
def command() -> None:
    """Search the facts in force, or check a file of facts.

    \b
    Example:
      patchkit facts check facts.jsonl
    """


@command.command("check", short_help="Check a file of facts without loading a model.")
@click.argument("file", metavar="FILE")
@click.option("--canonical", is_flag=True, help="Print the facts in their canonical form.")
@directory_option
@quiet_option
@json_option
def check(file: str, canonical: bool, directory: str, quiet: bool, as_json: bool) -> None:
    """Check FILE as `commit` would, and against the stack where there is a repository.

    Lists every fault with its line (as JSON too, with --json); exit code 65 if there is one. Facts
    that are said from one end only are told too: an edit works in one direction, and `commit
    --with-reverse` edits both where a fact has a "reverse".

    \b
    Example:
      patchkit facts check facts.jsonl
    """
    from patchkit.actions.given import checked

    if canonical and (as_json or quiet):
        raise click.UsageError("--canonical prints the facts and nothing else; leave out --json and --quiet")
    in_force = functools.cache(lambda: _in_force(directory))
    try:
        batch = checked(lambda: read_facts(file), in_force)
    except FactsError as error:
        if as_json:
            faults = [asdict(fault) for fault in error.faults]
            print_json({"file": error.faults[0].name, "facts": None, "faults": faults})
        raise
    listed, unknown = one_way(batch, in_force())
    if as_json:
        ends = {"listed": listed, "unknown": unknown}
        print_json({"file": batch.name, "facts": len(batch.facts), "faults": [], "one_way": ends})
    elif canonical:
        click.echo(dump_facts(batch.facts).decode("utf-8"), nl=False)
    elif not quiet:
        out = console()
        say(out, f"{batch.name}: {counted(len(batch.facts), 'fact')}, no faults", GOOD)
        if listed:
            say(out, f"the reverse is listed but not edited {_lines(listed)}: commit --with-reverse", WARNING)
        if unknown:
            say(out, f'from its other end nothing is said {_lines(unknown)}; a "reverse" would say it', QUIET)


def _lines(numbers: list[int]) -> str:
    """ "in line 3", "in lines 1, 2, 3 …"."""
    some = ", ".join(map(str, numbers[:5])) + (" …" if len(numbers) > 5 else "")
    return f"in {counted(len(numbers), 'fact')} ({'line' if len(numbers) == 1 else 'lines'} {some})"


def _in_force(directory: str) -> dict[Key, tuple[str, Fact]]:
    try:
        return open_repository(directory).stack().facts_in_force()
    except NotFound:
        if not os.path.isdir(directory):  # a mistyped one is no folder without a stack
            raise
        return {}


@command.command("search", short_help="Search the facts in force.")
@click.argument("words", nargs=-1, required=True)
@click.option("--all", "everything", is_flag=True, help="Facts of patches that were taken back too.")
@directory_option
@json_option
def search(words: tuple[str, ...], everything: bool, directory: str, as_json: bool) -> None:
    """Search subjects, prompts and targets of the facts in force for WORDS.

    \b
    Example:
      patchkit facts search basketball
    """
    found = open_repository(directory).search(" ".join(words), everything=everything)
    if as_json:
        print_json(found)
        return
    out = console()
    if not found:
        say(out, "no fact says that", QUIET)
        return
    rows = [
        (row["patch"], row["line"], f"{row['prompt'].replace('{}', row['subject'])} → {row['target']}")
        for row in found
    ]
    columns = [Column("patch", 2, wraps=True), Column("line", right=True), Column("fact", 3, wraps=True)]
    out.print(table(out, columns, rows))
