"""What an evaluation asks: facts with what their records hold besides, in the shapes that the field uses.

CounterFact and its multi form, zsRE as MEND and EasyEdit have it, EasyEdit's flat records and KnowEdit's are
recognised as `patchkit.records` recognises them; here belong the fields that an edit has no use for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, NotFound
from patchkit.evaluation.datasets import DATASETS, fetch
from patchkit.fact import fact_of
from patchkit.facts import Fact, parse_apart
from patchkit.files import standard_input
from patchkit.jsonlines import numbered_values
from patchkit.models.cache import Progress, silent
from patchkit.records import native_records

__all__ = ["Case", "Cases", "Question", "parse_cases", "read_cases", "sampled"]


@dataclass(frozen=True)
class Question:
    """A whole prompt and its right answers: each of them alone is one."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A fact and what else is asked about it.

    ``answers``: the right answers of each neighbour, in their order (none of one of which the record does not
    say, nothing where it says none);
    ``portability``: questions one hop away; ``texts``: beginnings of texts about the subject; ``object_ids``:
    CounterFact's names of the relation and of the new object.
    """

    fact: Fact
    answers: tuple[tuple[str, ...], ...] = ()
    portability: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()
    object_ids: tuple[str, str] | None = None


@dataclass(frozen=True)
class Cases:
    """The cases of one source in a fixed order; ``notes`` say what was left out of its records; ``order`` are
    the places of those that were drawn from it (None: nothing was drawn)."""

    source: str
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()
    order: tuple[int, ...] | None = None


def read_cases(source: str, report: Progress | None = None) -> Cases:
    """The cases of a file, of standard input for "-", or of a data set by its name, fetched where it must be.

    FactsError with all faults; NotFound, Unavailable.
    """
    if source == "-":
        return parse_cases(standard_input(), "standard input")
    try:
        named = source in DATASETS and not os.path.lexists(source)
        path = fetch(DATASETS[source], report or silent) if named else Path(source)
        return parse_cases(path.read_bytes(), source, published=named)
    except FileNotFoundError:
        *others, last = DATASETS
        known = f"{', '.join(others)} or {last}"
        raise NotFound(
            f"{source}: there is no such file; name one of records or facts, or {known} to have it fetched"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"{source}: cannot be read ({reason}); name a readable file") from None


def parse_cases(data: bytes, name: str, *, published: bool = False) -> Cases:
    """The cases in a file's bytes. Each fact is checked as those of a commit are, but for the others: nothing
    is edited, and CounterFact's own file holds cases that contradict each other.

    FactsError with all faults; of a file as it is ``published``, which nobody here can mend, a note says what
    was left out.
    """
    notes = []
    if published:
        facts, raws, faults = _sound_ones(data)
        if faults:
            notes.append(
                f"{len(faults):,} of the records cannot be asked and were left out; the first: {faults[0]}"
            )
    else:
        facts, raws = parse_apart(data, name).facts, list(_records(data))
    generation = sum("case_id" in raw and _rephrased(raw) for raw in raws)
    if generation:
        notes.append(
            f"{generation} rephrase prompts were left out: in EasyEdit's flat CounterFact most of them are "
            "beginnings of texts, not paraphrases"
        )
    cases = tuple(_case(fact, raw) for fact, raw in zip(facts, raws, strict=True))
    return Cases(name, cases, tuple(notes))


def sampled(cases: Cases, count: int | None, seed: int = 0) -> Cases:
    """``count`` cases drawn without replacement, in the order in which they are drawn; the same each time."""
    if count is None:
        return cases
    if count < 1:
        raise BadInput(f"a sample of {count} facts: choose 1 or more")
    if count > len(cases.cases):
        raise BadInput(f"{cases.source}: holds {len(cases.cases)} facts, so {count} cannot be drawn from it")
    order = tuple(random.Random(seed).sample(range(len(cases.cases)), count))
    return Cases(cases.source, tuple(cases.cases[place] for place in order), cases.notes, order)


def _records(data: bytes) -> Iterator[Mapping[str, Any]]:
    """The raw object behind each fact, in the order of `parse_apart`; {} for those of a list form."""
    for _, value in numbered_values(data):
        count = len(native_records(value))
        yield from [value] if count == 1 else [{}] * count


def _sound_ones(data: bytes) -> tuple[tuple[Fact, ...], list[Mapping[str, Any]], list[str]]:
    """The facts of an array of records and the record behind each; and the first fault of each other one."""
    facts: list[Fact] = []
    raws: list[Mapping[str, Any]] = []
    faults: list[str] = []
    for number, (_, raw) in enumerate(numbered_values(data), 1):
        (record,) = native_records(raw)
        found = fact_of(record)
        if isinstance(found, Fact):
            facts.append(found)
            raws.append(raw)
        else:
            faults.append(f"record {number}, {found[0]}")
    return tuple(facts), raws, faults


def _rephrased(raw: Mapping[str, Any]) -> bool:
    """Whether there is something to leave out; CounterFact and zsRE have true paraphrases."""
    other = "requested_rewrite" in raw or "src" in raw
    return not other and bool(_strings(raw.get("rephrase_prompt", raw.get("rephrase"))))


def _case(fact: Fact, raw: Mapping[str, Any]) -> Case:
    if "requested_rewrite" in raw or isinstance(raw.get("target_new"), dict):
        answers = ((fact.was,),) * len(fact.neighbors) if fact.was is not None else ()
        beginnings = tuple(_strings(raw.get("generation_prompts")))
        return Case(fact, answers, texts=beginnings, object_ids=_object_ids(raw))
    return Case(fact, _answers(fact, raw), tuple(_portability(raw.get("portability"))))


def _object_ids(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """CounterFact's relation_id and the id of its new object, which name them in its reference texts."""
    rewrite = raw.get("requested_rewrite", raw)
    rewrite = rewrite[0] if isinstance(rewrite, list) and rewrite else rewrite
    target = rewrite.get("target_new") if isinstance(rewrite, dict) else None
    if not isinstance(target, dict):
        return None
    relation, number = rewrite.get("relation_id"), target.get("id")
    return (relation, number) if isinstance(relation, str) and isinstance(number, str) else None


