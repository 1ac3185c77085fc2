"""Patches joined into one, taken apart again, and scaled: algebra that asks neither a model nor C.

A joined patch (method `squash`) holds the factors of its parts side by side, so its ΔW is the sum of
theirs. Each part keeps the keys, solved keys and residuals that it was solved with, on its own: the
closed form of `Patch.without` holds inside a part and not across parts, so facts leave part by part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution, terms_of
from patchkit.algebra.rounding import round_sum
from patchkit.errors import BadInput
from patchkit.facts import with_own_ids
from patchkit.patch import SCALE, SQUASH, break_even, parts_in

__all__ = ["joined", "parts_of", "scale_of", "scaled", "without"]


def joined(patches: Sequence[Patch]) -> Patch:
    """One patch whose ΔW is Σ ΔW of ``patches``; facts and terms in their order, parts of parts laid open.
    Facts lose an id that several of them have.

    Keys are kept where every patch has them; a weight that one of them does not change has zeros there.
    Past the break-even the sum is stored multiplied out, each entry rounded once to float32. `BadInput`
    where two patches stand on different bases or read a weight in two ways.
    """
    first = patches[0]
    for patch in patches[1:]:
        if patch.base != first.base:
            raise BadInput(f"{patch.name}: stands on another base than {first.name}; refit it onto that one")
    names = list(dict.fromkeys(name for patch in patches for name in patch.deltas))
    kept = all(patch.solution is not None for patch in patches)
    deltas = {name: _sum(patches, name, padded=kept) for name in names}
    entries = [entry for patch in patches for entry in _entries(patch)]
    inside = {patch.id for patch in patches} | {entry["id"] for entry in entries}
    return Patch(
        facts=with_own_ids([fact for patch in patches for fact in patch.facts]),
        deltas=deltas,
        base=first.base,
        method=SQUASH,
        recipe={"parts": entries},
        solved_on=tuple(id_ for patch in patches for id_ in patch.solved_on if id_ not in inside),
        solution=_solution(patches, deltas) if kept else None,
    )


def parts_of(patch: Patch) -> list[Patch]:
    """The patches that a joined one was made of, as it holds them now; any other patch is its own one part.

    `BadInput` where it holds no keys: then nothing says whose each term is.
    """
    if patch.method != SQUASH:
        return [patch]
    if patch.solution is None:
        raise BadInput(f"{patch.name}: its keys are not there, so its parts cannot be told apart")
    entries = _entries(patch)
    if sum(entry["facts"] for entry in entries) != len(patch.facts):
        raise BadInput(f"{patch.name}: its parts do not count its facts; restore the patch")
    parts, start = [], 0
    for entry in entries:
        rows = slice(start, start := start + entry["facts"])
        parts.append(_part(patch, entry, rows))
    return parts


def without(patch: Patch, dropped: Collection[int]) -> Patch:
    """A joined patch with facts taken out (counted from 0), each part solved again without its own.

    What is left of one part alone is that part's patch.
    """
    left, start = [], 0
    for part in parts_of(patch):
        own = {place - start for place in dropped if start <= place < start + len(part.facts)}
        start += len(part.facts)
        if len(own) < len(part.facts):
            left.append(part.without(own))
    return left[0] if len(left) == 1 else joined(left)


def scale_of(recipe: Mapping[str, Any], name: str) -> float:
    """What a patch's ΔW was multiplied by since it was solved; `BadInput`, with the patch's ``name``."""
    value = recipe.get(SCALE, 1.0)
    try:
        found = 0.0 if isinstance(value, (bool, str)) else float(value)
    except (TypeError, OverflowError):
        found = 0.0
    if not math.isfinite(found) or found == 0:
        raise BadInput(f"{name}: the {SCALE} in its recipe is not a number that scales; restore the patch")
    return found


def scaled(patch: Patch, factor: float) -> Patch:
    """The patch with ΔW times ``factor``; its recipe says so (``scale``, all factors multiplied).

    Residuals take the factor, keys stay, so facts can be taken out as before. `BadInput` for a factor
    of 0 or one that leaves float32.
    """
    if not math.isfinite(factor) or factor == 0:
        raise BadInput(
            f"a scale of {factor:g} leaves no patch; take it back instead, or choose another scale"
        )
    dense = any(delta.dense is not None for delta in patch.deltas.values())
    if dense and patch.solution is None and patch.left_out:
        raise BadInput(
            f"{patch.name}: its keys were not shipped, and its residuals, which they hold, have to be scaled "
            "too; put its keys.safetensors beside it"
        )
    solution = patch.solution
    if solution is not None:
        residuals = {name: _times(rows, factor) for name, rows in solution.residuals.items()}
        solution = replace(solution, residuals=residuals)
    return replace(
        patch,
        deltas={name: _scaled_delta(patch, name, solution, factor) for name in patch.deltas},
        recipe=_scaled_recipe(patch, factor),
        solution=solution,
    )


def _scaled_delta(patch: Patch, name: str, solution: Solution | None, factor: float) -> Delta:
    """``solution``: with its residuals scaled. A dense update stays the rounded product of its terms."""
    delta = patch.deltas[name]
    if delta.B is None or delta.A is None:
        assert delta.dense is not None
        if solution is not None and patch.method != SQUASH:
            solved, residuals = solution.solved[name], solution.residuals[name]
            return Delta(residuals.T, solved, transposed=delta.transposed).compact()
        return Delta(dense=_times(delta.dense, factor), transposed=delta.transposed)
    return Delta(_times(delta.B, factor), delta.A, transposed=delta.transposed)


def _times(rows: Tensor, factor: float) -> Tensor:
    found = (rows.double() * factor).float()
    if not found.isfinite().all() or bool((found == 0).all()) != bool((rows == 0).all()):
        raise BadInput(f"a scale of {factor:g} leaves the range of float32; choose one nearer to 1")
    return found


def _scaled_recipe(patch: Patch, factor: float) -> dict[str, Any]:
    def times(recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**recipe, SCALE: scale_of(recipe, patch.name) * factor}

    if patch.method != SQUASH:
        return times(patch.recipe)
    return {"parts": [{**entry, "recipe": times(entry["recipe"])} for entry in _entries(patch)]}


def _entries(patch: Patch) -> list[dict[str, Any]]:
    """How each part was made, as the recipe of a joined patch holds it."""
    if patch.method == SQUASH:
        return parts_in(patch.recipe, patch.name)
    return [
        {
            "facts": len(patch.facts),
            "id": patch.id,
            "method": patch.method,
            "recipe": patch.recipe,
            "solved_on": list(patch.solved_on),
        }
    ]


def _sum(patches: Sequence[Patch], name: str, *, padded: bool) -> Delta:
    """Σ ΔW of one weight: factors side by side, or multiplied out where that is smaller.

    ``padded``: a patch that leaves the weight alone still gives a term of zeros for each of its facts.
    """
    deltas = [patch.deltas[name] for patch in patches if name in patch.deltas]
    if len({(delta.shape, delta.transposed) for delta in deltas}) > 1:
        raise BadInput(f"{name}: the patches do not agree on its shape; they cannot be joined")
    (d_out, d_in), transposed = deltas[0].shape, deltas[0].transposed
    factors = list(_factors(patches, name, d_out, d_in, padded=padded))
    dense = [delta.dense for delta in deltas if delta.dense is not None]
    if not dense and sum(B.shape[1] for B, _ in factors) <= break_even(d_out, d_in):
        return Delta(
            torch.cat([B for B, _ in factors], 1), torch.cat([A for _, A in factors]), None, transposed
        )
    zero = torch.zeros(d_out, d_in, dtype=torch.float32, device="cpu")
    return Delta(dense=round_sum(zero, factors, dense), transposed=transposed)


def _factors(
    patches: Sequence[Patch], name: str, d_out: int, d_in: int, *, padded: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for patch in patches:
        delta = patch.deltas.get(name)
        if delta is None and padded:
            yield torch.zeros(d_out, len(patch.facts)), torch.zeros(len(patch.facts), d_in)
        elif delta is not None and delta.B is not None and delta.A is not None:
            yield delta.B, delta.A


def _solution(patches: Sequence[Patch], deltas: Mapping[str, Delta]) -> Solution:
    """Targets, keys and the terms that a dense update hides; rows of zeros for weights left alone."""
    targets = [patch.solution.targets for patch in patches if patch.solution is not None]
    if len({rows.shape[1] for rows in targets}) > 1:
        raise BadInput("the patches' targets are not of one width; they cannot be joined")
    terms = {name: [_rows(patch, name, delta.shape) for patch in patches] for name, delta in deltas.items()}
    dense = [name for name, delta in deltas.items() if delta.dense is not None]
    return Solution(
        torch.cat(targets),
        keys={name: torch.cat([keys for keys, _, _ in rows]) for name, rows in terms.items()},
        solved={name: torch.cat([solved for _, solved, _ in terms[name]]) for name in dense},
        residuals={name: torch.cat([rows for _, _, rows in terms[name]]) for name in dense},
    )


def _rows(patch: Patch, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [N, d_in], solved keys [N, d_in] and residuals [N, d_out] of one weight."""
    assert patch.solution is not None
    count, (d_out, d_in) = len(patch.facts), shape
    if name not in patch.deltas:
        return torch.zeros(count, d_in), torch.zeros(count, d_in), torch.zeros(count, d_out)
    return patch.solution.keys[name], *terms_of(patch.deltas[name], name, patch.solution)


def _part(patch: Patch, entry: Mapping[str, Any], rows: slice) -> Patch:
    assert patch.solution is not None
    deltas, keys = {}, {}
    for name, delta in patch.deltas.items():
        solved, residuals = (term[rows] for term in terms_of(delta, name, patch.solution))
        if solved.any() or residuals.any():  # else the part leaves this weight alone
            deltas[name] = Delta(residuals.T, solved, transposed=delta.transposed)
            keys[name] = patch.solution.keys[name][rows]
    return Patch(
        facts=patch.facts[rows],
        deltas=deltas,
        base=patch.base,
        method=entry["method"],
        recipe=dict(entry["recipe"]),
        solved_on=tuple(entry["solved_on"]),
        solution=Solution(patch.solution.targets[rows], keys),
    )
