"""Run a decoder once, then replay only what depends on the state being optimised.

An edit acts at one token, the subject's last, in the output of one block. The tokens before it
never change, so their keys and values are computed once and frozen (`prefill`). The tokens from it
on run once up to that block while every block above records how it was called (`capture`). From
then on a step is a handful of block calls (`Tail.states`) and the model's own norm and head at the
positions that a loss reads (`Tail.logits`). There is no per-architecture forward code: masks,
rotary embeddings, soft-caps and logit scales are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import Stop, ending, listening, stand_in, stop_after

_REACH = ("sliding_window", "window_size", "local_attention", "attention_chunk_size")

__all__ = ["Row", "Tail", "capture", "prefill"]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: what is run once, what is replayed, and the opening that it shares with its group."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True)
class Prefix:
    """The frozen past of R rows: keys and values [R, heads, P, head_dim] of each block.

    ``mask`` [R, P] is true where a column holds a token; ``lengths`` [R] counts them.
    """

    cache: FrozenCache
    mask: Tensor
    lengths: Tensor


class FrozenLayer(DynamicLayer):
    """A cache layer that shows its past before the new tokens and never grows."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


class FrozenCache(Cache):
    """Per-block pasts that any number of forward passes may read."""

    def __init__(self, layers: Sequence[FrozenLayer]) -> None:
        super().__init__(layers=list(layers))
        self.frozen = list(layers)

    def keep(self, rows: Tensor) -> FrozenCache:
        """The past of some of the rows."""

        def kept(layer: FrozenLayer) -> FrozenLayer:
            if not layer.is_initialized:
                return layer
            return _layer(FrozenLayer, *_map(lambda t: t.index_select(0, rows), layer))

        return FrozenCache([kept(layer) for layer in self.frozen])

    def forget(self, until: int) -> None:
        """Drop the past of blocks 0..``until``, which nothing runs again."""
        self.layers[: until + 1] = self.frozen[: until + 1] = [FrozenLayer() for _ in range(until + 1)]


def prefill(model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row], *, until: int) -> Prefix:
    """Run the rows' prefixes through blocks 0..``until`` and keep their keys and values.

    What all rows of a group have in common at their start (the context that MEMIT puts before a
    prompt) runs once for the whole group. Columns are [shared, left-padded | rest, left-padded],
    and the last pass inside ends with every row's last prefix token in its last column.
    """
    openings = openings_of(model, rows)
    groups = [group for group, opening in openings.items() if opening]
    past = empty(model, len(rows))
    if groups:
        common = extend(model, anatomy, empty(model, len(groups)), [openings[g] for g in groups], until)
        past = spread_over(common, [groups.index(r.group) if r.group in groups else None for r in rows])
    rest = [row.prefix[len(openings[row.group]) :] for row in rows]
    if any(rest):
        past = extend(model, anatomy, past, rest, until)
    return _freeze(anatomy, past)


def capture(model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row], *, layer: int) -> Tail:
    """Run the rows once up to block ``layer`` and record how the blocks above are called."""
    prefix = prefill(model, anatomy, rows, until=anatomy.depth - 1)
    ids, mask = _pad([row.suffix for row in rows], model.device, left=False)
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
                # Bloom's and Falcon's "alibi" is [R x heads, 1, S].
                return {name: heads(v) if name == "alibi" else narrow(v) for name, v in value.items()}
            if id(value) in done:
                return done[id(value)]
            if isinstance(value, FrozenCache):
                done[id(value)] = value.keep(rows)
            elif isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == count:
                done[id(value)] = value.index_select(0, rows)
            return done.get(id(value), value)

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


@dataclass
class _Past:
    """A growing past of R rows; ``cache`` is None while it is empty."""

    cache: DynamicCache | None
    mask: Tensor
    lengths: Tensor


def empty(model: PreTrainedModel, count: int) -> _Past:
    device = model.device
    return _Past(
        None,
        torch.zeros(count, 0, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.long, device=device),
    )


