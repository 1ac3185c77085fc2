"""RS: how like the texts that a model writes are to texts about others of which the same is true.

ROME (Meng et al. 2022, arXiv 2202.05262, appendix D): the cosine of the TF-IDF vectors of what the model
wrote on a fact's beginnings and of reference texts about subjects that have the fact's new object. Here the
reference texts themselves say how common a word is, where the paper takes Wikipedia.
"""

from __future__ import annotations

import codecs
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from patchkit.canonical import hash_bytes, strict_json
from patchkit.errors import BadInput
from patchkit.evaluation.cases import Case
from patchkit.evaluation.generation import normalise
from patchkit.evaluation.texts import read_bytes
from patchkit.jsonlines import numbered_values
from patchkit.problem import one_line

__all__ = ["References", "read_references"]

Key = tuple[str, str]
"""A relation and its object, as CounterFact's ids or as a fact has them."""
_SAMPLES = "samples"
_SHAPE = (
    "expected CounterFact's attribute_snippets.json, or lines with relation, target and text, such as "
    '{"relation": "P641", "target": "basketball", "text": "Bill Russell played …"}'
)


class References:
    """Reference texts by relation and object, and how much each of their words weighs."""

    def __init__(self, texts: Mapping[Key, Sequence[str]], digest: str = "") -> None:
        self.digest = digest  # of the file
        self._words = {key: Counter(_words(each)) for key, each in texts.items()}
        documents = [set(_words([text])) for each in texts.values() for text in each]
        self._count = len(documents)
        self._with = Counter(word for words in documents for word in words)

    def of(self, case: Case) -> Counter[str] | None:
        """How often each word stands in the texts for a case's new object; None where there are none."""
        fact = case.fact
        keys = [case.object_ids, (fact.relation, fact.target)]
        return next((self._words[key] for key in keys if key in self._words), None)

    def notes(self, cases: Sequence[Case]) -> tuple[str, ...]:
        """A line where some of the cases have no reference texts."""
        lacking = sum(not case.texts or self.of(case) is None for case in cases)
        if not lacking:
            return ()
        return (f"RS is of {len(cases) - lacking} of {len(cases)} facts: the others have no reference texts",)

    def likeness(self, written: Sequence[str], reference: Counter[str]) -> float:
        """The cosine of the two TF-IDF vectors, from 0 to 1; 0 where nothing was written."""
        own = Counter(_words(written))
        product = sum(count * reference[word] * self._weight(word) ** 2 for word, count in own.items())
        length = math.sqrt(self._square(own) * self._square(reference))
        return product / length if length else 0.0

    def _weight(self, word: str) -> float:
        """ln((1 + n) / (1 + n with the word)) + 1 over n texts; most for a word that is in none."""
        return math.log((1 + self._count) / (1 + self._with[word])) + 1

    def _square(self, counts: Counter[str]) -> float:
        return sum((count * self._weight(word)) ** 2 for word, count in counts.items())


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in normalise(text).split()]


def read_references(path: str) -> References:
    """The texts in a file. BadInput names the line that holds none; NotFound."""
    name, data = one_line(path), read_bytes(path)
    texts: dict[Key, list[str]] = {}
    for number, value in _values(data):
        for key, text in _entries(value, f"{name}:{number}"):
            texts.setdefault(key, []).append(text)
    if not texts:
        raise BadInput(f"{name}: holds no reference texts; {_SHAPE}")
    return References(texts, hash_bytes(data))


def _values(data: bytes) -> Iterable[tuple[int, Any]]:
    """(line, value): CounterFact's file is one list or object, larger than any line of records may be."""
    try:
        whole = strict_json(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return numbered_values(data)
    if isinstance(whole, list) and any(isinstance(each, dict) and _SAMPLES in each for each in whole):
        return [(1, each) for each in whole]
    return [(1, whole)] if isinstance(whole, dict) else numbered_values(data)


def _entries(value: Any, where: str) -> Iterator[tuple[Key, str]]:
    """Of a line; of an item of CounterFact's list, which has a relation, an object and their texts; or of one
    object: relation → object → texts."""
    if isinstance(value, ValueError):
        raise BadInput(f"{where}: {one_line(str(value))}; {_SHAPE}")
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        relation, target = value.get("relation"), value.get("target")
        if isinstance(relation, str) and isinstance(target, str):
            yield (relation, target), value["text"]
            return
    elif isinstance(value, dict) and _SAMPLES in value:
        relation, target = value.get("relation_id"), value.get("target_id")
        if isinstance(relation, str) and isinstance(target, str):
            yield from _texts_of((relation, target), value[_SAMPLES], where)
            return
    elif isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()):
        for relation, objects in value.items():
            for target, rows in objects.items():
                yield from _texts_of((relation, target), rows, where)
        return
    raise BadInput(f"{where}: is no reference text; {_SHAPE}")


def _texts_of(key: Key, rows: Any, where: str) -> Iterator[tuple[Key, str]]:
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise BadInput(f"{where}: {one_line(' '.join(key))} has no text; {_SHAPE}")
        yield key, row["text"]
