"""Targets z: the engine against the published way of working, with the same optimiser and steps.

The sequential reference is ``tests/reference_memit.py``: one fact at a time, the whole model, the
head at all positions, torch's own Adam.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.machine import matrix_rate, one_thread
from benchmarks.recipe import published
from benchmarks.references import reference_memit
from benchmarks.report import Bar, Effort, Measured
from patchkit.editing.recipe import Recipe
from patchkit.fact import Fact

__all__ = ["measure", "reference_seconds"]

FACTS = 32


def measure(effort: Effort) -> Measured:
    """Both in turn, so that a machine that slows down slows both; medians of three turns.

    The reference takes 20 s a fact, so each turn gives it other facts of the 32: one, or with
    --full a third of them.
    """
    lab = laboratory(effort)
    facts = lab.facts("even", 6 if effort is Effort.QUICK else FACTS)
    recipe = lab.resolve(published(lab))
    each = len(facts) // 3 if effort is Effort.FULL else 1
    ratios, engine, sequential, differences, rates = [], [], [], [], []
    for turn in range(3):
        found = lab.targets(facts, recipe)
        places = range(turn * each, (turn + 1) * each)
        rates.append(matrix_rate())  # in each turn: it wanders as they do
        seconds, z = reference_seconds(lab, [facts[i] for i in places], recipe)
        engine.append(found.seconds)
        sequential.append(seconds)
        ratios.append(seconds / found.seconds)
        differences += [float((found.z[i] - z[n]).norm() / z[n].norm()) for n, i in enumerate(places)]
    with one_thread(), FlopCounterMode(display=False) as counter:
        counted = lab.targets(facts, recipe)
    operations = counter.get_total_flops() / len(facts)
    shares = [operations / seconds / rate for seconds, rate in zip(engine, rates, strict=True)]
    share = statistics.median(shares)
    rows = [
        {"measured": "sequential reference, s a fact", "median": statistics.median(sequential)},
        {"measured": "engine, s a fact", "median": statistics.median(engine)},
        {"measured": "times faster", "median": statistics.median(ratios)},
        {"measured": "largest relative difference of z", "median": max(differences)},
        {"measured": "loss evaluations a fact", "median": counted.steps},
        {"measured": "engine, GFLOP a fact", "median": operations / 1e9},
        {"measured": "engine, share of the machine's matrix rate", "median": share},
    ]
    bars = [
        Bar("times faster, median of three", statistics.median(ratios), 8.0),
        Bar("largest relative difference of z", max(differences), 1e-3, most=True),
        Bar("share of the machine's matrix rate", share, 0.5),
    ]
    notes = [f"{len(facts)} facts for the engine, {3 * each} of them for the reference."]
    return Measured(rows, bars, notes)


def reference_seconds(lab: Laboratory, facts: list[Fact], recipe: Recipe) -> tuple[float, list[torch.Tensor]]:
    """Seconds a fact of the sequential reference, and its targets."""
    begun = time.perf_counter()
    found = [
        reference_memit.find_target(
            lab.model, lab.tokenizer, lab.anatomy.blocks, fact, recipe, recipe.templates
        )[0]
        for fact in facts
    ]
    return (time.perf_counter() - begun) / len(facts), found
