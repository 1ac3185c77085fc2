"""Keys and current states, read at each fact's subject (MEMIT eq. 18-19 and alg. 1).

The key k of a fact at a layer is the edited weight's input at the subject's last token: the bare
prompt and the mean over the written contexts count one half each. The current state is the last
edited block's output there, in the bare prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.algebra.threads import side_by_side
from patchkit.editing.solve import exact_device
from patchkit.editing.templates import Passage
from patchkit.models.anatomy import Anatomy
from patchkit.models.climb import Climb, OpeningsClimb
from patchkit.models.hooks import reading_inputs, reading_outputs
from patchkit.models.packing import pack
from patchkit.models.past import Row

__all__ = ["Reader", "collect_inputs", "collect_keys", "collect_outputs", "collect_states"]

Listener = Callable[[], AbstractContextManager[list[Tensor]]]
_Used = TypeVar("_Used")

_KEPT = 1 << 28  # numbers of kept states: 1 GiB in float32
_HELD = 4096  # tokens whose keys and values a forward pass may hold
_TOKENS = 1024  # a forward pass: no gradients, so more fit than in a step of the optimisation


class Reader:
    """Reads some facts at one layer after another, upward, while the weights below change on the way.

    ``passages`` is [fact][template], the bare prompt first.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]]
    ) -> None:
        self._model, self._anatomy, self._count = model, anatomy, len(passages)
        self._templates = len(passages[0])
        self._all = _Climbs(model, anatomy, [_row(p, g) for texts in passages for g, p in enumerate(texts)])
        self._bare = _Climbs(model, anatomy, [_row(texts[0], 0) for texts in passages])

    def keys(self, layer: int) -> Tensor:
        """Keys [N, d_ff] at ``layer``, whose weight may change next."""
        return self._means(layer, None)

    def keys_and_variation(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys as `keys`, and what they vary over the templates: Σ w_t (k_t - k)(k_t - k)ᵀ, summed over the
        facts too, [d_ff, d_ff] in float64. w_t is a template's share in k."""
        width, device = self._anatomy.d_ff, exact_device(self._model.device)
        second = torch.zeros(width, width, dtype=torch.float64, device=device)
        keys = self._means(layer, second)
        exact = keys.to(second)
        return keys, second - exact.T @ exact  # Σ w k kᵀ less Σ k̄ k̄ᵀ: a fact's shares are 1 together

    def _means(self, layer: int, second: Tensor | None) -> Tensor:
        """The mean key of each fact; Σ w_t k_t k_tᵀ is added to ``second``.

        Sums grow chunk by chunk: the keys of all templates at once would be T times as much.
        """
        width, of = self._anatomy.d_ff, self._model
        dtype = torch.promote_types(of.dtype, torch.float32)
        keys = torch.zeros(self._count, width, dtype=dtype, device=of.device)

        def shared(rows: Sequence[int], heard: Tensor) -> tuple[list[int], Tensor, Tensor | None]:
            facts, of_rows = self._shares(rows)
            shares, heard = of_rows.to(keys), heard.to(dtype)
            moment = None if second is None else (heard * shares.sum(0)[:, None]).T @ heard
            return facts, shares @ heard, moment

        for facts, of_chunk, moment in self._all.each(shared, self._inputs(layer), width, layer, layer):
            keys[facts] += of_chunk
            if second is not None and moment is not None:
                second += moment.to(second)
        return keys.to(of.dtype)

    def inputs(self, layer: int) -> Tensor:
        """The key in each template [N, T, d_ff] at ``layer``, whose weight may change next."""
        read = self._all.read(self._inputs(layer), self._anatomy.d_ff, layer, layer)
        return read.view(self._count, -1, self._anatomy.d_ff)

    def _inputs(self, layer: int) -> Listener:
        return partial(reading_inputs, self._anatomy.downs[layer])

    def _shares(self, rows: Sequence[int]) -> tuple[list[int], Tensor]:
        """The facts that rows belong to, and what each row counts in their keys: [facts, rows] in float64.

        A product with it, unlike a sum by index, gives the same bits each time on a GPU too.
        """
        facts = sorted({row // self._templates for row in rows})
        place = {fact: at for at, fact in enumerate(facts)}
        shares = torch.zeros(len(facts), len(rows), dtype=torch.float64)
        for column, row in enumerate(rows):
            fact, template = divmod(row, self._templates)
            shares[place[fact], column] = _share(template, self._templates)
        return facts, shares

    def states(self, layer: int, until: int) -> Tensor:
        """Outputs [N, d_model] of block ``until`` for the bare prompts; ``layer`` may change next."""
        block = self._anatomy.blocks[until]
        return self._bare.read(partial(reading_outputs, block), self._anatomy.d_model, until, layer)


class _Climbs:
    """Rows in chunks that fit, each on its own way up behind the openings of all."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row]) -> None:
        self._model, self._rows = model, rows
        self.openings = OpeningsClimb(model, anatomy, rows)
        texts = self.openings.texts
        left = [len(row.prefix) - len(texts.get(row.group, ())) for row in rows]
        whole = [len(row.prefix) for row in rows]
        self._chunks = [piece for chosen in pack(left, _TOKENS) for piece in _held(chosen, whole)]
        self.climbs = [Climb(model, anatomy, [rows[i] for i in chosen]) for chosen in self._chunks]
        sizes = [sum(map(len, texts.values())), *(sum(left[i] for i in chosen) for chosen in self._chunks)]
        self._lasting = _lasting(sizes, anatomy.d_model)

    def read(self, listen: Listener, width: int, until: int, changes: int) -> Tensor:
        """What is heard at each row's last token in a pass through block ``until``: [rows, width]."""
        read = torch.empty(len(self._rows), width, dtype=self._model.dtype, device=self._model.device)
        for rows, heard in self.each(lambda *chunk: chunk, listen, width, until, changes):
            read[rows] = heard
        return read

    def each(
        self,
        use: Callable[[list[int], Tensor], _Used],
        listen: Listener,
        width: int,
        until: int,
        changes: int,
    ) -> Iterator[_Used]:
        """What ``use`` makes of each chunk: its rows, and what is heard [rows of the chunk, width]."""

        def begun(place: int) -> int:
            """Where the next pass begins."""
            return changes if place < self._lasting else 0

        openings = self.openings.run(until, begun(0))

        def one(place: int) -> _Used:
            chosen, climb = self._chunks[place], self.climbs[place]
            heard = climb.read(openings, listen, until=until, changes=begun(place + 1))
            return use(chosen, heard.view(len(chosen), -1, width)[:, -1])  # some blocks flatten

        with side_by_side(len(self._chunks), self._model.device) as each:
            yield from each(one, range(len(self._chunks)))


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


def _held(chosen: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """A chunk in pieces whose keys and values fit: each row is shown its opening too."""
    most = max(1, _HELD // max(lengths[place] for place in chosen))
    return [list(chosen[first : first + most]) for first in range(0, len(chosen), most)]


def _lasting(tokens: Sequence[int], width: int) -> int:
    """How many, openings first, may keep their states on the way; the others begin from the bottom."""
    return sum(width * total <= _KEPT for total in accumulate(tokens))


def _share(template: int, count: int) -> float:
    """The bare prompt, which is the first of the templates, counts one half, the others share the rest."""
    if count == 1:
        return 1.0
    return 0.5 if template == 0 else 0.5 / (count - 1)


def _row(passage: Passage, group: int) -> Row:
    """The text to the subject's last token, which `prefill` puts in the last column and never shares."""
    return Row(passage.tokens[: passage.subject + 1], (), group)