def extend(
    model: PreTrainedModel, anatomy: Anatomy, past: _Past, texts: Sequence[tuple[int, ...]], until: int
) -> _Past:
    """Run more tokens after ``past`` through blocks 0..``until``."""
    ids, new = _pad(texts, model.device, left=True)
    cache = past.cache if past.cache is not None else DynamicCache()
    mask = torch.cat([past.mask, new], 1)
    positions = past.lengths[:, None] + (new.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), stop_after(anatomy.blocks[until]):
        model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    return _Past(cache, mask, past.lengths + new.sum(1))


def spread_over(common: _Past, places: Sequence[int | None]) -> _Past:
    """Give each row its group's past; a row without one sees none of it."""
    device = common.mask.device
    index = torch.tensor([place or 0 for place in places], device=device)
    present = torch.tensor([place is not None for place in places], device=device)
    cache = DynamicCache()
    assert common.cache is not None
    cache.layers = [
        _layer(DynamicLayer, *_map(lambda t: t.index_select(0, index), x)) for x in common.cache.layers
    ]
    return _Past(cache, common.mask[index] & present[:, None], common.lengths[index] * present)


def _freeze(anatomy: Anatomy, past: _Past) -> Prefix:
    if past.cache is None:
        return Prefix(FrozenCache([FrozenLayer() for _ in anatomy.blocks]), past.mask, past.lengths)
    # A padded column may hold NaN (it had nothing to look at), and 0 · NaN would reach the output.
    blank = ~past.mask[:, None, :, None]
    layers = [_layer(FrozenLayer, *_map(lambda t: t.masked_fill(blank, 0), x)) for x in past.cache.layers]
    return Prefix(FrozenCache(layers), past.mask, past.lengths)


def _layer(kind: type[Any], keys: Tensor, values: Tensor) -> Any:
    layer = kind()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _map(function: Callable[[Tensor], Tensor], layer: Any) -> tuple[Tensor, Tensor]:
    if type(layer) not in (DynamicLayer, FrozenLayer):
        raise BadInput(
            f"the model keeps a {type(layer).__name__} where attention keys and values are expected"
        )
    return function(layer.keys), function(layer.values)


def _pad(texts: Sequence[tuple[int, ...]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [R, S] padded with 0 on one side, and the mask of real tokens."""
    width = max(map(len, texts))
    blanks = [(0,) * (width - len(text)) for text in texts]
    ids = [b + t if left else t + b for t, b in zip(texts, blanks, strict=True)]
    real = [len(b) * [False] + len(t) * [True] for t, b in zip(texts, blanks, strict=True)]
    mask = torch.tensor(real, device=device)
    return torch.tensor(ids, device=device), mask if left else mask.flip(1)


def openings_of(model: PreTrainedModel, rows: Sequence[Row]) -> dict[int, tuple[int, ...]]:
    """By group, the tokens that its rows have in common at their start, short of a prefix's last token."""
    if not _may_leave_gaps(model, rows):
        return {row.group: () for row in rows}
    shared: dict[int, tuple[int, ...]] = {}
    for row in rows:
        known, own = shared.get(row.group, row.prefix), row.prefix[:-1]
        same = next((i for i, (a, b) in enumerate(zip(known, own, strict=False)) if a != b), None)
        shared[row.group] = known[: min(len(known), len(own)) if same is None else same]
    return shared


def _may_leave_gaps(model: PreTrainedModel, rows: Sequence[Row]) -> bool:
    """Whether padding may stand between tokens.

    Sliding windows count columns, so only far from their reach; a model that cannot be told where tokens
    stand (MPT) counts columns throughout.
    """
    if "position_ids" not in signature(model.forward).parameters:
        return False
    longest = max(len(r.prefix) + len(r.suffix) for r in rows)
    return all(2 * longest < window for window in _windows(model.config.get_text_config(decoder=True)))


def _windows(config: Any) -> list[int]:
    """How far back blocks may look, by whatever name a config has for it."""
    found = (getattr(config, name, None) for name in _REACH)
    return [value for value in found if type(value) is int and value > 0]
