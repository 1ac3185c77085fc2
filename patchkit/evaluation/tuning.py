"""What a recipe is tuned by: which settings are tried, in which order, and which of two is better.

One setting at a time, the cheapest and strongest first. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.editing.recipe import Recipe, format_layers
from patchkit.evaluation.intervals import WHOLE, Interval, Tally, intervals
from patchkit.evaluation.metrics import METRICS

__all__ = [
    "MARGIN",
    "OF_THE_SOLVE",
    "SHOWN",
    "Knob",
    "better",
    "knobs",
    "merit",
    "peak",
    "scores_of",
    "shown",
]

SHOWN = ("ES", "PS", "NS", "S", "paraphrase argmax")
WEIGHT = 0.25
"""Of the paraphrases answered token for token, beside S: near its ceiling S tells little apart."""
MARGIN = 0.005
"""By how much a trial has to be better to take over: less is what other facts would undo."""

OF_THE_SOLVE = ("lambda", "shrinkage")
"""The settings that no target depends on."""

_SHRINKAGES, _CURVATURES = (0.0, 0.15), (0.0, 0.5)
_LAMBDAS, _RATES, _CLAMPS, _STOPS = (1 / 15, 1 / 5, 3), (0.4, 1.5), (2 / 3, 4 / 3), (0.5, 2)


@dataclass(frozen=True)
class Knob:
    """A setting: its name in a recipe, and the values that are tried."""

    name: str
    values: tuple[Any, ...]


def knobs(recipe: Recipe, depth: int, middle: Callable[[], int | None]) -> Iterator[Knob]:
    """The settings of a method that searches targets, in the order in which they are tried.

    Those of the solve first: they need no new search. ``middle`` says around which layer tracing found most;
    it is asked when the layers' turn has come.
    """
    if recipe.reads("lambda"):
        yield _around("lambda", recipe.lambda_, _LAMBDAS)
    if recipe.reads("shrinkage"):
        yield Knob("shrinkage", tuple(share for share in _SHRINKAGES if share != recipe.shrinkage))
    yield Knob("layers", _windows(recipe.layers, depth, middle()))
    yield Knob("curvature", tuple(power for power in _CURVATURES if power != recipe.curvature))
    yield _around("learning_rate", recipe.learning_rate, _RATES)
    yield Knob("contexts", tuple(count for count in (5, 10) if count != recipe.contexts))
    yield _around("clamp", recipe.clamp, _CLAMPS)
    if recipe.stop_loss:
        yield _around("stop_loss", recipe.stop_loss, _STOPS)


def _around(name: str, value: float, factors: Sequence[float]) -> Knob:
    """Round numbers at these multiples of ``value``."""
    return Knob(name, tuple(float(f"{value * factor:.1g}") for factor in factors))


def _windows(layers: Sequence[int], depth: int, middle: int | None) -> tuple[tuple[int, ...], ...]:
    """As many layers, around the traced middle and ending there; without a trace, two lower and two higher.

    The last block is left out: behind it there is no attention left that could read the edit.
    """
    count = len(layers)
    starts = [layers[0] - 2, layers[0] + 2] if middle is None else [middle - count // 2, middle - count + 1]
    highest = max(0, depth - 1 - count)
    fitting = dict.fromkeys(min(max(start, 0), highest) for start in starts)
    found = [tuple(range(start, start + count)) for start in fitting]
    return tuple(window for window in found if window != tuple(layers))


def peak(effects: Sequence[float], reach: range) -> int:
    """The layer of the highest effect among the centres of ``reach``.

    A window that holds layer 0 gives back what the noise took from the embeddings, in any model: those
    centres are no part of it.
    """
    return max(reach, key=lambda layer: effects[layer])


def scores_of(counts: Tally, seed: int) -> dict[str, Interval]:
    """The scores of one trial that choose and are shown, as shares."""
    found = intervals(counts, list(METRICS), seed)
    return {name: found[name] for name in SHOWN}


def merit(scores: Mapping[str, Interval]) -> float:
    """What is to be highest: S, and a quarter of the paraphrases that are answered token for token."""
    return scores[WHOLE].value + WEIGHT * scores["paraphrase argmax"].value


def better(scores: Mapping[str, Interval], than: Mapping[str, Interval]) -> bool:
    """Whether a trial takes over from another."""
    return merit(scores) > merit(than) + MARGIN


def shown(name: str, value: Any) -> str:
    """A field's value as a person reads it: layers 4, 5 and 6 as "4-6"."""
    if name == "layers":
        return format_layers(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
