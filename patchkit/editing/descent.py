"""How δ goes down its loss: a rule for many facts at once, each with a state of its own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from patchkit.editing.recipe import Recipe

__all__ = ["Adam", "Descent", "Momentum", "descent_of"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults


class Descent(Protocol):
    """A rule that remembers what it saw of each fact."""

    def move(self, gradient: Tensor, step: int) -> Tensor:
        """What to add to δ [N, d_model], given the gradient there at ``step``, from 1 up."""


class Adam:
    """Adam (Kingma and Ba 2015, alg. 1), as MEMIT is published."""

    def __init__(self, init: Tensor, recipe: Recipe) -> None:
        self.mean, self.square = torch.zeros_like(init), torch.zeros_like(init)
        self.rate, self.decay = recipe.learning_rate, recipe.rate_decay

    def move(self, gradient: Tensor, step: int) -> Tensor:
        self.mean.lerp_(gradient, 1 - _BETA1)
        self.square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        size = (self.square / (1 - _BETA2**step)).sqrt() + _EPSILON
        return -self.rate * self.decay ** (step - 1) * (self.mean / (1 - _BETA1**step)) / size


class Momentum:
    """v = μ v + g / ‖g‖; δ is moved by - rate decay^t size v, size [N] the norms of the states that it moves.

    Steps are shares of the state's own norm, so one rate serves every model; the gradient's
    length, which says little far from a minimum and vanishes near it, is not used.
    """

    def __init__(self, init: Tensor, size: Tensor, recipe: Recipe) -> None:
        self.velocity = torch.zeros_like(init)
        self.length = size[:, None]
        self.rate, self.decay, self.momentum = recipe.learning_rate, recipe.rate_decay, recipe.momentum

    def move(self, gradient: Tensor, step: int) -> Tensor:
        size = gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        self.velocity.mul_(self.momentum).add_(gradient / size)
        return -self.rate * self.decay ** (step - 1) * self.length * self.velocity


def descent_of(init: Tensor, size: Tensor, recipe: Recipe) -> Descent:
    """The recipe's rule, at rest, for states ``init`` [N, d_model] of norms ``size`` [N]."""
    return Adam(init, recipe) if recipe.optimiser == "adam" else Momentum(init, size, recipe)
