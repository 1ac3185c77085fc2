"""Run a decoder once, then replay only what depends on the state being optimised.

An edit acts at one token, the subject's last, in the output of one block. The tokens before it
never change, so their keys and values are computed once and frozen (`prefill`). The tokens from it
on run once up to that block while every block above records how it was called (`capture`). From
then on a step is a handful of block calls (`Tail.states`) and the model's own norm and head at the
positions that a loss reads (`Tail.logits`). There is no per-architecture forward code: masks,
rotary embeddings, soft-caps and logit scales are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import Stop, ending, listening, stand_in
from patchkit.models.past import FrozenCache, Openings, Row, padded, prefill

__all__ = ["Tail", "capture", "run_blocks"]


def capture(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rows: Sequence[Row],
    *,
    layer: int,
    openings: Openings | None = None,
) -> Tail:
    """Run the rows once up to block ``layer`` and record how the blocks above are called.

    ``openings``, by default those of the rows, were run through all blocks.
    """
    prefix = prefill(model, anatomy, rows, until=anatomy.depth - 1, openings=openings)
    ids, mask = padded([row.suffix for row in rows], model.device, left=False)
    ahead = torch.arange(ids.shape[1], device=model.device).clamp(max=mask.sum(1, keepdim=True) - 1)
    record = _Recorder(anatomy, layer)
    with torch.no_grad(), record.listening():
        model(
            input_ids=ids,
            attention_mask=torch.cat([prefix.mask, mask], 1).long(),
            position_ids=prefix.lengths[:, None] + ahead,
            past_key_values=prefix.cache,
            use_cache=True,
        )
    assert record.hidden is not None
    prefix.cache.forget(layer)
    return Tail(model, anatomy, record.hidden, mask, tuple(record.calls), record.as_tuple)


def run_blocks(model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[tuple[int, ...]]) -> Tail:
    """Run whole texts through all blocks, with gradients to what was hooked in below: `Tail.logits` then
    reads the positions that are asked for, and no others have logits."""
    ids, mask = padded(rows, model.device, left=False)
    record = _Recorder(anatomy, anatomy.depth - 1)
    with record.listening():
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    assert record.hidden is not None
    return Tail(model, anatomy, record.hidden, mask, (), record.as_tuple)


@dataclass(frozen=True)
class Tail:
    """The part of a forward pass above one block, ready to be replayed.

    ``hidden`` [R, S, d_model] is that block's output for the suffix tokens, ``mask`` [R, S] is true
    where a token stands. ``calls`` holds each higher block's arguments.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    hidden: Tensor
    mask: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    as_tuple: bool

    def states(self, hidden: Tensor) -> Tensor:
        """The last block's output [R, S, d_model] when the lower block's output is ``hidden``."""
        above = self.anatomy.blocks[self.anatomy.depth - len(self.calls) :]
        for block, (args, kwargs) in zip(above, self.calls, strict=True):
            out = block(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Logits [P, vocabulary] of last-block states [P, d_model], by the model's own norm and head:
        its forward runs with blocks that hand the states through, and does what it does after them.
        """
        embedding = self.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        # Not token ids: transformers would look among them for padding, and the host would wait for it.
        blank = states.new_zeros(len(states), 1, embedding.shape[1])
        given = states.unsqueeze(1)

        def hand_through(*_: Any, **__: Any) -> Any:
            return (given,) if self.as_tuple else given

        with stand_in(self.anatomy.blocks, lambda _: hand_through):
            # An empty cache keeps the mask code from looking for packed sequences, which synchronises.
            out = self.model(inputs_embeds=blank, past_key_values=DynamicCache(), use_cache=True)
        return out.logits[:, 0]

    def keep(self, rows: Tensor) -> Tail:
        """The same for some of the rows (indices)."""
        count = len(self.hidden)
        done: dict[int, Any] = {}  # blocks share their masks and positions: narrow each once

        def narrow(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(narrow(item) for item in value)
            if isinstance(value, dict):
                return {name: named(name, v) for name, v in value.items()}
            if id(value) in done:
                return done[id(value)]
            if isinstance(value, FrozenCache):
                done[id(value)] = value.keep(rows)
            elif isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == count:
                done[id(value)] = value.index_select(0, rows)
            return done.get(id(value), value)

        def named(name: str, value: Any) -> Any:
            if name == "position_bias":  # MPT's is [heads, 1, S], of all rows alike
                return value
            return heads(value) if name == "alibi" else narrow(value)  # Bloom's, Falcon's: [R x heads, 1, S]

        def heads(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.unflatten(0, (count, -1)).index_select(0, rows).flatten(0, 1)

        return replace(
            self,
            hidden=self.hidden.index_select(0, rows),
            mask=self.mask.index_select(0, rows),
            calls=tuple((narrow(args), narrow(kwargs)) for args, kwargs in self.calls),
        )


class _Recorder:
    """Listens to one forward pass: the output of block ``layer`` and the calls of the blocks above."""

    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        self.anatomy, self.layer = anatomy, layer
        self.hidden: Tensor | None = None
        self.as_tuple = False
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        below, above = self.anatomy.blocks[self.layer], self.anatomy.blocks[self.layer + 1 :]
        with (
            ending(),
            listening(below, self._listen),
            stand_in(above, lambda index: lambda *args, **kwargs: self._record(index, args, kwargs)),
        ):
            yield

    def _listen(self, _block: nn.Module, _args: Any, output: Any) -> None:
        self.as_tuple = isinstance(output, tuple)
        self.hidden = output[0] if self.as_tuple else output
        if self.layer == self.anatomy.depth - 1:
            raise Stop

    def _record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.calls.append((args[1:], kwargs))
        if index == self.anatomy.depth - self.layer - 2:
            raise Stop
        return (self.hidden,) if self.as_tuple else self.hidden
