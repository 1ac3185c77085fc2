"""What ran before: the keys and values of tokens that no edit changes, computed once.

The tokens before a fact's subject never change, so their past is computed once and frozen (`prefill`).
What many texts have in common at their start, as the contexts that MEMIT puts before every prompt, runs
once for all of them (`Openings`). There is no per-architecture forward code: masks, rotary embeddings and
ALiBi are the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import stop_after
from patchkit.models.packing import pack

__all__ = [
    "FrozenCache",
    "FrozenLayer",
    "Openings",
    "Past",
    "Prefix",
    "Row",
    "Shared",
    "empty",
    "extend",
    "openings_of",
    "padded",
    "prefill",
]

_TOKENS = 1024  # a pass: no gradients, so more fit than in a step of an optimisation
_REACH = ("sliding_window", "window_size", "local_attention", "attention_chunk_size")


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


@dataclass(frozen=True, slots=True)
class Shared:
    """One block's keys and values [G, heads, P, head_dim], there once; ``rows`` [R]: whose each row sees."""

    keys: Tensor
    values: Tensor
    rows: Tensor

    @property
    def width(self) -> int:
        return self.keys.shape[-2]

    def of_rows(self) -> tuple[Tensor, Tensor]:
        return self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)

    def keep(self, rows: Tensor) -> Shared:
        return replace(self, rows=self.rows.index_select(0, rows))


class _OpenedLayer(DynamicLayer):
    """A cache layer that grows, and shows its rows' opening before what is their own."""

    def __init__(self, opening: Shared) -> None:
        super().__init__()
        self.opening = opening

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _joined(self.opening.of_rows(), super().update(key_states, value_states, *args, **kwargs))

    def get_seq_length(self) -> int:
        return self.opening.width + super().get_seq_length()


class FrozenLayer(DynamicLayer):
    """A cache layer that shows its pasts, in order, before the new tokens and never grows."""

    def __init__(self, *pasts: Shared) -> None:
        super().__init__()
        self.pasts = pasts

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _joined(*(past.of_rows() for past in self.pasts), (key_states, value_states))

    def get_seq_length(self) -> int:
        return sum(past.width for past in self.pasts)


