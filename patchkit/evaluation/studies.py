"""The studies of MEMIT (arXiv 2210.07229) as lists of trials: which facts, how many, by which editor.

- ``zsre``, ``counterfact``: its tables 1 and 2, N facts by several editors.
- ``scaling``: figure 5, scores over the number of facts.
- ``relations``: figure 6a, facts of one relation edited alone.
- ``tradeoff``: figure 6b, generalisation against specificity over λ.
- ``mixtures``: figure 7, two relations apart and half of each together.

Facts of one trial never contradict one another, and those of a smaller one are the first of a larger one's.
No torch here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from patchkit.canonical import canonical_json, hash_bytes
from patchkit.errors import BadInput
from patchkit.evaluation.cases import Case, Cases
from patchkit.facts import Key

__all__ = [
    "COUNTERFACT",
    "FREE",
    "LAMBDAS",
    "OF_CEILING",
    "STUDIES",
    "UNEDITED",
    "ZSRE",
    "Asked",
    "Trial",
    "as_in_table_1",
    "conditions",
    "digest_of",
    "plan",
    "pool",
    "whole_of",
]

UNEDITED = "unedited"
OF_CEILING = "S of ceiling"
LAMBDAS = (30.0, 100.0, 300.0, 1000.0, 3000.0)
COUNTERFACT = ("S", "ES", "PS", "NS")
ZSRE = ("tokens S", "rewrite tokens", "paraphrase tokens", "neighbour tokens")
"""zsRE's score (the harmonic mean of the three), efficacy, paraphrase and specificity."""
FREE = ("rewrite says", "paraphrase says", "neighbour says")
_MANY = (1, 3, 10, 30, 100, 300, 1000)
_RELATIONS = 8  # drawn unless they are named
ALL = "all"

STUDIES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "scaling": ("scores over the number of facts (figure 5)", _MANY),
    "counterfact": ("CounterFact's scores at one number of facts (table 2)", (1000,)),
    "zsre": ("zsRE's scores at one number of facts (table 1)", (1000,)),
    "relations": ("scores of facts of one relation each (figure 6a)", (30,)),
    "tradeoff": ("generalisation against specificity over λ (figure 6b)", (100,)),
    "mixtures": ("two relations, apart and mixed (figure 7)", (10, 30, 100)),
}
"""Name -> what it shows, and the numbers of facts that it takes by default."""


@dataclass(frozen=True)
class Trial:
    """One edit of the base, or none: ``cases`` are places in the pool, in the order of the edit."""

    method: str
    group: str
    """Whose facts: "all", or a relation, or two."""
    count: int
    lambda_: float | None
    cases: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, int, float | None]:
        return self.method, self.group, self.count, self.lambda_


@dataclass(frozen=True)
class Asked:
    """What of a study was asked for; None takes the study's own."""

    study: str
    methods: tuple[str, ...]
    counts: tuple[int, ...] | None = None
    relations: tuple[str, ...] | None = None
    lambdas: tuple[float, ...] | None = None


def as_in_table_1(cases: Cases) -> Cases:
    """zsRE as MEMIT's table 1 has it: the first known answer is edited in, not MEND's made-up one, and
    neighbours are questions. Questions one hop away ask what follows from the other: they fall away."""

    def asked(case: Case) -> Case:
        fact = case.fact
        neighbors = tuple(text if text.endswith("?") else f"{text}?" for text in fact.neighbors)
        known = replace(fact, target=fact.was or fact.target, was=None, neighbors=neighbors)
        return replace(case, fact=known, portability=())

    return replace(cases, cases=tuple(map(asked, cases.cases)))


def pool(cases: Cases, seed: int) -> list[Case]:
    """All cases in an order drawn with ``seed``; of those about the same thing the first alone."""
    drawn = random.Random(seed).sample(cases.cases, len(cases.cases))
    first: dict[Key, Case] = {}
    for case in drawn:
        first.setdefault(case.fact.key, case)
    return list(first.values())


def digest_of(cases: Cases) -> str:
    """SHA-256 of what a source asks, whatever its file looks like."""
    return hash_bytes(canonical_json([asdict(case) for case in cases.cases]))


