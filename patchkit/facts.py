"""Facts: what a batch changes, one line of JSON each.

Reads facts files (own records, and CounterFact, zsRE and EasyEdit ones), checks everything that
can be checked without a model, and lists *all* faults of a file with their lines in one run.
`parse_facts(dump_facts(facts))` gives the same facts, byte for byte.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, NotFound
from patchkit.fact import UNSEEN, Fact, Key, Reverse, altered, fact_of, kind_of, normal, shown, told_change
from patchkit.files import standard_input
from patchkit.jsonlines import MAX_LINE, numbered_values
from patchkit.records import Record, native_records

__all__ = [
    "Batch",
    "Fact",
    "FactsError",
    "Fault",
    "Key",
    "Reverse",
    "altered",
    "clashes",
    "dump_facts",
    "load_canonical",
    "normal",
    "one_way",
    "parse_apart",
    "parse_facts",
    "parse_inline",
    "parse_records",
    "read_facts",
    "told_change",
    "turned_round",
    "with_own_ids",
    "with_reverses",
]

MAX_FILE = 256 << 20  # bytes
MAX_FACTS = 100_000


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one line of a file (`line` is None where there are no lines)."""

    name: str
    line: int | None
    message: str

    def __str__(self) -> str:
        where = self.name if self.line is None else f"{self.name}:{self.line}"
        return UNSEEN.sub("�", f"{where}: {self.message}")


class FactsError(BadInput):
    """Every fault of a batch; its text is one line for each."""

    def __init__(self, faults: Iterable[Fault], batch: Batch | None = None) -> None:
        self.faults = tuple(faults)
        self.batch = batch
        """The facts beside the faulty ones, where a file was read to its end."""
        super().__init__("\n".join(str(fault) for fault in self.faults))


@dataclass(frozen=True, slots=True)
class Batch:
    """The facts of one file in its order, and the line on which each begins."""

    name: str
    facts: tuple[Fact, ...]
    lines: tuple[int, ...]


# Reading


def parse_facts(data: bytes, name: str) -> Batch:
    """The facts in a file's bytes: an object a line, or the whole file one array or object.

    Raises FactsError with all faults, each with its line.
    """
    if len(data) > MAX_FILE:
        raise FactsError([Fault(name, None, f"larger than {MAX_FILE >> 20} MiB; split it")])
    return _sound(*_check(name, numbered_values(data)))


def parse_apart(data: bytes, name: str) -> Batch:
    """The same, each fact by itself: they may say one thing twice, or contradict each other."""
    if len(data) > MAX_FILE:
        raise FactsError([Fault(name, None, f"larger than {MAX_FILE >> 20} MiB; split it")])
    return _sound(*_check(name, numbered_values(data), apart=True))