def _joined(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values one behind the other."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, -2), torch.cat(values, -2)


class FrozenCache(Cache):
    """Per-block pasts that any number of forward passes may read."""

    def __init__(self, layers: Sequence[FrozenLayer]) -> None:
        super().__init__(layers=list(layers))
        self.frozen = list(layers)

    def keep(self, rows: Tensor) -> FrozenCache:
        """The past of some of the rows."""
        return FrozenCache([FrozenLayer(*(past.keep(rows) for past in each.pasts)) for each in self.frozen])

    def forget(self, until: int) -> None:
        """Drop the past of blocks 0..``until``, which nothing runs again."""
        self.layers[: until + 1] = self.frozen[: until + 1] = [FrozenLayer() for _ in range(until + 1)]


def prefill(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rows: Sequence[Row],
    *,
    until: int,
    openings: Openings | None = None,
) -> Prefix:
    """Run the rows' prefixes through blocks 0..``until`` and keep their keys and values.

    ``openings``, by default those of the rows, are of these or of more rows and were run as far. Columns are
    [opening, left-padded | rest, left-padded], and the last pass inside ends with every row's last prefix
    token in its last column.
    """
    if openings is None:
        openings = Openings.run(model, anatomy, openings_of(model, rows), until=until)
    openings = openings.fitting(model, rows)
    groups = pack([len(openings.rest(row)) for row in rows], _TOKENS, padding=math.inf)
    pasts = []
    for places in groups:
        past, rest = openings.behind(model, [rows[place] for place in places])
        pasts.append(extend(model, anatomy, past, rest, until) if any(rest) else past)
    return _together(anatomy, groups, pasts, openings.past.mask.shape[1])


@dataclass(frozen=True)
class Openings:
    """What rows of a group have in common at their start: ``texts`` by group, and their ``past`` in order."""

    texts: Mapping[int, tuple[int, ...]]
    past: Past

    @classmethod
    def run(
        cls, model: PreTrainedModel, anatomy: Anatomy, texts: Mapping[int, tuple[int, ...]], *, until: int
    ) -> Openings:
        """Run ``texts`` (of `openings_of`) through blocks 0..``until``."""
        past = empty(model, len(texts))
        if texts:
            past = extend(model, anatomy, past, [*texts.values()], until)
            assert past.cache is not None
            for layer in map(_known, past.cache.layers):
                if layer.is_initialized:  # a block that was handed through holds nothing
                    _blank(_own(layer), past.mask)
        return cls(texts, past)

    def fitting(self, model: PreTrainedModel, rows: Sequence[Row]) -> Openings:
        """These, or none where padding may not stand between the tokens of one of the rows."""
        return self if all(_near(model, rows)) else Openings({}, empty(model, 0))

    def rest(self, row: Row) -> tuple[int, ...]:
        """What of a row's prefix is left to run."""
        return row.prefix[len(self.texts.get(row.group, ())) :]

    def behind(self, model: PreTrainedModel, rows: Sequence[Row]) -> tuple[Past, list[tuple[int, ...]]]:
        """The past that each row begins with, and what is left to run behind it."""
        places = {group: place for place, group in enumerate(self.texts)}
        own = [places.get(row.group) for row in rows]
        past = _opened(self.past, own) if places else empty(model, len(rows))
        return past, [self.rest(row) for row in rows]


def openings_of(model: PreTrainedModel, rows: Sequence[Row]) -> dict[int, tuple[int, ...]]:
    """By group, the tokens that its rows have in common at their start, short of a prefix's last token."""
    shared: dict[int, tuple[int, ...]] = {}
    for row, near in zip(rows, _near(model, rows), strict=True):
        if near:
            known, own = shared.get(row.group, row.prefix), row.prefix[:-1]
            same = next((i for i, (a, b) in enumerate(zip(known, own, strict=False)) if a != b), None)
            shared[row.group] = known[: min(len(known), len(own)) if same is None else same]
    return {group: text for group, text in shared.items() if text}


def _near(model: PreTrainedModel, rows: Sequence[Row]) -> list[bool]:
    """Of each row, whether padding may stand between its tokens.

    Sliding windows count columns, so only far from their reach; a model that cannot be told where tokens
    stand (MPT) counts columns throughout.
    """
    told = "position_ids" in signature(model.forward).parameters
    window = min(_windows(model.config.get_text_config(decoder=True)), default=math.inf) if told else 0
    return [2 * (len(row.prefix) + len(row.suffix)) < window for row in rows]


@dataclass
class Past:
    """A growing past of R rows; ``cache`` is None while it is empty."""

    cache: DynamicCache | None
    mask: Tensor
    lengths: Tensor


def empty(model: PreTrainedModel, count: int) -> Past:
    device = model.device
    return Past(
        None,
        torch.zeros(count, 0, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.long, device=device),
    )


def extend(
    model: PreTrainedModel, anatomy: Anatomy, past: Past, texts: Sequence[tuple[int, ...]], until: int
) -> Past:
    """Run more tokens after ``past`` through blocks 0..``until``."""
    ids, new = padded(texts, model.device, left=True)
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
    return Past(cache, mask, past.lengths + new.sum(1))


def _opened(common: Past, places: Sequence[int | None]) -> Past:
    """Give each row its group's past; a row without one sees none of it."""
    device = common.mask.device
    index = torch.tensor([place or 0 for place in places], device=device)
    present = torch.tensor([place is not None for place in places], device=device)
    cache = DynamicCache()
    assert common.cache is not None
    cache.layers = [_OpenedLayer(Shared(*_own(_known(layer)), index)) for layer in common.cache.layers]
    return Past(cache, common.mask[index] & present[:, None], common.lengths[index] * present)


def _together(
    anatomy: Anatomy, groups: Sequence[Sequence[int]], pasts: Sequence[Past], opened: int
) -> Prefix:
    """The pasts of groups of rows as one, frozen: ``opened`` columns that all have, then each row's own."""
    count, width = sum(map(len, groups)), max(past.mask.shape[1] for past in pasts)
    device = pasts[0].mask.device
    mask = torch.zeros(count, width, dtype=torch.bool, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    layers: list[list[tuple[Tensor, DynamicLayer]]] = [[] for _ in anatomy.blocks]
    for places, past in zip(groups, pasts, strict=True):
        rows = torch.tensor(places, device=device)
        own = past.mask.shape[1] - opened
        columns = torch.tensor([*range(opened), *range(width - own, width)], dtype=torch.long, device=device)
        mask[rows[:, None], columns], lengths[rows] = past.mask, past.lengths
        for into, layer in zip(layers, past.cache.layers if past.cache else (), strict=False):
            into.append((rows, _known(layer)))
    return Prefix(FrozenCache([_frozen(parts, mask[:, opened:]) for parts in layers]), mask, lengths)


def _frozen(parts: Sequence[tuple[Tensor, DynamicLayer]], mask: Tensor) -> FrozenLayer:
    """One block's pasts of groups of rows as one; ``mask`` [R, P] is true where a row has its own."""
    pasts: list[Shared] = []
    for rows, layer in parts:
        if isinstance(layer, _OpenedLayer):
            pasts = pasts or [replace(layer.opening, rows=rows.new_zeros(len(mask)))]
            pasts[0].rows[rows] = layer.opening.rows
    own = [(rows, _own(layer)) for rows, layer in parts if layer.is_initialized]
    if own:
        keys, values = (t.new_zeros(len(mask), t.shape[1], mask.shape[1], t.shape[3]) for t in own[0][1])
        for rows, found in own:
            for side, part in zip((keys, values), found, strict=True):
                side[rows, :, mask.shape[1] - part.shape[2] :] = part
        _blank((keys, values), mask)
        pasts.append(Shared(keys, values, torch.arange(len(mask), device=mask.device)))
    return FrozenLayer(*pasts)


def _blank(sides: Iterable[Tensor], mask: Tensor) -> None:
    """Put 0 into keys and values where no token stands: such a column may hold NaN (it had nothing to look
    at), and 0 · NaN would reach the output."""
    for side in sides:
        side.masked_fill_(~mask[:, None, :, None], 0)


def _known(layer: object) -> DynamicLayer:
    if not isinstance(layer, DynamicLayer) or type(layer) not in (DynamicLayer, _OpenedLayer):
        raise BadInput(
            f"the model keeps a {type(layer).__name__} where attention keys and values are expected"
        )
    return layer


def _own(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """What a layer holds of its rows alone."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def padded(texts: Sequence[tuple[int, ...]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [R, S] padded with 0 on one side, and the mask of real tokens."""
    width = max(map(len, texts))
    blanks = [(0,) * (width - len(text)) for text in texts]
    ids = [b + t if left else t + b for t, b in zip(texts, blanks, strict=True)]
    real = [len(b) * [False] + len(t) * [True] for t, b in zip(texts, blanks, strict=True)]
    mask = torch.tensor(real, device=device)
    return torch.tensor(ids, device=device), mask if left else mask.flip(1)


def _windows(config: Any) -> list[int]:
    """How far back blocks may look, by whatever name a config has for it."""
    found = (getattr(config, name, None) for name in _REACH)
    return [value for value in found if type(value) is int and value > 0]
