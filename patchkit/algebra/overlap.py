"""The interference between all patches of a stack at once: what each does to the facts of every other.

The measure is `interference.interference`'s, ‖ΔW k‖ / ‖r‖ over all weights; here all keys are
multiplied together, so that n patches cost n steps and not n².
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch
from patchkit.algebra.interference import residuals_of

__all__ = ["incomparable", "pairwise"]


def incomparable(patches: Iterable[Patch]) -> str | None:
    """Why the patches' numbers cannot be put together."""
    shapes: dict[str, tuple[int, int]] = {}
    for patch in patches:
        for name, delta in patch.deltas.items():
            if shapes.setdefault(name, delta.shape) != delta.shape:
                return f"{patch.name}: {name} has another shape than in the other patches"
    return None


def pairwise(patches: Mapping[str, Patch]) -> dict[str, dict[str, float] | None]:
    """For each patch what every other one does to the fact of it that is disturbed most (overall).

    None for a patch without keys. All keys are multiplied at once, so n patches cost n steps.
    """
    keyed = {name: patch for name, patch in patches.items() if patch.solution is not None}
    found: dict[str, dict[str, float] | None] = {name: {} if name in keyed else None for name in patches}
    keys = {name: _keys(patch) for name, patch in keyed.items()}
    residuals = {name: _pooled(_residuals(patch)) for name, patch in keyed.items()}
    weights = sorted({weight for rows in keys.values() for weight in rows})
    joined = {w: torch.cat([rows[w] for rows in keys.values() if w in rows]) for w in weights}
    for name, other in patches.items():
        squares = {weight: values.square() for weight, values in _moved(other, joined).items()}
        at = dict.fromkeys(weights, 0)
        for patch, rows in keys.items():
            total = torch.zeros(len(keyed[patch].facts), dtype=torch.float64)
            for weight in rows:
                total += squares[weight][at[weight] : at[weight] + len(total)]
                at[weight] += len(total)
            row = found[patch]
            if patch != name and row is not None:
                row[name] = float(_ratio(total.sqrt(), residuals[patch]).max())
    return found


def _keys(patch: Patch) -> dict[str, Tensor]:
    """By weight [N, d_in]."""
    assert patch.solution is not None
    return {name: rows.double() for name, rows in patch.solution.keys.items()}


def _residuals(patch: Patch) -> dict[str, Tensor]:
    """By weight ‖r‖ of each fact [N]."""
    return {name: residuals_of(patch, name).norm(dim=1) for name in patch.deltas}


def _moved(other: Patch, keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """‖ΔW k‖ of each key [N]; zero in weights that ``other`` leaves alone."""
    return {
        name: _products(other.deltas[name], rows).norm(dim=1)
        if name in other.deltas
        else torch.zeros(len(rows), dtype=torch.float64)
        for name, rows in keys.items()
    }


def _products(delta: Delta, keys: Tensor) -> Tensor:
    """ΔW k as rows [N, d_out], through the factors where there are any."""
    if delta.B is not None and delta.A is not None:
        return keys @ delta.A.double().T @ delta.B.double().T
    assert delta.dense is not None
    return keys @ delta.dense.double().T


def _pooled(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).square().sum(0).sqrt()


def _ratio(moved: Tensor, residual: Tensor) -> Tensor:
    """0 where nothing is moved, infinite where a fact without a residual is."""
    return torch.where(moved == 0, torch.zeros_like(moved), moved / residual)
