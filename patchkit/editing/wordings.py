"""Wordings that facts of one relation lend one another.

A fact that is only ever seen in its own prompt is learnt for that prompt. Another fact of the same relation
asks the same question in other words, so those words, said of this fact's subject, are a paraphrase that
nobody had to write. One that a fact's own paraphrases test, or all but test, is never lent to it: they
measure, they do not teach.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

from patchkit.fact import Fact, normal

__all__ = ["wordings_of"]

_LONGEST = 200  # characters: a longer prompt tells of its own subject


def wordings_of(facts: Sequence[Fact], most: int) -> list[tuple[str, ...]]:
    """For each fact its own prompt and behind it at most ``most`` prompts of others of its relation.

    Which ones and in which order depends on what the facts say, not on the order in which they come.
    """
    said: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        if most and fact.relation is not None and len(fact.prompt) <= _LONGEST:
            said[normal(fact.relation)].add(fact.prompt)
    of_relation = {relation: sorted(prompts) for relation, prompts in said.items()}
    return [(fact.prompt, *_lent(fact, of_relation, most)) for fact in facts]


def _lent(fact: Fact, said: dict[str, list[str]], most: int) -> list[str]:
    """The next ones behind the fact's own in the order of the alphabet, so that none is lent to all."""
    if fact.relation is None or normal(fact.relation) not in said:
        return []
    prompts = said[normal(fact.relation)]
    behind = bisect_right(prompts, fact.prompt)
    own, tested = normal(fact.prompt), [_words(paraphrase) for paraphrase in fact.paraphrases]
    others = (prompts[place % len(prompts)] for place in range(behind, behind + len(prompts)))
    untested = (
        prompt
        for prompt in others
        if normal(prompt) != own and not any(_near(prompt, fact.subject, asked) for asked in tested)
    )
    return list(islice(untested, most))  # as many as are asked for, however many there are


def _near(prompt: str, subject: str, asked: list[str]) -> bool:
    """Whether ``asked``, the words of a paraphrase, is what the prompt says of the subject, or nearly.

    Around the subject one of the two may go on where the other ends ("speaks", "speaks the language"), and so
    may each word, by a letter or two ("'s profession is a", "is an").
    """
    before, after = map(_words, prompt.split("{}"))
    for first, behind in _places(asked, _words(subject)):
        pairs = [*zip(reversed(asked[:first]), reversed(before), strict=False)]
        pairs += zip(asked[behind:], after, strict=False)
        if pairs and all(map(_alike, *zip(*pairs, strict=True))):
            return True
    return False


def _alike(one: str, other: str) -> bool:
    shorter, longer = sorted((one, other), key=len)
    return longer.startswith(shorter) and len(longer) - len(shorter) <= 2


def _places(words: list[str], subject: list[str]) -> Iterator[tuple[int, int]]:
    """Where the subject begins and ends in the words, each time that it stands there."""
    size = len(subject)
    return ((at, at + size) for at in range(len(words) - size + 1) if words[at : at + size] == subject)


def _words(text: str) -> list[str]:
    """Without case and punctuation; scripts that have no spaces give a word for each sign."""
    return re.findall(r"[\u2e80-\ud7ff]|[^\W\u2e80-\ud7ff]+", normal(text))
