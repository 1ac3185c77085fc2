"""``patchkit eval``: what a stack does to facts, and what edits do to a base, with the field's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len
from rich.console import Console

from patchkit.commands.common import (
    DefaultGroup,
    directory_option,
    engine_options,
    json_option,
    open_repository,
    print_json,
    quiet_option,
)
from patchkit.commands.display import (
    GAP,
    QUIET,
    WARNING,
    Column,
    console,
    in_bytes,
    progress_bars,
    say,
    table,
)
from patchkit.commands.scores import show_scores
from patchkit.errors import BadInput, Refused
from patchkit.evaluation.studies import STUDIES

if TYPE_CHECKING:
    from patchkit.actions.sweep import Swept
    from patchkit.evaluation.references import References

__all__ = ["command"]


@click.group(
    "eval",
    cls=DefaultGroup,
    default="score",
    short_help="Score a stack on facts, or sweep over edits of the base.",
)
def command() -> None:
    """Score a stack on facts, or sweep over edits of the base: `patchkit eval RECORDS` is `patchkit
    eval score RECORDS`.

    \b
    Examples:
      patchkit eval
      patchkit eval counterfact.json --sample 100
      patchkit eval sweep scaling --records counterfact.json --counts 1,10,100
    """


@command.command("score", short_help="Score a stack on facts, beside the base or another stack.")
@click.argument("records", required=False, metavar="[RECORDS]")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    default=("base", "HEAD"),
    show_default="base HEAD",
    help='The two stacks: commits, or "base".',
)
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Ask N of the facts, drawn at random."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the sample and of the resamples.",
)
@click.option("--text", metavar="FILE", help="Compute perplexities and KL on this text.")
@click.option("--texts", is_flag=True, help="Let both models write, and measure the entropy (GE).")
@click.option("--references", metavar="FILE", help="With --texts: texts to hold theirs against (RS).")
@click.option(
    "--gate",
    multiple=True,
    metavar="NAME=NUMBER,…",
    help="Refuse B below: a share of any score in the table; above: perplexity, growth.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@quiet_option
@json_option
def score(
    records: str | None,
    compare: tuple[str, str],
    sample: int | None,
    seed: int,
    text: str | None,
    texts: bool,
    references: str | None,
    gate: tuple[str, ...],
    device: str,
    directory: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score stack B beside stack A on the same facts: each score of both with its 95 % interval (where
    there are 100 columns for them), and the paired difference. Scores are in percent, GE in bits.

    RECORDS is a file of facts, or of CounterFact, zsRE, EasyEdit or KnowEdit records ("-" reads
    standard input), or one of the data sets counterfact, multi_counterfact and zsre, fetched once;
    without it, the facts in force at B are asked. Nothing is edited. What was found is kept in the
    catalogue too (patchkit sql "select * from evaluations").

    ES, PS, NS and S are CounterFact's. "says" is free generation, in which nothing of the answer is
    given away, and counts what begins with it; "argmax" and "tokens" hand the model the answer's tokens
    one after another. "tokens" of rewrites, paraphrases and neighbours are zsRE's efficacy, paraphrase
    and specificity.
    "neighbours kept" have the most probable next token that they have in A.

    --gate names what B must reach, as shares from 0 to 1 ("rewrite says=0.95"), and multiples of the
    base's that it may not pass: perplexity=1.02, growth=1.05. Below it the exit code is 3. --json tells
    every fact on both, with what it says.

    \b
    Examples:
      patchkit eval score
      patchkit eval counterfact.json --sample 100
      patchkit eval zsre.jsonl --sample 200 --compare v1 v2 --text held-out.txt
      patchkit eval --gate "rewrite says=0.95,perplexity=1.02"
    """
    from patchkit.actions.gates import parse_gate
    from patchkit.evaluation.cases import read_cases
    from patchkit.evaluation.intervals import names_with_whole
    from patchkit.evaluation.metrics import METRICS
    from patchkit.evaluation.texts import read_text

    shares = [name for name in names_with_whole(list(METRICS)) if name != "GE" and (texts or name != "RS")]
    gates = parse_gate(",".join(gate), shares) if gate else {}
    a, b = compare
    running = (text, read_text(text)) if text is not None else None
    known = _references(texts, references)
    with progress_bars(quiet or as_json) as progress:
        cases = None if records is None else read_cases(records, in_bytes(progress))
        found = open_repository(directory).evaluate(
            cases,
            a=a,
            b=b,
            sample=sample,
            seed=seed,
            text=running,
            texts=texts,
            references=known,
            device=device,
            progress=progress,
        )
    missed = found.failed(gates)
    if as_json:
        print_json({**found.to_dict(), "facts": found.facts_to_dict(), "failed": missed})
    elif not quiet:
        show_scores(console(), found, unsaid=records is None)
    if missed:
        raise Refused(f"the gate refused {b} ({'; '.join(missed)})")


