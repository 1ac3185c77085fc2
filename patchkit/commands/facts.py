"""``patchkit facts``: search the facts in force, or check a file of facts."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import GOOD, QUIET, Column, console, counted, say, table
from patchkit.errors import NotFound
from patchkit.facts import FactsError, clashes, dump_facts, read_facts

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
@json_option
def check(file: str, canonical: bool, directory: str, as_json: bool) -> None:
    """Check FILE as `commit` would, and against the stack where there is a repository.

    Lists every fault with its line; exit code 65 if there is one.

    \b
    Example:
      patchkit facts check facts.jsonl
    """
    batch = read_facts(file)
    try:
        in_force = open_repository(directory).stack().facts_in_force()
    except NotFound:
        in_force = {}
    faults = clashes(batch, in_force)
    if faults:
        raise FactsError(faults)
    if as_json:
        print_json({"file": batch.name, "facts": len(batch.facts), "faults": []})
    elif canonical:
        click.echo(dump_facts(batch.facts).decode("utf-8"), nl=False)
    else:
        say(console(), f"{batch.name}: {counted(len(batch.facts), 'fact')}, no faults", GOOD)


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
