"""Where the time of the search for targets goes: operators of the engine by their own time, and padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.laboratory import laboratory
from benchmarks.machine import one_thread
from benchmarks.recipe import published
from benchmarks.report import Effort, Measured
from patchkit.editing import targets
from patchkit.models.replay import Tail

__all__ = ["measure"]

STEPS = 4
"""Of each search: a profile of a whole one takes many minutes to add up, and its steps are alike."""

_KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "softmax"),
    "copies, and putting together": (
        "copy_",
        "cat",
        "clone",
        "index",
        "gather",
        "scatter",
        "stack",
        "fill_",
        "zero_",
    ),
    "element by element": (
        "mul",
        "add",
        "sub",
        "div",
        "neg",
        "silu",
        "gelu",
        "tanh",
        "pow",
        "rsqrt",
        "exp",
        "sigmoid",
    ),
    "sums and means": ("sum", "mean", "norm", "logsumexp", "max", "argmax"),
}


def measure(effort: Effort) -> Measured:
    """Shares of the search's own processor time, in percent, for the published search and the default one."""
    lab = laboratory(effort)
    facts = lab.facts("even", 4 if effort is Effort.QUICK else 8)
    shares, notes = {}, []
    for name, plain in {"published": published(lab), "default": lab.default}.items():
        recipe = lab.resolve(plain).override(steps=STEPS)
        with one_thread(), _captured() as masks, profile(activities=[ProfilerActivity.CPU]) as seen:
            lab.targets(facts, recipe)
        shares[name] = _shares(seen)
        padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        notes.append(f"{name}: {100 * padding:.1f} % of the tokens that are computed are padding.")
    rows = [
        {"operators": kind, **{name: round(found[kind], 1) for name, found in shares.items()}}
        for kind in (*_KINDS, "other")
    ]
    return Measured(rows, (), [f"{len(facts)} facts, on one thread.", *notes])


def _shares(seen: profile) -> dict[str, float]:
    """Percent of the time by kind; what calls another operator counts for what it does itself."""
    spent = dict.fromkeys([*_KINDS, "other"], 0.0)
    for event in seen.key_averages():
        spent[_kind(event.key)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: 100 * time / whole for kind, time in spent.items()}


def _kind(operator: str) -> str:
    name = operator.removeprefix("aten::")
    for kind, stems in _KINDS.items():
        if any(name == stem or (len(stem) > 3 and stem in name) for stem in stems):
            return kind
    return "other"


@contextmanager
def _captured() -> Iterator[list[Tensor]]:
    """The masks, true where a token stands, of all rows that the search makes ready meanwhile."""
    masks: list[Tensor] = []
    capture = targets.capture

    def seen(*args: Any, **options: Any) -> Tail:
        tail = capture(*args, **options)
        masks.append(tail.mask)
        return tail

    with mock.patch.object(targets, "capture", seen):
        yield masks