@command.command("sweep", short_help="Reproduce a study of the paper: many edits of the base, scored.")
@click.argument("study", type=click.Choice(list(STUDIES)), metavar="STUDY")
@click.option(
    "--records",
    required=True,
    metavar="FILE",
    help="Records as `eval` reads them, or counterfact, multi_counterfact, zsre.",
)
@click.option("--methods", metavar="LIST", help="The editors.  [default: memit,rome,ft; tradeoff: memit]")
@click.option("--counts", metavar="LIST", help="Numbers of facts in one batch, such as 1,10,100.")
@click.option("--relations", metavar="LIST", help="For relations and mixtures: whose facts.")
@click.option("--lambdas", metavar="LIST", help="For tradeoff: the values of λ.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Score only N facts of each batch.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the facts' order.")
@click.option("--texts", is_flag=True, help="Let the models write, and measure the entropy (GE).")
@click.option("--references", metavar="FILE", help="With --texts: texts to hold theirs against (RS).")
@click.option("--out", metavar="DIR", help="Where rows, tables and figures go.  [default: sweep-STUDY]")
@engine_options
@directory_option
@quiet_option
@json_option
def sweep(
    study: str,
    records: str,
    methods: str | None,
    counts: str | None,
    relations: str | None,
    lambdas: str | None,
    sample: int | None,
    seed: int,
    texts: bool,
    references: str | None,
    out: str | None,
    device: str,
    batch_size: int | str,
    directory: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Reproduce a STUDY of MEMIT (arXiv 2210.07229) on the base of this repository.

    \b
    scaling      scores over the number of facts (figure 5)
    counterfact  CounterFact's scores at one number of facts (table 2)
    zsre         zsRE's scores at one number of facts, the first known answer edited in (table 1)
    relations    scores of facts of one relation each (figure 6a)
    tradeoff     generalisation against specificity over λ (figure 6b)
    mixtures     two relations, apart and mixed (figure 7)

    Each edit is made from the base in memory, scored as `patchkit eval` scores, and taken off: nothing
    is committed. Editors use the recipe in patchkit.toml, as `commit --method` does. Facts of a batch
    never contradict one another, and a small batch is the beginning of a larger one.

    A row is on the disk before the next edit begins: the same command goes on where it was stopped, and
    one with other --methods, --counts, --relations or --lambdas makes only the rows that the folder
    lacks. A folder of other settings or recipes is refused. In the end it holds rows.jsonl, a table
    (Markdown, CSV, JSON) and a figure (PNG, SVG) of what this command asks for; figures need the extra
    patchkit-llm[figures]. An edit that fails is left out and told in the end, with exit code 65; the same
    command tries it again.

    \b
    Examples:
      patchkit eval sweep scaling --records counterfact.json --methods memit,ft --counts 1,3,10
      patchkit eval sweep zsre --records zsre --counts 300
      patchkit eval sweep tradeoff --records counterfact.json --lambdas 100,300,1000
    """
    from patchkit.actions import sweep as action
    from patchkit.evaluation.cases import read_cases
    from patchkit.evaluation.figures import figure_class
    from patchkit.evaluation.studies import Asked

    figure_class()  # said before anything is computed for it
    known = _references(texts, references)
    usual = "memit" if study == "tradeoff" else "memit,rome,ft"
    asked = Asked(
        study,
        tuple(_listed(methods or usual, "--methods", str)),
        None if counts is None else tuple(_listed(counts, "--counts", _count)),
        None if relations is None else tuple(_listed(relations, "--relations", str)),
        None if lambdas is None else tuple(_listed(lambdas, "--lambdas", _positive)),
    )
    repository = open_repository(directory)
    folder = Path(out or f"sweep-{study}")
    with progress_bars(quiet or as_json) as progress, _going_on(folder):
        found = action.sweep(
            repository,
            asked,
            read_cases(records, in_bytes(progress)),
            folder,
            sample=sample,
            seed=seed,
            texts=texts,
            references=known,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    elif not quiet:
        _show_sweep(console(), found)
    if found.failed:
        raise BadInput("\n".join(found.failed))


def _references(texts: bool, path: str | None) -> References | None:
    from patchkit.evaluation.references import read_references

    if path is None:
        return None
    if not texts:
        raise click.UsageError("--references are for what --texts lets the models write; name both")
    return read_references(path)


@contextmanager
def _going_on(folder: Path) -> Iterator[None]:
    """An interruption that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on with the rows that {folder} lacks") from None


def _listed(text: str, option: str, read: Callable[[str], Any]) -> list[Any]:
    """The parts of "a,b,c", each once."""
    try:
        found = [read(part.strip()) for part in text.split(",")]
    except ValueError:
        found = [""]
    if "" in found or len(set(found)) != len(found):
        raise click.BadParameter(f"{text!r}: expected a list such as {_EXAMPLES[option]}", param_hint=option)
    return found


_EXAMPLES = {
    "--methods": "memit,ft",
    "--counts": "1,10,100",
    "--relations": "P27,P641",
    "--lambdas": "100,300,1000",
}


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value


def _show_sweep(out: Console, found: Swept) -> None:
    from patchkit.evaluation.studies import FREE, conditions, whole_of
    from patchkit.evaluation.tables import table_rows

    head, cells = table_rows(found.rows)
    leading = 2 + len(list(conditions(found.rows)))
    first = leading + len(whole_of(found.rows))
    harm = len(head) - 2
    free = [head.index(name) for name in FREE if name in head]
    order = list(dict.fromkeys([*range(first), harm, *free, harm + 1, *range(len(head))]))
    lines = [
        [row[place] if place < leading else row[place].partition(" (")[0] for place in order]
        for row in [head, *cells]
    ]
    ends = list(accumulate(max(map(cell_len, column)) + GAP for column in zip(*lines, strict=True)))
    fit = max(leading, sum(end - GAP <= out.width for end in ends))
    columns = [Column(name, right=name not in ("editor", "facts of")) for name in lines[0][:fit]]
    out.print(table(out, columns, [line[:fit] for line in lines[1:]]))
    say(out, "the files have 95 % intervals and all scores", QUIET)
    for path in found.files:
        say(out, str(path), QUIET)
    for note in found.notes:
        say(out, note, WARNING)
