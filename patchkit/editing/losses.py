"""The parts of a target's loss, for many facts at once (MEMIT eq. 16; ROME, arXiv 2202.05262, eq. 4).

Each part replays the tails of some facts of a batch and gives one number a fact. Parts are small, so
that a gradient needs the memory of one of them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchkit.editing.templates import Passage
from patchkit.models.replay import Tail

__all__ = ["Drift", "Rewriting", "log_probabilities"]


@dataclass(frozen=True)
class Rewriting:
    """Mean over templates of the mean over target tokens of -log p(target), for some facts of a batch.

    ``tail`` has F x T rows of S tokens, fact by fact. Of the P positions that the loss reads, ``read``
    [P] says where they are among the F x T x S, ``labels`` [P] which token is expected next,
    ``weights`` [P] what each counts in its fact's mean, ``slots`` [P] its place in [F, width].
    """

    facts: tuple[int, ...]
    where: Tensor
    passages: tuple[Sequence[Passage], ...]
    tail: Tail
    read: Tensor
    labels: Tensor
    weights: Tensor
    slots: Tensor
    width: int

    @classmethod
    def of_rows(cls, facts: Sequence[int], passages: Sequence[Sequence[Passage]], tail: Tail) -> Rewriting:
        templates, length = len(passages[0]), tail.hidden.shape[1]
        width = max(sum(len(p.labels) for p in texts) for texts in passages)
        read: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        slots: list[int] = []
        for place, texts in enumerate(passages):
            slots += range(place * width, place * width + sum(len(p.labels) for p in texts))
            for template, p in enumerate(texts):
                read += [(place * templates + template) * length + at for at in p.read]
                labels += p.labels
                weights += [1 / (templates * len(p.labels))] * len(p.labels)
        device, dtype = tail.hidden.device, tail.hidden.dtype
        tensors = (torch.tensor(numbers, device=device) for numbers in (facts, read, labels, slots))
        where, at, expected, into = tensors
        share = torch.tensor(weights, device=device, dtype=dtype)
        return cls(tuple(facts), where, tuple(passages), tail, at, expected, share, into, width)

    def of(self, delta: Tensor) -> Tensor:
        """[F] losses for δ [F, d_model]."""
        return self.given(_shifted(self.tail.hidden, delta))

    def of_and_said(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """[F] losses, and [F] whether every target token is the most probable one in all of the texts."""
        logits = self._logits(_shifted(self.tail.hidden, delta))
        wrong = logits.detach().argmax(-1) != self.labels
        slots = wrong.new_zeros(len(self.facts) * self.width).index_copy(0, self.slots, wrong)
        return self._mean(logits), ~slots.view(-1, self.width).any(1)

    def given(self, hidden: Tensor) -> Tensor:
        """[F] losses where the rows' states are ``hidden`` [F x T, S, d_model]."""
        return self._mean(self._logits(hidden))

    def _logits(self, hidden: Tensor) -> Tensor:
        """[P, vocabulary] at the positions that are read."""
        states = self.tail.states(hidden)
        return self.tail.logits(states.flatten(0, 1).index_select(0, self.read))

    def _mean(self, logits: Tensor) -> Tensor:
        surprise = cross_entropy(logits, self.labels, reduction="none")
        # Into slots of their own and summed there, not added in place: the same order on every device.
        spread = surprise.new_zeros(len(self.facts) * self.width)
        return spread.index_copy(0, self.slots, surprise * self.weights).view(-1, self.width).sum(1)

    def keep(self, stay: Sequence[int]) -> Rewriting:
        """The same for some of its facts, by their places in ``facts``."""
        return self._narrowed(stay, range(len(self.passages[0])))

    def reading(self, templates: Sequence[int]) -> Rewriting:
        """The same, read in some of the templates alone."""
        if len(templates) == len(self.passages[0]):
            return self
        return self._narrowed(range(len(self.facts)), templates)

    def _narrowed(self, stay: Sequence[int], templates: Sequence[int]) -> Rewriting:
        count = len(self.passages[0])
        rows = torch.tensor([i * count + t for i in stay for t in templates], device=self.where.device)
        facts, passages = (
            [self.facts[i] for i in stay],
            [[self.passages[i][t] for t in templates] for i in stay],
        )
        return Rewriting.of_rows(facts, passages, self.tail.keep(rows))


@dataclass(frozen=True)
class Drift:
    """factor x KL(current || initial) of the token after the subject in the drift prompt.

    Read at the subject's last token, so by causality that one token a fact is all that is replayed.
    ``initial`` [F, vocabulary] are the log probabilities at δ = 0.
    """

    facts: tuple[int, ...]
    where: Tensor
    tail: Tail
    initial: Tensor
    factor: float

    def of(self, delta: Tensor) -> Tensor:
        """[F] losses for δ [F, d_model]."""
        current = log_probabilities(self.tail, _shifted(self.tail.hidden, delta))
        return self.factor * (current.exp() * (current - self.initial)).sum(-1)

    def keep(self, stay: Sequence[int]) -> Drift:
        """The same for some of its facts, by their places in ``facts``."""
        at = torch.tensor(stay, device=self.where.device)
        where, initial = self.where.index_select(0, at), self.initial.index_select(0, at)
        return Drift(tuple(self.facts[i] for i in stay), where, self.tail.keep(at), initial, self.factor)


def _shifted(hidden: Tensor, delta: Tensor) -> Tensor:
    """``hidden`` [F x T, S, d] with δ [F, d] added to every first token of its fact."""
    rows = delta[:, None].expand(-1, len(hidden) // len(delta), -1).flatten(0, 1)
    return torch.cat([hidden[:, :1] + rows[:, None], hidden[:, 1:]], 1)


def log_probabilities(tail: Tail, hidden: Tensor) -> Tensor:
    """[F, vocabulary] log probabilities after each row's first token."""
    return tail.logits(tail.states(hidden)[:, 0]).log_softmax(-1)
