"""Two branches of 32 facts each, merged: their plain union and ``--joint`` against the 64 in one batch.

Each branch is edited on the base by itself, as two people would; the targets z are found once. The
three differ in what is solved together, and in whose wordings are lent: in one batch those of all facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.quality import Tally, difference, interval, tally
from benchmarks.report import Bar, Cell, Effort, Measured
from patchkit.algebra.factors import Patch
from patchkit.algebra.interference import interference
from patchkit.algebra.joint import solve_jointly
from patchkit.evaluation.measure import FactState, compare
from patchkit.fact import Fact

__all__ = ["measure"]

BRANCH = 32
"""Facts on each of the two branches."""

SHOWN = ("ES", "PS", "NS", "S")


def measure(effort: Effort) -> Measured:
    """Odd cases only; what is edited is rounded to the base's dtype, as in a build."""
    size = 3 if effort is Effort.QUICK else BRANCH
    lab = laboratory(effort)
    facts = lab.facts("odd", 2 * size)
    recipe = lab.resolve(lab.default)
    statistics = lab.statistics(recipe)
    before = lab.observe(facts)
    z = lab.targets(facts, recipe, size=size).z
    ours, theirs = (
        lab.patch(facts[part], z[part], recipe, statistics) for part in (slice(size), slice(size, None))
    )
    joint = solve_jointly({"ours": ours, "theirs": theirs})
    batch = lab.patch(facts, z, recipe, statistics)
    ways = {"plain union": (ours, theirs), "joint": tuple(joint.values()), "one batch": (batch,)}
    tallies = {name: _tally(lab, facts, before, patches) for name, patches in ways.items()}
    rows = [_row(name, tallies[name], ways[name]) for name in ways]
    whole = tallies["one batch"]
    rows += [_apart(f"{name} less one batch", tallies[name], whole) for name in ("plain union", "joint")]
    bars = [Bar("joint: S less one batch's, points", difference(tallies["joint"], whole)["S"].value, -1.0)]
    note = f"Two branches of {size} CounterFact-R facts. Disturbance: the median over facts of ‖ΔW k‖ / ‖r‖."
    return Measured(rows, bars, [note])


def _tally(
    lab: Laboratory, facts: Sequence[Fact], before: Sequence[FactState], patches: Sequence[Patch]
) -> Tally:
    return tally(compare(facts, before, lab.observe_with(facts, patches)))


def _row(name: str, counts: Tally, patches: Sequence[Patch]) -> Mapping[str, Cell]:
    scores = interval(counts)
    return {
        "facts": name,
        **{score: round(scores[score].value, 1) for score in SHOWN},
        "disturbance": _disturbance(patches) if len(patches) > 1 else None,
    }


def _apart(name: str, one: Tally, other: Tally) -> Mapping[str, Cell]:
    """The differences in points, with their 95 % intervals."""
    found = difference(one, other)
    told = {
        score: f"{found[score].value:+.1f} ({found[score].low:+.1f} to {found[score].high:+.1f})"
        for score in SHOWN
    }
    return {"facts": name, **told, "disturbance": None}


def _disturbance(patches: Sequence[Patch]) -> float:
    """The median over all facts of what the other branch does to their keys."""
    one, other = patches
    found = [*interference(one, [other]), *interference(other, [one])]
    return float(torch.tensor([item.overall for item in found]).median())
