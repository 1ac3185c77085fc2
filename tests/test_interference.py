"""Interference equals its definition, written out fact by fact with dense matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.algebra.interference import interference
from patchkit.errors import BadInput
from patchkit.facts import Fact

BASE = "sha256:" + "a" * 64
SHAPES = {"low": (7, 11), "high": (5, 9)}


def made(count: int, seed: int, weights: tuple[str, ...] = ("low", "high"), keys: bool = True) -> Patch:
    """A patch; with more facts than a small weight's break-even its update is stored dense."""
    random = torch.Generator().manual_seed(seed)
    deltas, held = {}, {}
    for name in weights:
        d_out, d_in = SHAPES[name]
        deltas[name] = Delta(
            torch.randn(d_out, count, generator=random), torch.randn(count, d_in, generator=random)
        )
        held[name] = torch.randn(count, d_in, generator=random)
    facts = tuple(Fact(f"Person {seed}-{i}", "{} plays", "chess") for i in range(count))
    solution = Solution(torch.randn(count, 5, generator=random), held) if keys else None
    return Patch(facts, deltas, BASE, "memit", {"lambda": 3.0}, (), solution)


def dense(patch: Patch, name: str) -> np.ndarray:
    delta = patch.deltas[name]
    if delta.dense is not None:
        return delta.dense.double().numpy()
    return delta.B.double().numpy() @ delta.A.double().numpy()


def literal(patch: Patch, others: list[Patch], i: int) -> tuple[dict[str, float], float]:
    """‖Σ ΔW' k‖ / ‖r‖ of fact i, by the definition."""
    by_weight, above, below = {}, 0.0, 0.0
    for name in patch.deltas:
        k = patch.solution.keys[name][i].double().numpy()
        moved = sum((dense(o, name) @ k for o in others if name in o.deltas), np.zeros(SHAPES[name][0]))
        delta = patch.deltas[name]
        rows = patch.solution.residuals[name] if delta.B is None else delta.B.T
        r = rows[i].double().numpy()
        by_weight[name] = np.linalg.norm(moved) / np.linalg.norm(r)
        above, below = above + moved @ moved, below + r @ r
    return by_weight, math.sqrt(above / below)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 8), others=st.lists(st.integers(1, 8), max_size=3), seed=st.integers(0, 2**20))
def test_it_is_the_literal_ratio_for_every_fact_and_weight(count: int, others: list[int], seed: int) -> None:
    patch = made(count, seed)
    rest = [made(n, seed + i + 1, ("low",) if i == 1 else ("low", "high")) for i, n in enumerate(others)]
    found = interference(patch, rest)
    assert [item.fact for item in found] == list(patch.facts)
    for i, item in enumerate(found):
        by_weight, overall = literal(patch, rest, i)
        assert item.by_weight == pytest.approx(by_weight, rel=1e-9, abs=1e-12)
        assert item.overall == pytest.approx(overall, rel=1e-9, abs=1e-12)


def test_both_forms_of_an_update_are_met() -> None:
    assert made(8, 0).deltas["low"].dense is not None
    assert made(1, 0).deltas["low"].dense is None


def test_others_are_taken_together() -> None:
    """Two others that undo one another do nothing."""
    patch, other = made(2, 1), made(2, 2)
    undone = Patch(
        other.facts,
        {name: Delta(-d.B, d.A) for name, d in other.deltas.items()},
        BASE,
        "memit",
        {},
        (),
        other.solution,
    )
    assert interference(patch, [other])[0].overall > 0.1
    assert interference(patch, [other, undone])[0].overall < 1e-12


def test_a_fact_that_wants_nothing_is_infinitely_disturbed_or_not_at_all() -> None:
    patch = made(1, 3)
    still = Patch(
        patch.facts,
        {name: Delta(0 * d.B, d.A) for name, d in patch.deltas.items()},
        BASE,
        "memit",
        {},
        (),
        patch.solution,
    )
    (found,) = interference(still, [made(1, 4)])
    assert found.overall == math.inf
    assert found.to_dict()["overall"] is None
    assert interference(still, [])[0].overall == 0


def test_without_keys_it_is_refused_by_name() -> None:
    patch = made(1, 5, keys=False)
    with pytest.raises(BadInput, match=rf"{patch.name}: memit keeps no keys"):
        interference(patch, [made(1, 6)])