def _answers(fact: Fact, raw: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Right answers of each neighbour: zsRE's and EasyEdit's own fields, then KnowEdit's tables."""
    given = raw.get("loc_ans", raw.get("locality_ground_truth"))
    asked = raw.get("loc", raw.get("locality_prompt"))
    several = isinstance(asked, list) and isinstance(given, list)
    found = [_alternatives(each) for each in (given if several else [given])] if asked else []
    locality = raw.get("locality")
    for table in locality.values() if isinstance(locality, dict) else ():
        for probe in table if isinstance(table, list) else [table]:
            if isinstance(probe, dict):
                found.append(_alternatives(probe.get("ground_truth")))
    return tuple(found) if any(found) and len(found) == len(fact.neighbors) else ()


def _portability(value: Any) -> Iterator[Question]:
    """zsRE's "New Question" and "New Answer", or KnowEdit's tables of prompt and ground truth."""
    tables = [value] if isinstance(value, dict) and "New Question" in value else _tables(value)
    for table in tables:
        prompt = table.get("New Question", table.get("prompt"))
        answers = _alternatives(table.get("New Answer", table.get("ground_truth")))
        if isinstance(prompt, str) and prompt.strip() and answers:
            yield Question(prompt.strip(), answers)


def _alternatives(value: Any) -> tuple[str, ...]:
    """A string, or KnowEdit's lists (of lists) of names, each of which alone is right."""
    return tuple(dict.fromkeys(_strings(value)))


def _tables(value: Any) -> list[dict[str, Any]]:
    listed: Sequence[Any] = list(value.values()) if isinstance(value, dict) else [value]
    rows = [row for each in listed for row in (each if isinstance(each, list) else [each])]
    return [row for row in rows if isinstance(row, dict)]


def _strings(value: Any) -> list[str]:
    """The strings of a value that is one, or holds them in lists (of lists); blank ones left out. A number,
    such as a year, is its digits."""
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    return [value.strip()] if isinstance(value, str) and value.strip() else []
