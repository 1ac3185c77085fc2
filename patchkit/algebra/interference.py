"""Interference: what other patches do to the keys of a fact, against what its own patch wants there.

A patch changes a weight by ΔW so that the fact's key k gives its residual r more than before. Another
patch's ΔW' adds ΔW' k to the same output, where nothing was wanted of it: ‖ΔW' k‖ / ‖r‖ says how much, in
units of the edit itself. From stored factors and keys alone: no statistics, no model, no forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.algebra.closed_forms import residuals
from patchkit.algebra.factors import Delta, Patch, terms_of
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.patch import SQUASH, parts_in

__all__ = ["Interference", "exact_terms_of", "interference", "residuals_of"]


@dataclass(frozen=True)
class Interference:
    """What others do to one fact; infinite where its own residual is zero and theirs is not.

    ``by_weight``: weight name -> ‖ΔW' k‖ / ‖r‖, for each weight that the fact's patch changes. ``overall``:
    the same over all of them, √Σ‖ΔW' k‖² / √Σ‖r‖².
    """

    fact: Fact
    by_weight: dict[str, float]
    overall: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null stands for it."""
        return {
            "prompt": self.fact.text,
            "target": self.fact.target,
            "overall": _finite(self.overall),
            "by_weight": {name: _finite(value) for name, value in self.by_weight.items()},
        }


def interference(patch: Patch, others: Sequence[Patch]) -> list[Interference]:
    """What ``others`` together do to each fact of ``patch``, in the order of its facts; float64.

    Others that change none of its weights do nothing. `BadInput` where the patch has no keys (its editor
    keeps none, or they were not shipped).
    """
    if patch.solution is None:
        why = "its keys were not shipped" if patch.left_out else f"{patch.method} keeps no keys"
        raise BadInput(f"{patch.name}: {why}, so interference with it cannot be measured")
    moved, wanted = {}, {}
    for name in patch.deltas:
        K = patch.solution.keys[name].double()
        moved[name] = torch.linalg.vector_norm(_moved(K, name, others, patch.deltas[name].shape[0]), dim=1)
        wanted[name] = torch.linalg.vector_norm(residuals_of(patch, name), dim=1)
    return [
        Interference(
            fact,
            {name: _ratio(float(moved[name][i]), float(wanted[name][i])) for name in moved},
            _ratio(*(math.hypot(*(float(part[name][i]) for name in part)) for part in (moved, wanted))),
        )
        for i, fact in enumerate(patch.facts)
    ]


def residuals_of(patch: Patch, name: str) -> Tensor:
    """The residuals that a weight's update was solved for, [N, d_out] float64, a row for each fact."""
    assert patch.solution is not None
    K = patch.solution.keys[name].double()
    A, B = exact_terms_of(patch, name)
    if patch.method != SQUASH:
        return residuals(patch.method, K, A, B)
    found, start = [], 0
    for part in parts_in(patch.recipe, patch.name):
        rows = slice(start, start := start + part["facts"])
        found.append(residuals(part["method"], K[rows], A[rows], B[rows]))
    return torch.cat(found)


def exact_terms_of(patch: Patch, name: str) -> tuple[Tensor, Tensor]:
    """A weight's rows of A [N, d_in] and columns of B [N, d_out] in float64, a row for each fact."""
    assert patch.solution is not None
    A, B = terms_of(patch.deltas[name], name, patch.solution)
    return A.double(), B.double()


def _moved(K: Tensor, name: str, others: Sequence[Patch], d_out: int) -> Tensor:
    """Σ ΔW' k over the others for the rows k of K [N, d_in]: [N, d_out]."""
    total = torch.zeros(K.shape[0], d_out, dtype=torch.float64)
    for other in others:
        if (delta := other.deltas.get(name)) is not None:
            total += _applied(delta, K, f"{other.name}: {name}")
    return total


def _applied(delta: Delta, K: Tensor, where: str) -> Tensor:
    """ΔW k for the rows k of K, from the factors where there are any: (k Aᵀ) Bᵀ."""
    if delta.shape[1] != K.shape[1]:
        raise BadInput(f"{where} has another shape than the patch that it is compared with")
    if delta.A is not None and delta.B is not None:
        return K @ delta.A.double().T @ delta.B.double().T
    assert delta.dense is not None
    return K @ delta.dense.double().T


def _ratio(moved: float, wanted: float) -> float:
    if wanted == 0:
        return math.inf if moved else 0.0
    return moved / wanted


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
