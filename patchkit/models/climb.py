"""The same texts through a model whose blocks change from below upward: unchanged blocks run once.

An editor that spreads an update over layers reads its texts again after each layer. Below the layer
that changed last nothing is new, so a pass begins there, from what the block beneath gave before.
A pass runs what `prefill` runs, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import listening, stand_in
from patchkit.models.replay import Row, empty, extend, openings_of, spread_over

__all__ = ["Climb"]


class Climb:
    """Rows of texts (their prefixes) on their way up one model; each group's opening runs once a pass."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row]) -> None:
        self._model, self._anatomy, self._rows = model, anatomy, rows
        self._openings = openings_of(model, rows)
        self._start = 0
        self._given: list[Any] = [None, None]  # by pass: what the block below the start gave
        self._past: list[Any] = []  # the openings' keys and values, block by block

    def read(
        self, listen: Callable[[], AbstractContextManager[list[Tensor]]], *, until: int, changes: int
    ) -> Tensor:
        """What a listener (`reading_inputs(module)`, …) heard last in a pass through block ``until``.

        ``changes``: the lowest block whose weights may be others at the next call; that pass begins there.
        """
        with listen() as heard:
            self._run(until, changes - 1)
        self._start = changes
        return heard[-1]

    def _run(self, until: int, keep: int) -> None:
        groups = [group for group, opening in self._openings.items() if opening]
        past = empty(self._model, len(self._rows))
        if groups:
            with self._pass(0, keep):
                texts = [self._openings[group] for group in groups]
                common = extend(self._model, self._anatomy, empty(self._model, len(groups)), texts, until)
            assert common.cache is not None
            common.cache.layers[: self._start] = self._past[: self._start]
            self._past = common.cache.layers[: keep + 1]  # below where the next pass begins
            past = spread_over(
                common, [groups.index(r.group) if r.group in groups else None for r in self._rows]
            )
        rest = [row.prefix[len(self._openings[row.group]) :] for row in self._rows]
        with self._pass(1, keep):
            extend(self._model, self._anatomy, past, rest, until)

    @contextmanager
    def _pass(self, number: int, keep: int) -> Iterator[None]:
        """Blocks below the start hand through what was given before; what block ``keep`` gives is kept."""
        given: list[Any] = []

        def note(_module: nn.Module, _args: object, output: Any) -> None:
            given.append(_copied(output))  # the block above may write into it

        blocks = self._anatomy.blocks
        before = self._given[number]
        with (
            listening(blocks[keep], note) if keep >= 0 else nullcontext(),
            stand_in(blocks[: self._start], lambda _: lambda *args, **kwargs: before),
        ):
            yield
        self._given[number] = given[-1] if given else None


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if isinstance(output, tuple | list) else output