def read_facts(source: str | Path) -> Batch:
    """The facts of a file, or of standard input for "-"; FactsError, or NotFound without a file."""
    if source == "-":
        return parse_facts(standard_input(MAX_FILE + 1), "standard input")
    name = os.fspath(source) or '""'
    try:
        with open(source, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise NotFound(f"{name}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise FactsError([Fault(name, None, f"cannot be read: {reason}")]) from None
    return parse_facts(data, name)


def parse_records(records: Iterable[Mapping[str, Any]], name: str = "facts") -> Batch:
    """The facts of Python dictionaries, checked as a file's are; the n-th counts as line n."""
    return _sound(*_check(name, enumerate(records, 1)))


def parse_inline(text: str) -> Fact:
    """One correction without a file: "LeBron James | {} plays the sport of | basketball"."""
    parts = text.split("|")
    if len(parts) != 3:
        message = f'{len(parts)} parts instead of 3; write "subject | prompt with {{}} | target"'
        raise FactsError([Fault("--fact", None, message)])
    subject, prompt, target = parts
    found = fact_of(Record({"subject": subject, "prompt": prompt, "target": target}, {}, native=True))
    if isinstance(found, Fact):
        return found
    raise FactsError(Fault("--fact", None, message) for message in found)


# Writing


def dump_facts(facts: Iterable[Fact]) -> bytes:
    """The canonical file: a line for each fact, in their order."""
    return "".join(f"{fact.to_line()}\n" for fact in facts).encode("utf-8")


def load_canonical(data: bytes, name: str) -> tuple[Fact, ...]:
    """The facts of a patch's own file; FactsError unless it is spelled as `dump_facts` spells it."""
    facts = parse_facts(data, name).facts
    spelled = dump_facts(facts)
    if spelled != data:
        ours, theirs = spelled.split(b"\n"), data.split(b"\n")
        line = next(
            (n for n, pair in enumerate(zip(ours, theirs, strict=False), 1) if pair[0] != pair[1]), None
        )
        raise FactsError(
            [Fault(name, line, "not in canonical form; the file was changed by hand or by a tool")]
        )
    return facts


def with_own_ids(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """Facts of several files in one. An id names one fact of a file: one that several bear is left out."""
    count = Counter(fact.id for fact in facts)
    return tuple(replace(fact, id=None) if fact.id and count[fact.id] > 1 else fact for fact in facts)


def clashes(batch: Batch, in_force: Mapping[Key, tuple[str, Fact]]) -> list[Fault]:
    """Facts of the batch whose key a patch of the stack already holds."""
    found = []
    for fact, line in zip(batch.facts, batch.lines, strict=True):
        if fact.key in in_force:
            patch, older = in_force[fact.key]
            if normal(older.target) == normal(fact.target):
                message = f"already in force in patch {patch}; leave the line out"
            else:
                message = (
                    f"{shown(fact.target)} contradicts {shown(older.target)} of patch {patch}; "
                    "--replace takes the older fact out"
                )
            found.append(Fault(batch.name, line, message))
    return found


# From the other end


def with_reverses(batch: Batch, in_force: Mapping[Key, tuple[str, Fact]] | None = None) -> Batch:
    """The batch and, behind it, each fact's `reverse` as a fact of its own, on that fact's line.

    An edit works in one direction only, so that what follows from the other end has to be edited too. What
    the batch or the stack says already is not added. FactsError where one contradicts what the batch says,
    where there is none, and where the batch becomes larger than a file may be.
    """
    if not any(fact.reverse for fact in batch.facts):
        fault = Fault(batch.name, None, 'no fact has a "reverse"; write what is said from the other end')
        raise FactsError([fault], batch)
    earlier, held = _Earlier.of(zip(batch.facts, batch.lines, strict=True)), _Earlier.held(in_force or {})
    added: list[tuple[Fact, int]] = []
    faults = []
    for fact, line in zip(batch.facts, batch.lines, strict=True):
        if fact.reverse is None or earlier.says(turned := turned_round(fact)) or held.says(turned):
            continue
        faults += [Fault(batch.name, line, f"its reverse {m}") for m in earlier.meet(turned, line)]
        added.append((turned, line))
    if len(batch.facts) + len(added) > MAX_FACTS:
        faults.append(
            Fault(batch.name, None, f"with its reverses more than {MAX_FACTS:,} facts; split the file")
        )
    if earlier.size > MAX_FILE:
        faults.append(
            Fault(batch.name, None, f"with its reverses more than {MAX_FILE >> 20} MiB; split the file")
        )
    if faults:
        raise FactsError(faults, batch)
    facts, lines = (*batch.facts, *(fact for fact, _ in added)), (*batch.lines, *(line for _, line in added))
    return Batch(batch.name, facts, lines)


def turned_round(fact: Fact) -> Fact:
    """A fact's `reverse` as a fact, whose own reverse is that fact."""
    assert fact.reverse is not None
    said, back = fact.reverse, Reverse(fact.subject, fact.prompt, fact.target)
    return Fact(said.subject, said.prompt, said.target, reverse=back, source=fact.source)


def one_way(batch: Batch, in_force: Mapping[Key, tuple[str, Fact]]) -> tuple[list[int], list[int]]:
    """Lines of facts that are said from one end only: those that have a `reverse`, and those that have none.

    What another line or a patch in force says is said, and so is what is the reverse of such a fact.
    """
    earlier, held = _Earlier.of(zip(batch.facts, batch.lines, strict=True)), _Earlier.held(in_force)
    said = [*batch.facts, *(fact for _, fact in in_force.values())]
    reverses = {(normal(f.reverse.text), normal(f.reverse.target)) for f in said if f.reverse is not None}
    listed, unknown = [], []
    for fact, line in zip(batch.facts, batch.lines, strict=True):
        if fact.reverse is None:
            if (normal(fact.text), normal(fact.target)) not in reverses:
                unknown.append(line)
        elif not earlier.says(turned := turned_round(fact)) and not held.says(turned):
            listed.append(line)
    return listed, unknown


# Checking


def _check(name: str, values: Iterable[tuple[int, Any]], *, apart: bool = False) -> tuple[Batch, list[Fault]]:
    """Facts and faults of numbered values: each by itself, and unless ``apart`` beside those before it."""
    facts: list[Fact] = []
    lines: list[int] = []
    faults: list[Fault] = []
    earlier = _Earlier()
    for count, (line, found) in enumerate(_found(values)):
        if count == MAX_FACTS:
            faults.append(Fault(name, line, f"more than {MAX_FACTS:,} facts; split the file"))
            break
        messages = found if isinstance(found, list) else [] if apart else earlier.meet(found, line)
        faults += [Fault(name, line, message) for message in messages]
        if isinstance(found, Fact):
            facts.append(found)
            lines.append(line)
    if earlier.size > MAX_FILE:
        faults.append(Fault(name, None, f"its facts take more than {MAX_FILE >> 20} MiB; split it"))
    return Batch(name, tuple(facts), tuple(lines)), faults


def _sound(batch: Batch, faults: list[Fault]) -> Batch:
    if not batch.facts and not faults:
        faults = [Fault(batch.name, None, "holds no facts; write one JSON object a line")]
    if faults:
        raise FactsError(faults, batch)
    return batch


def _found(values: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Fact | list[str]]]:
    """Each record of each value as a fact, or what is wrong with it."""
    for line, value in values:
        if isinstance(value, ValueError):
            yield line, [str(value)]
        elif not isinstance(value, Mapping):
            yield (
                line,
                [f'{kind_of(value)} where a fact belongs; write {{"subject": …, "prompt": …, "target": …}}'],
            )
        else:
            try:
                records = native_records(value)
            except ValueError as error:
                yield line, [str(error)]
            else:
                yield from ((line, fact_of(record)) for record in records)


class _Earlier:
    """What the lines before say: one batch holds no fact twice and contradicts itself nowhere."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, ...], tuple[int, str]] = {}  # key or text → line, target
        self.ids: dict[str, int] = {}
        self.size = 0  # of the canonical file so far, in bytes

    @classmethod
    def of(cls, facts: Iterable[tuple[Fact, int]]) -> _Earlier:
        """What facts say, each with its line."""
        earlier = cls()
        for fact, line in facts:
            earlier.meet(fact, line)
        return earlier

    @classmethod
    def held(cls, in_force: Mapping[Key, tuple[str, Fact]]) -> _Earlier:
        """What a stack says, which has no lines."""
        return cls.of((fact, 0) for _, fact in in_force.values())

    def says(self, fact: Fact) -> bool:
        """Whether an earlier line says that very fact."""
        found = (self.said.get(mark) for mark in self._marks(fact))
        return any(said is not None and normal(said[1]) == normal(fact.target) for said in found)

    def _marks(self, fact: Fact) -> tuple[tuple[str, ...], ...]:
        return fact.key, (normal(fact.text),)  # by text too: one may name a relation, the other not

    def meet(self, fact: Fact, line: int) -> list[str]:
        """What is wrong with the fact beside the earlier ones, which it joins."""
        length = len(fact.to_line().encode()) + 1
        self.size += length
        found = [f"takes more than {MAX_LINE >> 20} MiB as a line"] if length > MAX_LINE else []
        marks = self._marks(fact)
        for where, target in [self.said[mark] for mark in marks if mark in self.said][:1]:
            found.append(_repeated(fact.target, target, where))
        if fact.id in self.ids:
            found.append(f"the id {shown(fact.id)} is that of line {self.ids[fact.id]}; an id names one fact")
        for mark in marks:
            self.said.setdefault(mark, (line, fact.target))
        if fact.id is not None:
            self.ids.setdefault(fact.id, line)
        return found


def _repeated(target: str, earlier: str, line: int) -> str:
    if normal(earlier) == normal(target):
        return f"says again what line {line} says; leave one of the two out"
    return f"contradicts line {line}: {shown(target)} here, {shown(earlier)} there; leave one of the two out"