def plan(asked: Asked, cases: Sequence[Case], source: str) -> list[Trial]:
    """The trials in the order in which they are made; BadInput where the cases do not suffice."""
    if asked.lambdas is not None and asked.study != "tradeoff":
        raise BadInput(f"{asked.study}: varies no λ; leave out --lambdas, or choose tradeoff")
    if asked.relations is not None and asked.study not in ("relations", "mixtures"):
        raise BadInput(f"{asked.study}: takes facts of all relations; leave out --relations")
    _check_records(asked.study, cases, source)
    groups = _groups(asked, cases, source)
    fewest = min(map(len, groups.values()))
    fitting = tuple(n for n in STUDIES[asked.study][1] if n <= fewest)
    counts = tuple(sorted(set(asked.counts or fitting or (fewest,))))
    for name, places in groups.items():
        if counts[-1] > len(places):
            whose = "" if name == ALL else f" of {name}"
            raise BadInput(
                f"{source}: holds {len(places)} facts{whose} that do not contradict one another, "
                f"so {counts[-1]} cannot be edited; name smaller --counts"
            )
    return [
        Trial(method, name, count, lambda_, places[:count])
        for count in counts
        for name, places in groups.items()
        for method in (UNEDITED, *asked.methods)
        for lambda_ in _lambdas(asked, method)
    ]


def _check_records(study: str, cases: Sequence[Case], source: str) -> None:
    """BadInput where a table's scores have nothing to be computed from."""
    needed = {
        "paraphrases": any(case.fact.paraphrases for case in cases),
        "neighbours": any(case.fact.neighbors for case in cases),
        "old objects": study != "counterfact" or any(case.fact.was is not None for case in cases),
        "right answers of neighbours": study != "zsre" or any(case.answers for case in cases),
    }
    missing = [name for name, there in needed.items() if not there]
    if missing and study in ("counterfact", "zsre"):
        raise BadInput(f"{source}: has no {missing[0]}, which {study}'s scores need; choose scaling")


def _lambdas(asked: Asked, method: str) -> Sequence[float | None]:
    varied = asked.study == "tradeoff" and method != UNEDITED
    return sorted(asked.lambdas or LAMBDAS) if varied else (None,)


def _groups(asked: Asked, cases: Sequence[Case], source: str) -> dict[str, tuple[int, ...]]:
    """Places in ``cases`` by the name of the group."""
    if asked.study not in ("relations", "mixtures"):
        return {ALL: tuple(range(len(cases)))}
    by_relation: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        if case.fact.relation is not None:
            by_relation.setdefault(case.fact.relation, []).append(place)
    wanted = 2 if asked.study == "mixtures" else _RELATIONS
    ranked = sorted(by_relation, key=lambda name: (-len(by_relation[name]), name))
    chosen = asked.relations or tuple(ranked[:wanted])
    for name in chosen:
        if name not in by_relation:
            raise BadInput(f"{source}: no fact has the relation {name!r}; the largest is {_first(ranked)}")
    if asked.study == "relations" and chosen:
        return {name: tuple(by_relation[name]) for name in chosen}
    if len(chosen) != 2:
        needed = "two relations" if asked.study == "mixtures" else "some relation"
        raise BadInput(f"{source}: {asked.study} needs facts of {needed}; {len(chosen)} were named or found")
    one, other = (by_relation[name] for name in chosen)
    length = min(len(one), len(other))
    mixed = tuple(place for pair in zip(one, other, strict=False) for place in pair)
    return {  # of the mixture, one of each in turn
        chosen[0]: tuple(one[:length]),
        chosen[1]: tuple(other[:length]),
        " + ".join(chosen): mixed[: 2 * length],
    }


def _first(names: Sequence[str]) -> str:
    return repr(names[0]) if names else "none, since no fact names one"


def whole_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The four scores that say most of the rows: CounterFact's, else zsRE's; only those that they have.

    An old object that happens to be a neighbour's right answer gives zsRE's facts an S here and there.
    """
    there = Counter(name for row in rows for name in row["scores"])
    whole, other = COUNTERFACT[0], ZSRE[0]
    if there[whole] or there[other]:
        family = COUNTERFACT if there[whole] >= there[other] else ZSRE
    else:
        family = COUNTERFACT if there["ES"] else ZSRE
    return tuple(name for name in family if there[name])


def conditions(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The columns beside editor and number of facts in which the rows differ."""
    for name in ("group", "lambda"):
        if len({row[name] for row in rows}) > 1:
            yield name
