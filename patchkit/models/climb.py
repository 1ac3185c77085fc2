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
from patchkit.models.past import Openings, Row, empty, extend, openings_of

__all__ = ["Climb", "OpeningsClimb"]


class _Way:
    """One pass, again and again: blocks below ``start`` hand through what was given there before."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.start = 0
        self.given: Any = None  # what the block below the start gave
        self._blocks = anatomy.blocks

    @contextmanager
    def up(self, changes: int) -> Iterator[None]:
        """A pass; the next begins at block ``changes``, the lowest whose weights may be others then."""
        given: list[Any] = []

        def note(_module: nn.Module, _args: object, output: Any) -> None:
            given.append(_copied(output))  # the block above may write into it

        before = self.given
        with (
            listening(self._blocks[changes - 1], note) if changes else nullcontext(),
            stand_in(self._blocks[: self.start], lambda _: lambda *args, **kwargs: before),
        ):
            yield
        self.start, self.given = changes, given[-1] if given else None


class OpeningsClimb:
    """The openings of all rows on their way up, once a pass for whatever rows stand behind them."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row]) -> None:
        self.texts = openings_of(model, rows)
        self.kept: list[Any] = []  # their keys and values, block by block
        self._model, self._anatomy, self.way = model, anatomy, _Way(anatomy)

    def run(self, until: int, changes: int) -> Openings:
        """The openings, run through block ``until``; ``changes`` as in `Climb.read`."""
        if not self.texts:
            return Openings(self.texts, empty(self._model, 0))
        start = self.way.start
        with self.way.up(changes):
            openings = Openings.run(self._model, self._anatomy, self.texts, until=until)
        assert openings.past.cache is not None
        layers = openings.past.cache.layers
        layers[:start] = self.kept[:start]
        self.kept = layers[:changes]  # below where the next pass begins
        return openings


class Climb:
    """Rows of texts (their prefixes) on their way up one model, behind their openings."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row]) -> None:
        self._model, self._anatomy, self._rows = model, anatomy, rows
        self.way = _Way(anatomy)

    def read(
        self,
        openings: Openings,
        listen: Callable[[], AbstractContextManager[list[Tensor]]],
        *,
        until: int,
        changes: int,
    ) -> Tensor:
        """What a listener (`reading_inputs(module)`, …) heard last in a pass through block ``until``.

        ``openings`` were run as far. ``changes``: the lowest block whose weights may be others at the next
        call; that pass begins there.
        """
        past, rest = openings.fitting(self._model, self._rows).behind(self._model, self._rows)
        with listen() as heard, self.way.up(changes):
            extend(self._model, self._anatomy, past, rest, until)
        return heard[-1]


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if isinstance(output, tuple | list) else output
