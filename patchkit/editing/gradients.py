"""What weights' gradients are made of, token by token, and a model with low-rank updates laid over it.

∂L/∂W = Σ over tokens of δ uᵀ, with u the weight's input and δ = ∂L/∂(W u): a text of T tokens gives a
gradient of rank T at most, held as its pairs (u, δ). Nothing is multiplied out, and no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import stand_in
from patchkit.models.packing import pack
from patchkit.models.past import Row
from patchkit.models.replay import Tail, capture

__all__ = ["Feet", "Pairs", "read_pairs", "updated"]

Pairs = dict[str, tuple[Tensor, Tensor]]

_HELD = 1 << 31  # bytes of states
_AT_ONCE = 512  # tokens


def read_pairs(
    loss: Callable[[], Tensor], mask: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[Pairs, Tensor]:
    """By weight u [T, d_in] and δ [T, d_out] of Σ ``loss()``, and what it gave: one replay of R rows of S
    tokens, which ``mask`` [R, S] tells from padding.

    T are the tokens at which neither is zero: behind the last attention, only those whose logits are read.
    """
    inputs: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            leaves[name] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[name]

        return hook

    with torch.enable_grad(), _hooked({name: (modules[name], listen(name)) for name in modules}):
        losses = loss()
        gradients = torch.autograd.grad(losses.sum(), [leaves[name] for name in modules])
    pairs = {}
    for name, gradient in zip(modules, gradients, strict=True):
        u, delta = (t.reshape(*mask.shape, -1)[mask] for t in (inputs[name], gradient))
        there = (u != 0).any(-1) & (delta != 0).any(-1)
        pairs[name] = (u[there], delta[there])
    return pairs, losses.detach()


@contextmanager
def updated(modules: Mapping[str, nn.Module], terms: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the weights be W + B A inside, by rows of Bᵀ [T, d_out] and A [T, d_in]; gradients reach both."""

    def lay(columns: Tensor, rows: Tensor) -> Callable[..., Tensor]:
        return lambda _module, args, output: output + (args[0] @ rows.T) @ columns

    with _hooked({name: (modules[name], lay(*terms[name])) for name in terms}):
        yield


@contextmanager
def _hooked(hooks: Mapping[str, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks.values():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class Feet:
    """Tails of texts above one block; what the blocks up to it give is computed once a text, and held.

    ``texts`` go through those blocks in fixed groups of like length, each when one of it is first asked for:
    what they give does not depend on the order in which they are. What there is no room for goes alone.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, layer: int, texts: Iterable[tuple[int, ...]] = ()
    ) -> None:
        self._model, self._anatomy, self._layer = model, anatomy, layer
        self._states: dict[tuple[int, ...], Tensor] = {}
        self._groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._as_tuple = False
        every, room = list(dict.fromkeys(texts)), _HELD
        for places in pack([len(text) for text in every], _AT_ONCE):
            group = [every[place] for place in places]
            room -= 4 * anatomy.d_model * sum(map(len, group))
            if room >= 0:
                self._groups |= dict.fromkeys(group, group)

    def tail(self, texts: Sequence[tuple[int, ...]]) -> Tail:
        """All tokens of the texts, as rows in their order."""
        given = pad_sequence([self._given(text) for text in texts], batch_first=True)
        out = (given,) if self._as_tuple else given
        with stand_in(self._anatomy.blocks[: self._layer + 1], lambda _: lambda *args, **kwargs: out):
            return self._captured(texts)

    def _given(self, text: tuple[int, ...]) -> Tensor:
        """[T, d_model] that block ``layer`` gives."""
        if text in self._states:
            return self._states[text]
        group = self._groups.get(text, [text])
        tail = self._captured(group)
        self._as_tuple = tail.as_tuple
        given = {each: row[: len(each)].clone() for each, row in zip(group, tail.hidden, strict=True)}
        if text in self._groups:
            self._states |= given
        return given[text]

    def _captured(self, texts: Sequence[tuple[int, ...]]) -> Tail:
        return capture(self._model, self._anatomy, [Row((), text) for text in texts], layer=self._layer)
