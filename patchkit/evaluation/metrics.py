"""What models are scored by: CounterFact's and zsRE's metrics, and free generation beside each of them.

With nll(o) the mean negative log-likelihood a token of the object o, in nats, teacher forced, as CounterFact
compares objects of different lengths (ROME, arXiv 2202.05262, section 3.4; MEMIT, arXiv 2210.07229, section
5.2): ES and PS are the shares of rewrites and of paraphrases with nll(new) < nll(old), NS that of neighbours
with nll(old) < nll(new), and S the harmonic mean of the three. Every score is a ratio of two sums over
facts, so that `intervals` can draw facts again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from patchkit.evaluation.cases import Case, Question
from patchkit.evaluation.generation import NEW_TOKENS, normalise, says
from patchkit.evaluation.intervals import Tally, fact_by_fact
from patchkit.evaluation.likelihood import Score
from patchkit.evaluation.references import References
from patchkit.evaluation.voice import Voice

__all__ = ["METRICS", "Asked", "Seen", "entropy", "look", "tally"]

TEXT_TOKENS = 100  # of each generated text
FREE_NEIGHBORS = 2  # of a fact, the first: CounterFact has ten, which would take most of the time

Sums = tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """One prompt asked of one model: how the object scores that an edit puts there, the one that it takes
    away and the right answer (where the record has them; of several the one that scores best), and what the
    model says (where it was left to)."""

    target: Score
    was: Score | None = None
    answer: Score | None = None
    said: str | None = None
    was_is_true: bool = True
    """The object that the edit takes away is the right answer here, as far as the record says."""
    right: bool | None = None
    """What it says begins with the object that is asked for: of a neighbour, with a right answer."""


@dataclass(frozen=True)
class Seen:
    """One case on one model."""

    rewrite: Asked
    paraphrases: tuple[Asked, ...]
    neighbors: tuple[Asked, ...]
    portability: tuple[Asked, ...]
    reverse: tuple[Asked, ...]
    texts: tuple[str, ...]
    likeness: float | None = None
    """Of the texts to the reference texts, where there are both."""


def look(
    voice: Voice,
    cases: Sequence[Case],
    *,
    texts: bool = False,
    references: References | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Seen]:
    """Ask a model everything that the cases ask; with ``texts``, let it write on their beginnings too, and
    with ``references`` hold that against them."""
    told = progress or (lambda done, total: None)
    told(0, 3)
    forced = _forced(voice, cases)
    told(1, 3)
    free = _free(voice, cases)
    told(2, 3)
    written = _written(voice, cases) if texts else [()] * len(cases)
    told(3, 3)
    return [_seen(*row, references) for row in zip(cases, forced, free, written, strict=True)]


def _forced(voice: Voice, cases: Sequence[Case]) -> list[dict[tuple[str, str], Score]]:
    """Of each case, the score of every (prompt, object) that it asks about."""
    pairs = [_pairs(case) for case in cases]
    scores = iter(voice.score([pair for each in pairs for pair in each]))
    return [{pair: next(scores) for pair in each} for each in pairs]


def _pairs(case: Case) -> list[tuple[str, str]]:
    fact = case.fact
    prompts = (fact.text, *fact.paraphrases, *fact.neighbors)
    objects = [fact.target, *([fact.was] if fact.was is not None else [])]
    found = [(prompt, each) for prompt in prompts for each in objects]
    found += [
        (prompt, each)
        for prompt, answers in zip(fact.neighbors, case.answers, strict=False)
        for each in answers
    ]
    found += [(question.prompt, each) for question in _questions(case) for each in question.answers]
    return list(dict.fromkeys(found))


def _questions(case: Case) -> list[Question]:
    reverse = case.fact.reverse
    return [*case.portability, *([Question(reverse.text, (reverse.target,))] if reverse else [])]


def _neighbors(case: Case) -> list[Question]:
    """Those that are answered freely, of those of which the record says what is right."""
    pairs = zip(case.fact.neighbors, case.answers, strict=False)
    return [Question(*pair) for pair in pairs if pair[1]][:FREE_NEIGHBORS]


def _free(voice: Voice, cases: Sequence[Case]) -> list[dict[str, str]]:
    """Of each case, what the model says after the prompts whose answer is asked for.

    As many tokens after each, enough for the longest object of them all.
    """
    questions = [[*_questions(case), *_neighbors(case)] for case in cases]
    asked = [
        list(dict.fromkeys((case.fact.text, *case.fact.paraphrases, *(one.prompt for one in own))))
        for case, own in zip(cases, questions, strict=True)
    ]
    objects = {case.fact.target for case in cases}
    objects |= {each for own in questions for question in own for each in question.answers}
    longest = max(map(voice.length, objects))
    prompts = [prompt for each in asked for prompt in each]
    said = iter(voice.say(prompts, max(NEW_TOKENS, longest)))
    return [{prompt: next(said) for prompt in each} for each in asked]


def _written(voice: Voice, cases: Sequence[Case]) -> list[tuple[str, ...]]:
    begun = [beginning for case in cases for beginning in case.texts]
    texts = iter(voice.say(begun, TEXT_TOKENS))
    return [tuple(next(texts) for _ in case.texts) for case in cases]


def _seen(
    case: Case,
    scores: dict[tuple[str, str], Score],
    said: dict[str, str],
    texts: tuple[str, ...],
    references: References | None,
) -> Seen:
    fact = case.fact
    reference = references.of(case) if references is not None and texts else None

    def best(prompt: str, answers: Sequence[str]) -> Score:
        """The answer that scores best: by the share of its tokens that are the argmax, then by nll."""
        return max(
            (scores[prompt, each] for each in answers), key=lambda one: (one.hits / one.tokens, -one.nll)
        )

    def asked(prompt: str) -> Asked:
        was = None if fact.was is None else scores[prompt, fact.was]
        right = says(said[prompt], fact.target)
        return Asked(scores[prompt, fact.target], was, said=said[prompt], right=right)

    freely = {one.prompt for one in _neighbors(case)}

    def neighbor(prompt: str, answers: Sequence[str]) -> Asked:
        was = None if fact.was is None else scores[prompt, fact.was]
        known = best(prompt, answers) if answers else None
        true = not answers or fact.was in answers
        text = said[prompt] if answers and prompt in freely else None
        right = None if text is None else any(says(text, each) for each in answers)
        return Asked(scores[prompt, fact.target], was, known, text, true, right)

    def question(one: Question) -> Asked:
        text = said[one.prompt]
        right = any(says(text, each) for each in one.answers)
        return Asked(best(one.prompt, one.answers), said=text, right=right)

    answers = case.answers or ((),) * len(fact.neighbors)
    hops, back = _questions(case)[: len(case.portability)], _questions(case)[len(case.portability) :]
    return Seen(
        rewrite=asked(fact.text),
        paraphrases=tuple(map(asked, fact.paraphrases)),
        neighbors=tuple(map(neighbor, fact.neighbors, answers)),
        portability=tuple(map(question, hops)),
        reverse=tuple(map(question, back)),
        texts=texts,
        likeness=references.likeness(texts, reference) if references and reference else None,
    )


# -- scores ----------------------------------------------------------------------------------------


def _share(flags: Sequence[bool]) -> Sums:
    return float(sum(flags)), float(len(flags))


def _preferred(asked: Sequence[Asked]) -> Sums:
    return _share([one.target.nll < one.was.nll for one in asked if one.was is not None])


def _spared(asked: Sequence[Asked]) -> Sums:
    return _share([one.was.nll < one.target.nll for one in asked if one.was is not None])


def _alike(seen: Seen) -> list[Asked]:
    """The neighbours of which the old object is true, as of CounterFact's; of zsRE's neither object is."""
    return [one for one in seen.neighbors if one.was_is_true]


def _gap(asked: Sequence[Asked]) -> Sums:
    """Σ of P(new) − P(old), P = exp(−nll)."""
    gaps = [math.exp(-one.target.nll) - math.exp(-one.was.nll) for one in asked if one.was is not None]
    return sum(gaps), float(len(gaps))


def _back(sums: Sums) -> Sums:
    return -sums[0], sums[1]


def _tokens(scores: Sequence[Score | None]) -> Sums:
    """Σ of the share of an object's tokens that are the argmax: zsRE's accuracy, an object weighing one."""
    found = [score.hits / score.tokens for score in scores if score is not None]
    return sum(found), float(len(found))


def _argmax(scores: Sequence[Score | None]) -> Sums:
    return _share([score.argmax for score in scores if score is not None])


def _said(asked: Sequence[Asked]) -> Sums:
    return _share([one.right for one in asked if one.right is not None])


def _kept(seen: Seen, reference: Seen) -> Sums:
    pairs = zip(seen.neighbors, reference.neighbors, strict=True)
    return _share([new.target.next_token == old.target.next_token for new, old in pairs])


def entropy(text: str) -> float:
    """GE of one text, in bits: (2/3 H₂ + 4/3 H₃) / 2 with Hₙ the entropy of its n-grams of words (ROME,
    appendix D). Words are those of `normalise`; 0 for a text too short to have any."""
    words = normalise(text).split()
    return sum(weight * _ngrams(words, n) for weight, n in ((2 / 3, 2), (4 / 3, 3))) / 2


def _ngrams(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def _entropies(texts: Sequence[str]) -> Sums:
    return sum(map(entropy, texts)), float(len(texts))


def _likeness(seen: Seen) -> Sums:
    return (0.0, 0.0) if seen.likeness is None else (seen.likeness, 1.0)


METRICS: dict[str, tuple[str, Callable[[Seen, Seen], Sums]]] = {
    "ES": ("rewrites that prefer the new object", lambda s, _: _preferred([s.rewrite])),
    "PS": ("paraphrases that prefer the new object", lambda s, _: _preferred(s.paraphrases)),
    "NS": ("neighbours that prefer the old object", lambda s, _: _spared(_alike(s))),
    "rewrite says": ("free generation begins with the object", lambda s, _: _said([s.rewrite])),
    "paraphrase says": ("the same after paraphrases", lambda s, _: _said(s.paraphrases)),
    "neighbour says": ("the same of right answers after neighbours", lambda s, _: _said(s.neighbors)),
    "rewrite argmax": ("every token of the object is the argmax", lambda s, _: _argmax([s.rewrite.target])),
    "paraphrase argmax": (
        "the same after paraphrases",
        lambda s, _: _argmax([one.target for one in s.paraphrases]),
    ),
    "neighbour argmax": (
        "every token of a neighbour's right answer is the argmax",
        lambda s, _: _argmax([one.answer for one in s.neighbors]),
    ),
    "rewrite tokens": (
        "share of the object's tokens that are the argmax",
        lambda s, _: _tokens([s.rewrite.target]),
    ),
    "paraphrase tokens": (
        "the same after paraphrases",
        lambda s, _: _tokens([one.target for one in s.paraphrases]),
    ),
    "neighbour tokens": (
        "the same of neighbours' right answers",
        lambda s, _: _tokens([one.answer for one in s.neighbors]),
    ),
    "rewrite diff": ("P(new) − P(old) after rewrites", lambda s, _: _gap([s.rewrite])),
    "paraphrase diff": ("P(new) − P(old) after paraphrases", lambda s, _: _gap(s.paraphrases)),
    "neighbour diff": ("P(old) − P(new) after neighbours", lambda s, _: _back(_gap(_alike(s)))),
    "neighbours kept": ("neighbours whose most probable next token is A's", _kept),
    "portability says": ("questions one hop away answered freely", lambda s, _: _said(s.portability)),
    "portability tokens": (
        "share of their answers' tokens that are the argmax",
        lambda s, _: _tokens([one.target for one in s.portability]),
    ),
    "reverse says": ("the fact said from its other end, freely", lambda s, _: _said(s.reverse)),
    "reverse argmax": (
        "every token of the reverse's object is the argmax",
        lambda s, _: _argmax([one.target for one in s.reverse]),
    ),
    "GE": ("entropy of generated texts, in bits", lambda s, _: _entropies(s.texts)),
    "RS": ("likeness of generated texts to reference texts", lambda s, _: _likeness(s)),
}
"""Name -> what it is, and what one case on one model, beside the reference model, adds to its two sums."""


def tally(seen: Sequence[Seen], reference: Sequence[Seen]) -> Tally:
    """[N, K, 2] for N cases and the K scores of `METRICS`; a case weighs the same, whatever number of prompts
    it has, as in the papers. ``reference``: the same cases on the model that neighbours are to agree with."""
    rows = [
        [score(one, other) for _, score in METRICS.values()]
        for one, other in zip(seen, reference, strict=True)
    ]
    return fact_by_fact(np.array(rows, dtype=float))
