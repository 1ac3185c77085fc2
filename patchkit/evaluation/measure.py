"""What an edit did: each fact, its paraphrases and its neighbours, before and after.

All numbers are taken from a model whose weights are, to the bit, those of the build.
Definitions follow CounterFact (ROME, NeurIPS 2022, section 3.4) where ``was`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from patchkit.evaluation.generation import continue_greedily, room_for, says
from patchkit.evaluation.likelihood import Score, score_targets
from patchkit.facts import Fact

__all__ = ["FactChange", "PromptState", "Summary", "compare", "observe", "summarise"]


@dataclass(frozen=True)
class PromptState:
    """One prompt on one model. Probabilities are of whole objects (all tokens, teacher forced)."""

    prompt: str
    target: float
    was: float | None
    prefers: bool
    """The target is preferred to ``was`` by mean token log-likelihood, as CounterFact compares
    objects of different lengths; without ``was``: every token of the target is the argmax."""
    argmax: bool
    """Every token of the target is the most probable one."""
    says: bool | None
    """Free generation begins with the target; None where nothing was generated."""
    text: str | None
    next_token: int
    """The most probable next token after the prompt."""
    spares: bool | None = None
    """``was`` is preferred to the target, by the same measure; None without ``was``. Where both are equal,
    or neither is a number, the prompt neither prefers nor spares."""


@dataclass(frozen=True)
class FactState:
    """One fact on one model."""

    rewrite: PromptState
    paraphrases: tuple[PromptState, ...]
    neighbors: tuple[PromptState, ...]


@dataclass(frozen=True)
class FactChange:
    """One fact before and after an edit."""

    fact: Fact
    before: FactState
    after: FactState

    @property
    def took(self) -> bool:
        """The rewrite prompt prefers the target."""
        return self.after.rewrite.prefers

    @property
    def kept_neighbors(self) -> int:
        """Neighbours whose most probable next token is what it was before."""
        pairs = zip(self.before.neighbors, self.after.neighbors, strict=True)
        return sum(old.next_token == new.next_token for old, new in pairs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and the catalogue."""
        return {
            "id": self.fact.id,
            "subject": self.fact.subject,
            "prompt": self.fact.prompt,
            "target": self.fact.target,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "took": self.took,
            "neighbors_kept": self.kept_neighbors,
        }


@dataclass(frozen=True)
class Summary:
    """Shares in 0..1; None where the facts have no such prompts.

    - ``efficacy``: the rewrite prompt prefers the target. With ``was`` this is CounterFact's ES.
    - ``argmax``: every token of the target is the most probable one.
    - ``generation``: greedy free generation begins with the target.
    - ``paraphrases``: as efficacy, over the paraphrases. With ``was`` this is CounterFact's PS, if the facts
      have equally many.
    - ``neighbors``: neighbours whose most probable next token did not change.
    - ``specificity``: neighbours that hold ``was`` more probable than the target (NS, likewise).
    """

    facts: int
    efficacy: float
    argmax: float
    generation: float
    paraphrases: float | None
    neighbors: float | None
    specificity: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def observe(model: Any, tokenizer: Any, facts: Sequence[Fact], batch_size: int = 32) -> list[FactState]:
    """Measure facts on ``model`` as it is: likelihoods of all prompts, free generation of the rewrites."""
    prompts = [(fact, text) for fact in facts for text in _prompts(fact)]
    objects = [(text, fact.target) for fact, text in prompts]
    objects += [(text, fact.was) for fact, text in prompts if fact.was is not None]
    scores = score_targets(model, tokenizer, objects)
    targets, wases = scores[: len(prompts)], iter(scores[len(prompts) :])
    room = room_for(tokenizer, [fact.target for fact in facts])
    said = iter(continue_greedily(model, tokenizer, [fact.text for fact in facts], room, batch_size))
    states = iter(
        [
            _state(text, score, next(wases) if fact.was is not None else None)
            for (fact, text), score in zip(prompts, targets, strict=True)
        ]
    )
    return [_fact_state(fact, states, next(said)) for fact in facts]


def compare(
    facts: Sequence[Fact], before: Sequence[FactState], after: Sequence[FactState]
) -> list[FactChange]:
    """Pair what was observed before an edit with what was observed after it."""
    return [FactChange(*triple) for triple in zip(facts, before, after, strict=True)]


def summarise(changes: Sequence[FactChange]) -> Summary:
    """Shares over all facts, each prompt weighing the same."""
    rewrites = [change.after.rewrite for change in changes]
    paraphrases = [state for change in changes for state in change.after.paraphrases]
    neighbors = [state for change in changes for state in change.after.neighbors]
    return Summary(
        facts=len(changes),
        efficacy=_share([state.prefers for state in rewrites]) or 0.0,
        argmax=_share([state.argmax for state in rewrites]) or 0.0,
        generation=_share([bool(state.says) for state in rewrites]) or 0.0,
        paraphrases=_share([state.prefers for state in paraphrases]),
        neighbors=sum(change.kept_neighbors for change in changes) / len(neighbors) if neighbors else None,
        specificity=_share([bool(state.spares) for state in neighbors if state.was is not None]),
    )


def _prompts(fact: Fact) -> list[str]:
    return [fact.text, *fact.paraphrases, *fact.neighbors]


def _fact_state(fact: Fact, states: Any, text: str) -> FactState:
    rewrite = next(states)
    spoken = {"says": says(text, fact.target), "text": text}
    return FactState(
        rewrite=PromptState(**{**asdict(rewrite), **spoken}),
        paraphrases=tuple(next(states) for _ in fact.paraphrases),
        neighbors=tuple(next(states) for _ in fact.neighbors),
    )


def _state(prompt: str, target: Score, was: Score | None) -> PromptState:
    return PromptState(
        prompt=prompt,
        target=target.probability,
        was=None if was is None else was.probability,
        prefers=target.argmax if was is None else target.nll < was.nll,
        argmax=target.argmax,
        says=None,
        text=None,
        next_token=target.next_token,
        spares=None if was is None else was.nll < target.nll,
    )


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
