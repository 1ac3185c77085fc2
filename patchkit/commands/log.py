"""``patchkit log``: the commits that changed what the model knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from patchkit.commands.common import directory_option, json_option, open_repository, print_json
from patchkit.commands.display import BAD, CHANGED, GOOD, NAME, QUIET, console, folded, printable, say

if TYPE_CHECKING:
    from patchkit.actions.log import Entry, FactMove, History
    from patchkit.git.history import GraphRow

__all__ = ["command"]

_DRAWN = 40  # lines of a commit that Git is asked to draw the graph of; below, edges only lead on
_CUT = "a shallow clone ends here, so what this changed is not known: git fetch --unshallow"
_NARROWEST = 20  # characters that a line keeps beside a graph
_SIGNS = {"added": ("+", GOOD), "changed": ("~", CHANGED), "removed": ("-", BAD)}

Line = tuple[str, str, str, str]  # label, its style, text, its style


@click.command("log", short_help="Show the commits that changed what the model knows.")
@click.argument("revision", default="HEAD", metavar="[REV|A..B]")
@click.option("-n", "--max-count", "limit", type=click.IntRange(1), help="At most this many commits.")
@click.option("--facts", is_flag=True, help="Show the facts that each commit added, changed or removed.")
@click.option("--subject", metavar="NAME", help="Only commits that touch facts about NAME.")
@click.option(
    "-S", "text", metavar="TEXT", help="Only commits by which a fact with TEXT came, went or changed."
)
@click.option("--graph", is_flag=True, help="Draw branches and merges, as git log --graph does.")
@directory_option
@json_option
def command(
    revision: str,
    limit: int | None,
    facts: bool,
    subject: str | None,
    text: str | None,
    graph: bool,
    directory: str,
    as_json: bool,
) -> None:
    """Show, newest first, the commits up to REV that added (+), solved again (~) or removed (-)
    patches; of a range A..B those that B has and A has not. `git log` shows the same commits with
    everything else. A merge shows what it brought in.

    With --facts the facts themselves follow, and where --subject or -S narrow the search, only
    those that they find. Subjects are compared as keys are (case and spaces do not matter), TEXT
    exactly, with every text of a fact.

    \b
    Examples:
      patchkit log -n 5
      patchkit log v1.0..v2 --facts
      patchkit log --graph --facts
      patchkit log --subject "LeBron James" -S basketball
    """
    if graph and as_json:
        raise click.UsageError("--graph draws for people; in --json every commit has its parents")
    found = open_repository(directory).log(
        revision, limit, facts=facts, subject=subject, text=text, graph=_DRAWN if graph else 0
    )
    searched = subject is not None or text is not None
    if searched and found.cut:
        say(console(stderr=True), "this is a shallow clone: there may be more; git fetch --unshallow", QUIET)
    if as_json:
        print_json([entry.to_dict() for entry in found.entries])
        return
    out = console()
    if graph:
        _draw(out, found)
    for entry in () if graph else found.entries:
        for label, label_style, line, style in _lines(entry):
            say(out, line, style, label=label, label_style=label_style)
    if not found.entries:
        narrowed = searched or ".." in revision
        say(
            out,
            "no commit fits" if narrowed else "no patches yet; make one: patchkit commit facts.jsonl",
            QUIET,
        )


def _lines(entry: Entry) -> Iterator[Line]:
    commit = entry.commit
    yield f"{commit.id[:10]}  ", NAME, f"{commit.date:%Y-%m-%d %H:%M}  {commit.author}", QUIET
    yield "    ", "", commit.subject, ""
    if commit.cut:
        yield "    ", "", _CUT, QUIET
    for kind, names in (("added", commit.added), ("changed", commit.changed), ("removed", commit.removed)):
        sign, style = _SIGNS[kind]
        for name in names:
            yield f"    {sign} ", style, name, style
    for move in entry.facts or ():
        sign, style = _SIGNS[move.kind]
        yield f"      {sign} ", style, _said(move), style


def _said(move: FactMove) -> str:
    targets = dict.fromkeys(fact.target for fact in (move.before, move.fact) if fact is not None)
    moved = move.patch_before is not None and move.patch_before != move.patch
    where = f"  ({move.patch_before} ⇒ {move.patch})" if moved else ""
    return f"{move.fact.text} → {' ⇒ '.join(targets)}{where}"


def _draw(out: Console, found: History) -> None:
    from patchkit.actions.log import drawn

    def lines(entry: Entry, row: GraphRow) -> list[Text]:
        room = None if out.soft_wrap else max(_NARROWEST, out.width - max(map(len, row.left)))
        return [line for parts in _lines(entry) for line in _folded(parts, room)]

    for edge, line in drawn(found, lines):
        out.print(Text(edge, style=QUIET).append_text(line or Text()))


def _folded(parts: Line, room: int | None) -> Iterator[Text]:
    """One line of an entry, over several where the terminal has no room for it."""
    label, label_style, line, style = parts
    hang = len(label)
    pieces = [printable(line)] if room is None else folded(printable(line), room, hang, hang)
    for number, piece in enumerate(pieces):
        first = Text(" " * hang) if number else Text(label, style=label_style)
        yield first.append_text(Text(piece, style=style))
