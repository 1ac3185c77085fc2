"""Two models beside each other on the same cases: scores with intervals, paired differences, text, norms.

One model is loaded, where something is asked that was not asked before; the weights of the two stacks are
exchanged in place, as builds of them hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from patchkit.actions.asking import Asking
from patchkit.actions.gates import failed
from patchkit.actions.harm import harm_of
from patchkit.actions.workbench import stacked_weights
from patchkit.canonical import without_nan
from patchkit.errors import BadInput, PatchkitError
from patchkit.evaluation.answers import FOLDER
from patchkit.evaluation.cases import Case, Cases, sampled
from patchkit.evaluation.harm import Harm
from patchkit.evaluation.intervals import (
    COMPARED,
    Interval,
    Tally,
    differences,
    intervals,
    names_with_whole,
    share_of_ceiling,
)
from patchkit.evaluation.likelihood import Score
from patchkit.evaluation.metrics import METRICS, Asked, Seen, look, tally
from patchkit.evaluation.references import References
from patchkit.evaluation.studies import digest_of
from patchkit.evaluation.texts import Divergence, compare_on, window_of, windows

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchkit.repository import Repository

__all__ = ["BASE", "Compared", "Evaluation", "FactSeen", "Side", "evaluate", "facts_in_force"]

BASE = "base"


@dataclass(frozen=True)
class Side:
    """One of the two models. ``harm``: growth is over the weights that either of them changes."""

    name: str
    commit: str | None
    patches: int
    harm: Harm

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "commit": self.commit, "patches": self.patches, **self.harm.to_dict()}


@dataclass(frozen=True)
class Compared:
    """One score of A and of B, and B less A on the same facts in the same resamples."""

    name: str
    a: Interval
    b: Interval
    difference: Interval


@dataclass(frozen=True)
class FactSeen:
    """One fact on both models."""

    case: Case
    a: Seen
    b: Seen

    def to_dict(self) -> dict[str, Any]:
        fact = self.case.fact
        told = {name: getattr(fact, name) for name in ("id", "subject", "prompt", "target", "was")}
        return {**told, "a": _prompts(self.case, self.a), "b": _prompts(self.case, self.b)}


def _prompts(case: Case, seen: Seen) -> dict[str, Any]:
    """All prompts of a case with what was found. Neighbours beyond the first few are not left to generate."""
    fact = case.fact
    asked = {
        "paraphrases": (fact.paraphrases, seen.paraphrases),
        "neighbors": (fact.neighbors, seen.neighbors),
        "portability": ([one.prompt for one in case.portability], seen.portability),
        "reverse": ([fact.reverse.text] if fact.reverse else [], seen.reverse),
    }
    rows = {name: [_prompt(*pair) for pair in zip(*both, strict=True)] for name, both in asked.items()}
    return {"rewrite": _prompt(fact.text, seen.rewrite), **rows}


def _prompt(text: str, asked: Asked) -> dict[str, Any]:
    """``target``, ``was`` and ``answer`` are scores of whole objects: the one that an edit puts there (of
    questions, the right one), the one that it takes away, and a neighbour's right one. ``right``: what is
    said (``text``) begins with the object that is asked for; of a neighbour, with its right answer."""
    return {
        "prompt": text,
        **{name: _score(getattr(asked, name)) for name in ("target", "was", "answer")},
        "text": asked.said,
        "right": asked.right,
    }


def _score(found: Score | None) -> dict[str, Any] | None:
    return None if found is None else {"probability": found.probability, "argmax": found.argmax}


@dataclass(frozen=True)
class Evaluation:
    """What ``patchkit eval`` says. Only the scores that the cases have prompts for are there."""

    source: str
    records: str
    """The digest of what the source asks (`studies.digest_of`), whatever its file is called."""
    cases: int
    sample: int | None
    """How many were drawn; None where all cases of the source were asked."""
    seed: int
    """Of the sample and of the resamples."""
    order: tuple[int, ...] | None
    """The places in the source of what was drawn, in that order; None where all were asked in theirs."""
    sides: tuple[Side, Side]
    scores: tuple[Compared, ...]
    ceiling: Interval | None
    """S of B as a share of what NS of A, the base, lets it be; None where there is no S or no base."""
    text: Divergence | None
    notes: tuple[str, ...]
    facts: tuple[FactSeen, ...]

    @property
    def unsaid(self) -> list[FactSeen]:
        """The facts that B does not say when it is left to generate."""
        return [fact for fact in self.facts if not fact.b.rewrite.right]

    def failed(self, gate: Mapping[str, float]) -> list[str]:
        """The gates that B does not meet (`gates.failed`): shares by the scores' names."""
        shares = {score.name: score.b.value for score in self.scores}
        harm = self.sides[1].harm
        return failed(gate, shares, {"perplexity": harm.rise, "growth": harm.growth})

    def facts_to_dict(self) -> list[dict[str, Any]]:
        """Fact by fact, for JSON; the catalogue keeps the scores alone."""
        return [without_nan(fact.to_dict()) for fact in self.facts]

    def to_dict(self) -> dict[str, Any]:
        return without_nan(
            {
                "source": self.source,
                "records": self.records,
                "cases": self.cases,
                "sample": self.sample,
                "seed": self.seed,
                "order": None if self.order is None else list(self.order),
                "a": self.sides[0].to_dict(),
                "b": self.sides[1].to_dict(),
                "scores": {score.name: _plain(score) for score in self.scores},
                "share_of_ceiling": None if self.ceiling is None else asdict(self.ceiling),
                "text": None if self.text is None else asdict(self.text),
                "notes": list(self.notes),
            }
        )


def _plain(score: Compared) -> dict[str, dict[str, float]]:
    return {part: asdict(getattr(score, part)) for part in ("a", "b", "difference")}


