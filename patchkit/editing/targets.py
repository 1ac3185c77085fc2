"""Targets z: the hidden state that makes the model say the new fact (MEMIT eq. 16-17).

z = init + δ at the output of the last edited block, at the subject's last token. δ minimises, in
every template, -log p(target), plus the drift of "{subject} is a", plus weight decay. Facts are
independent: each has its own Adam state and stop test, so a batch of N gives what N batches of one
give. A step replays only what depends on δ, for all facts at once, and tells the host once which
facts have stopped; those leave the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from patchkit.editing.batching import BatchSize, Budget, in_batches, pack
from patchkit.editing.recipe import Recipe
from patchkit.editing.templates import Passage
from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.replay import Tail, capture

__all__ = ["Targets", "find_targets"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults (Kingma and Ba 2015)


@dataclass(frozen=True)
class Targets:
    """z [N, d_model] on the CPU, and for each fact the forward passes it took and its last loss."""

    z: Tensor
    steps: list[int]
    losses: list[float]


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
        states = self.tail.states(_shifted(self.tail.hidden, delta))
        read = states.flatten(0, 1).index_select(0, self.read)
        surprise = cross_entropy(self.tail.logits(read), self.labels, reduction="none")
        # Into slots of their own and summed there, not added in place: the same order on every device.
        spread = surprise.new_zeros(len(self.facts) * self.width)
        return spread.index_copy(0, self.slots, surprise * self.weights).view(-1, self.width).sum(1)

    def keep(self, stay: Sequence[int]) -> Rewriting:
        """The same for some of its facts, by their places in ``facts``."""
        templates = len(self.passages[0])
        rows = torch.tensor(
            [i * templates + t for i in stay for t in range(templates)], device=self.where.device
        )
        facts, passages = [self.facts[i] for i in stay], [self.passages[i] for i in stay]
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
        current = _log_probabilities(self.tail, _shifted(self.tail.hidden, delta))
        return self.factor * (current.exp() * (current - self.initial)).sum(-1)

    def keep(self, stay: Sequence[int]) -> Drift:
        """The same for some of its facts, by their places in ``facts``."""
        at = torch.tensor(stay, device=self.where.device)
        where, initial = self.where.index_select(0, at), self.initial.index_select(0, at)
        return Drift(tuple(self.facts[i] for i in stay), where, self.tail.keep(at), initial, self.factor)


def find_targets(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    *,
    batch_size: BatchSize = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Targets:
    """Optimise every fact's z at the recipe's last layer.

    ``rewriting`` is [fact][template], the bare prompt first; ``drift`` is [fact]. Facts of like length
    are batched; neither their order nor their number changes a fact's z. BadInput names the place of a
    fact whose loss is not finite.
    """
    count = len(rewriting)
    order = sorted(range(count), key=lambda i: (_width(rewriting[i]), rewriting[i][0].subject))
    z = torch.empty(count, anatomy.d_model, dtype=model.dtype)
    steps, losses, finished = [0] * count, [0.0] * count, 0

    def work(batch: list[int], budget: Budget) -> None:
        nonlocal finished
        texts = [rewriting[i] for i in batch], [drift[i] for i in batch]
        found = _optimise(model, anatomy, *texts, recipe, budget, lambda done: tell(finished + done))
        z[batch] = found.z
        for place, fact in enumerate(batch):
            steps[fact], losses[fact] = found.steps[place], found.losses[place]
        finished += len(batch)

    def tell(done: int) -> None:
        if progress is not None:
            progress("targets", done, count)

    in_batches(order, Budget.of(batch_size, model.device), work)
    for fact in range(count):
        if not math.isfinite(losses[fact]):
            raise BadInput(f"fact {fact + 1}: the loss is not a number; lower learning_rate or clamp")
    return Targets(z, steps, losses)


def _optimise(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    budget: Budget,
    tell: Callable[[int], None],
) -> Targets:
    """One batch in the published order: loss, stop tests, Adam step, clamp; ``steps`` - 1 updates at most."""
    parts, init = _prepare(model, anatomy, rewriting, drift, recipe, budget)
    delta, mean, square = (torch.zeros_like(init) for _ in range(3))
    alive = torch.ones(len(init), dtype=torch.bool, device=init.device)
    last = init.new_zeros(len(init))
    steps = [0] * len(init)
    for step in range(1, recipe.steps + 1):
        for fact in {fact for part in parts for fact in part.facts}:
            steps[fact] = step
        loss, gradient = _evaluate(parts, delta, init, recipe, differentiate=step < recipe.steps)
        last = torch.where(alive, loss, last)
        if step == recipe.steps:
            break
        alive &= ~(loss < recipe.stop_loss)
        moved = delta + _adam(gradient, mean, square, step, recipe.learning_rate)
        delta = torch.where(alive[:, None], _clamped(moved, recipe.clamp * init.norm(dim=1)), delta)
        living = alive.tolist()  # the step's one synchronisation
        parts = [kept for part in parts if (kept := _still(part, living)) is not None]
        tell(living.count(False))
        if not parts:
            break
    tell(len(init))
    return Targets((init + delta).cpu(), steps, last.tolist())


def _evaluate(
    parts: Sequence[Rewriting | Drift], delta: Tensor, init: Tensor, recipe: Recipe, *, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """The total loss [N] of each fact and its gradient [N, d_model], chunk by chunk to bound memory."""
    gradient = torch.zeros_like(delta)
    with torch.set_grad_enabled(differentiate):
        leaf = delta.detach().requires_grad_(differentiate)
        loss = recipe.weight_decay * leaf.norm(dim=1) / init.norm(dim=1).square()
        if differentiate:
            gradient += torch.autograd.grad(loss.sum(), leaf)[0]
        loss = loss.detach()
        for part in parts:
            own = leaf.index_select(0, part.where)
            value = part.of(own)
            if differentiate:
                gradient.index_add_(0, part.where, torch.autograd.grad(value.sum(), own)[0])
            loss = loss.index_add(0, part.where, value.detach())
    return loss, gradient


def _adam(gradient: Tensor, mean: Tensor, square: Tensor, step: int, rate: float) -> Tensor:
    """Adam's step (Kingma and Ba 2015, alg. 1); updates the moments in place."""
    mean.lerp_(gradient, 1 - _BETA1)
    square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    size = (square / (1 - _BETA2**step)).sqrt() + _EPSILON
    return -rate * (mean / (1 - _BETA1**step)) / size


