"""MEND: model editor networks with gradient decomposition (Mitchell et al. 2022, arXiv 2110.11309).

A fact is one gradient of -log p(target) on the model as it stands, turned into an update by a hypernetwork
that was trained on the base (`patchkit mend train`, `training`). All facts' gradients are taken on the same
model and their updates added, as the paper does for several edits at once; so facts are batched. The update
is low-rank by nature: as many terms as tokens. As published, the edited weights are the feed-forward part's
of the last three blocks. Difference: the loss of a fact is the mean over its own target's tokens, however
many facts there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from patchkit.algebra.factors import Delta
from patchkit.editing.batching import Budget, in_batches
from patchkit.editing.editor import Edited
from patchkit.editing.gradients import read_pairs
from patchkit.editing.hypernetwork import ANEW, Hypernetwork, Shape, read_network
from patchkit.editing.losses import Rewriting
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.task import EditorBase, Task, tell
from patchkit.editing.templates import Passage, rewriting_passages
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.anatomy import Anatomy, feed_forward, shape_of
from patchkit.models.packing import pack
from patchkit.models.replay import capture
from patchkit.models.trial import try_out
from patchkit.patch import break_even

__all__ = ["Mend", "edited_modules", "passages_of", "shapes_of"]


class Mend(EditorBase):
    """Editing by a hypernetwork that turns one gradient into an update (Mitchell et al., ICLR 2022)."""

    name = "mend"

    def __init__(self, network: Hypernetwork | None = None, digest: str = "") -> None:
        self.network, self.digest = network, digest

    def load(self, folder: Path, base: str, recipe: Recipe) -> Recipe:
        """Read what was trained for the recipe's layers of ``base``, from ``folder``; see `read_network`."""
        self.network, self.digest = read_network(folder, base, recipe.layers, recipe.network_digest)
        return recipe.override(network_digest=self.digest)

    def update(self, task: Task) -> Edited:
        """The sum of all facts' updates. BadInput says which fact or layer cannot be used."""
        if self.network is None:
            raise BadInput(f"mend edits with a trained hypernetwork; {ANEW}")
        model, anatomy, facts, under = task.model, task.anatomy, task.facts, task.recipe.layers[0] - 1
        modules = edited_modules(model, anatomy, task.recipe.layers)
        if dict(self.network.shapes) != shapes_of(modules):
            raise BadInput(
                f"the hypernetwork is of other weights than layers {task.recipe.layers} have; {ANEW}"
            )
        losses = [0.0] * len(facts)
        sums = _Sums(self.network.shapes)
        network = self.network.to(model.device, model.dtype)
        with task.timer("text"):
            passages = passages_of(task.tokenizer, facts, positions(model.config))
            try_out(model, anatomy, [under], passages[0].tokens)

        def work(batch: list[int], budget: Budget) -> None:
            tell(task.progress, "gradients", batch[0], len(facts))
            found = []  # a batch that runs out of memory has added nothing
            for group in _groups(batch, passages, budget):
                part = _part(model, anatomy, under, group, passages)
                said_now = partial(part.given, part.tail.hidden)
                pairs, said = read_pairs(said_now, part.tail.mask, modules)
                with torch.no_grad():
                    terms = {name: network.terms(name, *pair) for name, pair in pairs.items()}
                found.append((group, terms, said.tolist()))
            for facts_of, terms, numbers in found:
                sums.add(terms)
                for fact, loss in zip(facts_of, numbers, strict=True):
                    losses[fact] = loss

        with task.timer("gradients"):
            in_batches(range(len(facts)), Budget.of(task.batch_size, model.device), work)
        tell(task.progress, "gradients", len(facts), len(facts))
        for fact, loss in zip(facts, losses, strict=True):
            if not math.isfinite(loss):
                raise BadInput(f"“{fact.text}”: the loss is not a number on this model; leave the fact out")
        deltas = {name: sums.delta(name, isinstance(module, Conv1D)) for name, module in modules.items()}
        resolved = task.recipe.override(network_digest=self.digest)
        return Edited(deltas, None, resolved, task.timer.seconds, [1] * len(facts), losses)


def edited_modules(model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The feed-forward projections of these layers by parameter name, from low to high. BadInput."""
    anatomy.check_layers(layers)
    if layers[0] < 1:
        raise BadInput("layer 0: mend edits blocks that stand on others; choose layers from 1 up")
    return {n: module for layer in layers for n, module in feed_forward(model, anatomy, layer).items()}


def shapes_of(modules: Mapping[str, nn.Module]) -> dict[str, Shape]:
    """(d_out, d_in) of each weight, however it is stored."""
    return {name: shape_of(module) for name, module in modules.items()}


def passages_of(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], longest: int | None
) -> list[Passage]:
    """Each fact's prompt and target, replayed from the first token."""
    texts = rewriting_passages(tokenizer, facts, ("{}",), longest)
    return [passage.whole for (passage,) in texts]


def _groups(batch: Sequence[int], passages: Sequence[Passage], budget: Budget) -> list[list[int]]:
    places = pack([len(passages[fact].tokens) for fact in batch], budget.tokens)
    return [[batch[place] for place in group] for group in places]


def _part(
    model: PreTrainedModel, anatomy: Anatomy, below: int, facts: Sequence[int], passages: Sequence[Passage]
) -> Rewriting:
    """The losses of some facts, ready to be replayed above block ``below``."""
    tail = capture(model, anatomy, [passages[fact].row(0) for fact in facts], layer=below)
    return Rewriting.of_rows(facts, [[passages[fact]] for fact in facts], tail)


class _Sums:
    """Σ b aᵀ of each weight: as factors, until these would take more room than their product."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.terms: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in shapes}
        self.dense: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Rows of Bᵀ and of A."""
        for name, (columns, rows) in terms.items():
            self.terms[name].append((columns.cpu().float(), rows.cpu().float()))
            held = sum(len(a) for _, a in self.terms[name])
            if name in self.dense or held > break_even(*self.shapes[name]):
                self.dense[name] = self._product(name)
                self.terms[name] = []

    def _product(self, name: str) -> Tensor:
        """In float64, so that batches add up to what one batch gives."""
        product = self.dense.get(name)
        if product is None:
            product = torch.zeros(self.shapes[name], dtype=torch.float64)
        for columns, rows in self.terms[name]:
            product += columns.double().T @ rows.double()
        return product

    def delta(self, name: str, transposed: bool) -> Delta:
        if name in self.dense:
            return Delta(dense=self.dense[name], transposed=transposed)
        columns, rows = (torch.cat(part) for part in zip(*self.terms[name], strict=True))
        if not len(rows):
            raise BadInput(
                "the model says these facts already: there is no gradient to edit by; leave them out"
            )
        return Delta(columns.T, rows, transposed=transposed)