def facts_in_force(repository: Repository, revision: str = "HEAD") -> Cases:
    """The facts of the stack at ``revision``, in the order of its patches; BadInput where there are none."""
    facts = [fact for _, fact in repository.stack(revision).facts_in_force().values()]
    if not facts:
        raise BadInput(
            f"{revision}: no facts are in force there; name a file of records or facts to ask about"
        )
    return Cases(f"the facts in force at {revision}", tuple(map(Case, facts)))


def evaluate(
    repository: Repository,
    cases: Cases | None = None,
    *,
    a: str = BASE,
    b: str = "HEAD",
    sample: int | None = None,
    seed: int = 0,
    text: tuple[str, str] | None = None,
    texts: bool = False,
    references: References | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Score the stacks at ``a`` and ``b`` ("base": the empty one) on the same cases.

    Without cases, the facts in force at ``b`` are asked.

    ``text``: (name, text) to compute perplexities and KL on. ``texts``: let both write on the beginnings that
    the cases have; ``references``: hold that against these texts. What was found goes into the catalogue too,
    with ``b``'s tree. BadInput, NotFound.
    """
    told = progress or (lambda phase, done, total: None)
    if seed < 0:
        raise BadInput(f"the seed {seed} is negative; choose one from 0")
    if cases is None:
        if a == b == BASE:
            raise BadInput("the base has no facts in force; name a file of records or facts to ask about")
        cases = facts_in_force(repository, a if b == BASE else b)
    chosen = sampled(cases, sample, seed)
    if texts and not any(case.texts for case in chosen.cases):
        raise BadInput(f"{chosen.source}: has no beginnings of texts (generation_prompts); leave out --texts")
    stacks = [None if name == BASE else repository.stack(name) for name in (a, b)]
    checkpoint = repository.checkpoint()
    patches = [{} if stack is None else repository.patches(stack) for stack in stacks]
    weights = [stacked_weights(checkpoint, each.values()) for each in patches]
    asking = Asking(checkpoint, device, repository.store.private / FOLDER, told)
    seen, notes = [], []
    for place, (ids, each) in enumerate(zip(patches, weights, strict=True)):
        voice = asking.voice(ids, each)
        part = partial(_part, told, place)
        seen.append(look(voice, chosen.cases, texts=texts, references=references, progress=part))
        try:
            voice.answers.keep()
        except PatchkitError as error:
            notes.append(f"the answers are not kept for another time: {error}")
    told("own text", 0, 1)
    stacked = list(zip(patches, weights, strict=True))
    harms = harm_of(asking, stacked, repository.store.private / "statistics")
    told("own text", 1, 1)
    divergence = None
    if text is not None:
        name, rows = windows(asking.tokenizer, *text, window_of(asking.bench.model.config))
        divergence = compare_on(asking.bench, weights, name, rows, partial(told, "text"))
    commits = [None if stack is None else stack.commit for stack in stacks]
    sides = [Side(*row) for row in zip((a, b), commits, map(len, patches), harms, strict=True)]
    unreferenced = () if references is None else references.notes(chosen.cases)
    done = Evaluation(
        source=cases.source,
        records=digest_of(cases),
        cases=len(chosen.cases),
        sample=sample,
        seed=seed,
        order=chosen.order,
        sides=(sides[0], sides[1]),
        scores=tuple(_scores(seen[0], seen[1], seed)),
        ceiling=_ceiling(seen[0], seen[1], seed) if a == BASE else None,
        text=divergence,
        notes=(*chosen.notes, *unreferenced, *_broken(seen), *notes, *harms[1].warnings()),
        facts=tuple(FactSeen(case, *row) for case, *row in zip(chosen.cases, *seen, strict=True)),
    )
    tree = None if stacks[1] is None else stacks[1].tree
    try:
        repository.catalogue.record_evaluation(None, cases.source, done.to_dict(), asking.computed_with, tree)
    except PatchkitError as error:
        return replace(done, notes=(*done.notes, f"not kept in the catalogue: {error}"))
    return done


def _broken(seen: Sequence[Sequence[Seen]]) -> list[str]:
    """A collapsed model gives no numbers, which count as neither object preferred."""
    found = []
    for side, cases in zip("AB", seen, strict=True):
        rows = [one.target for case in cases for one in (case.rewrite, *case.paraphrases, *case.neighbors)]
        if lost := sum(not math.isfinite(score.log_probability) for score in rows):
            found.append(f"{side} gives no likelihood for {lost} of {len(rows)} prompts: it has collapsed")
    return found


def _part(told: Callable[[str, int, int], None], place: int, done: int, total: int) -> None:
    told("asking", place * total + done, 2 * total)


def _scores(first: Sequence[Seen], second: Sequence[Seen], seed: int) -> list[Compared]:
    """Neighbours are held against those of A, on both sides."""
    one, other, names = _tallies(first, second)
    found = (
        intervals(one, names, seed),
        intervals(other, names, seed),
        differences(other, one, names, seed),
    )
    return [Compared(name, *(each[name] for each in found)) for name in names_with_whole(names)]


def _ceiling(base: Sequence[Seen], second: Sequence[Seen], seed: int) -> Interval | None:
    unedited, counts, names = _tallies(base, second)
    return share_of_ceiling(counts, unedited, names, seed) if set(COMPARED) <= set(names) else None


def _tallies(first: Sequence[Seen], second: Sequence[Seen]) -> tuple[Tally, Tally, list[str]]:
    """The counts of both for the scores that were asked for, and these scores' names."""
    one, other = tally(first, first), tally(second, first)
    asked = one[..., 1].sum(0) > 0
    return one[:, asked], other[:, asked], [name for name, there in zip(METRICS, asked, strict=True) if there]