def _clamped(delta: Tensor, longest: Tensor) -> Tensor:
    """δ scaled back to at most ``longest`` [N]."""
    norm = delta.norm(dim=1)
    return delta * torch.where(norm > longest, longest / norm, 1)[:, None]


def _still(part: Rewriting | Drift, living: Sequence[bool]) -> Rewriting | Drift | None:
    stay = [place for place, fact in enumerate(part.facts) if living[fact]]
    if len(stay) == len(part.facts):
        return part
    return part.keep(stay) if stay else None


def _prepare(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    budget: Budget,
) -> tuple[list[Rewriting | Drift], Tensor]:
    """Run everything once: the parts of the loss, and init [N, d_model]."""
    layer = recipe.layers[-1]
    parts: list[Rewriting | Drift] = []
    init = torch.empty(len(rewriting), anatomy.d_model, dtype=model.dtype, device=model.device)
    templates = len(rewriting[0])
    for facts in pack([_width(texts) * templates for texts in rewriting], budget.tokens):
        rows = [passage.row(group) for fact in facts for group, passage in enumerate(rewriting[fact])]
        tail = capture(model, anatomy, rows, layer=layer)
        parts.append(Rewriting.of_rows(facts, [rewriting[fact] for fact in facts], tail))
        init[facts] = tail.hidden[::templates, 0]
    for facts in pack([1] * len(drift), budget.tokens):
        tail = capture(model, anatomy, [drift[fact].to_subject(0) for fact in facts], layer=layer)
        with torch.no_grad():
            initial = _log_probabilities(tail, tail.hidden)
        where = torch.tensor(facts, device=model.device)
        parts.append(Drift(tuple(facts), where, tail, initial, recipe.kl_factor))
    return parts, init


def _shifted(hidden: Tensor, delta: Tensor) -> Tensor:
    """``hidden`` [F x T, S, d] with δ [F, d] added to every first token of its fact."""
    rows = delta[:, None].expand(-1, len(hidden) // len(delta), -1).flatten(0, 1)
    return torch.cat([hidden[:, :1] + rows[:, None], hidden[:, 1:]], 1)


def _log_probabilities(tail: Tail, hidden: Tensor) -> Tensor:
    """[F, vocabulary] log probabilities after each row's first token."""
    return tail.logits(tail.states(hidden)[:, 0]).log_softmax(-1)


def _width(passages: Sequence[Passage]) -> int:
    return max(len(passage.row(0).suffix) for passage in passages)
