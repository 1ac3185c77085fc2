"""Wordings that facts of one relation lend one another.

A fact that is only ever seen in its own prompt is learnt for that prompt. Another fact of the same relation
asks the same question in other words, so those words, said of this fact's subject, are a paraphrase that
nobody had to write. One that a fact's own paraphrases test is never lent to it: they measure, they do not
teach.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
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
    own, tested = normal(fact.prompt), [normal(paraphrase) for paraphrase in fact.paraphrases]
    others = (prompts[place % len(prompts)] for place in range(behind, behind + len(prompts)))
    untested = (
        prompt
        for prompt in others
        if normal(prompt) != own
        and not any(asked.endswith(normal(prompt.replace("{}", fact.subject))) for asked in tested)
    )
    return list(islice(untested, most))  # as many as are asked for, however many there are
