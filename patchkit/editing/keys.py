"""Keys and current states, read at each fact's subject (MEMIT eq. 18-19 and alg. 1).

The key k of a fact at a layer is the edited weight's input at the subject's last token: the bare
prompt and the mean over the written contexts count one half each. The current state is the last
edited block's output there, in the bare prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.editing.batching import pack
from patchkit.editing.templates import Passage
from patchkit.models.anatomy import Anatomy
from patchkit.models.climb import Climb
from patchkit.models.replay import Row, reading_inputs, reading_outputs

__all__ = ["Reader", "collect_inputs", "collect_keys", "collect_outputs", "collect_states"]

Listener = Callable[[], AbstractContextManager[list[Tensor]]]

_KEPT = 1 << 28  # numbers of kept states: 1 GiB in float32
_TOKENS = 2048  # a forward pass: no gradients, so more fit than in a step of the optimisation


class Reader:
    """Reads some facts at one layer after another, upward, while the weights below change on the way.

    ``passages`` is [fact][template], the bare prompt first.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]]
    ) -> None:
        self._model, self._anatomy, self._count = model, anatomy, len(passages)
        self._all = _Climbs(model, anatomy, [_row(p, g) for texts in passages for g, p in enumerate(texts)])
        self._bare = _Climbs(model, anatomy, [_row(texts[0], 0) for texts in passages])

    def keys(self, layer: int) -> Tensor:
        """Keys [N, d_ff] at ``layer``, whose weight may change next."""
        return _over_templates(self.inputs(layer))

    def inputs(self, layer: int) -> Tensor:
        """The key in each template [N, T, d_ff] at ``layer``, whose weight may change next."""
        read = self._all.read(
            partial(reading_inputs, self._anatomy.downs[layer]), self._anatomy.d_ff, layer, layer
        )
        return read.view(self._count, -1, self._anatomy.d_ff)

    def states(self, layer: int, until: int) -> Tensor:
        """Outputs [N, d_model] of block ``until`` for the bare prompts; ``layer`` may change next."""
        block = self._anatomy.blocks[until]
        return self._bare.read(partial(reading_outputs, block), self._anatomy.d_model, until, layer)


class _Climbs:
    """Rows in chunks that fit, each on its own way up."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row]) -> None:
        self._model, self._rows = model, rows
        self._chunks = _chunks(rows)
        self._climbs = [Climb(model, anatomy, [rows[i] for i in chosen]) for chosen in self._chunks]
        self._lasting = _lasting([sum(len(rows[i].prefix) for i in c) for c in self._chunks], anatomy.d_model)

    def read(self, listen: Listener, width: int, until: int, changes: int) -> Tensor:
        """What is heard at each row's last token in a pass through block ``until``: [rows, width]."""
        read = torch.empty(len(self._rows), width, dtype=self._model.dtype, device=self._model.device)
        for place, (chosen, climb) in enumerate(zip(self._chunks, self._climbs, strict=True)):
            heard = climb.read(listen, until=until, changes=changes if place < self._lasting else 0)
            read[chosen] = heard.view(len(chosen), -1, width)[:, -1]  # some blocks flatten
        return read


def collect_keys(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """Keys [N, d_ff] at ``layer``; ``passages`` is [fact][template], the bare prompt first."""
    return Reader(model, anatomy, passages).keys(layer)


def collect_inputs(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """The key in each template [N, T, d_ff] at ``layer``, the bare prompt's first."""
    return Reader(model, anatomy, passages).inputs(layer)


def collect_states(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """Outputs [N, d_model] of block ``layer`` for the bare prompts."""
    return Reader(model, anatomy, passages).states(layer, layer)


def collect_outputs(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """Outputs [N, d_model] of the edited projection of block ``layer`` for the bare prompts."""
    climbs = _Climbs(model, anatomy, [_row(texts[0], 0) for texts in passages])
    return climbs.read(partial(reading_outputs, anatomy.downs[layer]), anatomy.d_model, layer, layer)


def _lasting(tokens: Sequence[int], width: int) -> int:
    """How many chunks may keep their states on the way; the others begin from the bottom each time."""
    return sum(width * total <= _KEPT for total in accumulate(tokens))


def _over_templates(keys: Tensor) -> Tensor:
    """Mean of the bare prompt's key and the mean of the others: [N, T, d] to [N, d]."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2


def _row(passage: Passage, group: int) -> Row:
    """The text to the subject's last token, which `prefill` puts in the last column and never shares."""
    return Row(passage.tokens[: passage.subject + 1], (), group)


def _chunks(rows: Sequence[Row]) -> list[list[int]]:
    return pack([len(row.prefix) for row in rows], _TOKENS)
