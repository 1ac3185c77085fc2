"""base + Σ B A as an exact real number, rounded once: the arithmetic under every build.

Promises: each entry of `round_sum` is the float32, bfloat16 or float16 nearest (ties to even) to
the exact sum of the base's entry and all float32 products, so the bytes depend on nothing but the
numbers themselves: no thread count, order of patches, blocking, library or machine.

How, tile by tile: a float64 product T, and a bound E on its error from the textbook analysis of inner
products (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §3.1: any order of summing
n numbers errs by at most γ_n Σ|terms|, γ_n = n u / (1 - n u)), with Σ|b_i a_i| ≤ ‖b‖ ‖a‖. Where
T - E and T + E round alike, so does all between them. The few entries where they do not are summed
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchkit.errors import BadInput

if TYPE_CHECKING:
    from patchkit.factors import Delta

__all__ = ["FORMATS", "Format", "materialise", "round_sum"]

_UNIT = 2.0**-53  # float64's unit roundoff
_TILE_ROWS, _TILE_COLUMNS = 256, 1024
_MAX_FACTOR = 1 << 22  # entries of one factor's tile in float64: 32 MiB
_MAX_TERMS = 1 << 18  # terms of exact sums held at once as Python's numbers: 8 MiB


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format.

    ``digits`` of significand (the hidden bit too); 2^``lowest`` is the smallest subnormal; ``largest`` is the
    largest finite number; ``widen``: the part of |T| by which the conversion from float64 may err before its
    last rounding (bfloat16 and float16 are reached through float32); ``tiny``: below it, two conversions
    of a tight interval prove nothing, because an intermediate float32 is itself subnormal or is zero.
    """

    digits: int
    lowest: int
    largest: float
    widen: float
    tiny: float
    bits: torch.dtype


FORMATS = {
    torch.float32: Format(24, -149, (2 - 2.0**-23) * 2.0**127, 0.0, 2.0**-148, torch.int32),
    torch.bfloat16: Format(8, -133, (2 - 2.0**-7) * 2.0**127, 2.0**-22, 2.0**-120, torch.int16),
    torch.float16: Format(11, -24, 65504.0, 2.0**-22, 2.0**-24, torch.int16),
}


def materialise(base: Tensor, deltas: Sequence[Delta], name: str = "the tensor") -> Tensor:
    """The weight that a build holds: the exact base + Σ ΔW, rounded once to the base's dtype.

    ``base`` as the checkpoint stores it, [d_out, d_in] or (Conv1D) [d_in, d_out]; updates marked
    ``transposed`` are turned here. `BadInput` begins with ``name``.
    """
    low: list[tuple[Tensor, Tensor]] = []
    dense: list[Tensor] = []
    for delta in deltas:
        if tuple(base.shape) != (delta.shape[::-1] if delta.transposed else delta.shape):
            wanted = f"{list(base.shape)}, the patch is for {list(delta.shape)}"
            raise BadInput(f"{name}: its shape is {wanted}{' transposed' * delta.transposed}; wrong base?")
        if delta.B is not None and delta.A is not None:
            low.append((delta.A.T, delta.B.T) if delta.transposed else (delta.B, delta.A))
        elif delta.dense is not None:
            dense.append(delta.dense.T if delta.transposed else delta.dense)
    try:
        return round_sum(base, low, dense)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def round_sum(
    base: Tensor, products: Sequence[tuple[Tensor, Tensor]], matrices: Sequence[Tensor] = ()
) -> Tensor:
    """The exact base + Σ left right + Σ matrices, each entry rounded once to the base's dtype.

    ``base`` [m, n] float32, bfloat16 or float16; each product (left [m, r], right [r, n]) and each of
    ``matrices`` [m, n] float32; all on the CPU.
    An entry to which exactly nothing is added keeps its bits (-0.0 stays). `BadInput` when the base
    holds NaN or infinity, or when an entry would be infinite. Memory: the result and a few tiles.
    """
    form = FORMATS.get(base.dtype)
    if form is None:
        raise BadInput(f"is stored as {base.dtype}; only float32, bfloat16 and float16 can be edited")
    base = base.detach()
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    rank = sum(left.shape[1] for left, _ in products)
    width = max(16, min(_TILE_COLUMNS, _MAX_FACTOR // max(rank, 1)))
    height = max(16, min(_TILE_ROWS, _MAX_FACTOR // max(rank, 1)))
    for first in range(0, base.shape[1], width):
        columns = slice(first, first + width)
        A = _joined([right[:, columns] for _, right in products], 0, base[:0, columns])
        for top in range(0, base.shape[0], height):
            rows = slice(top, top + height)
            tile = _Tile(
                base[rows, columns],
                _joined([left[rows] for left, _ in products], 1, base[rows, :0]),
                A,
                [matrix[rows, columns] for matrix in matrices],
                form,
            )
            result[rows, columns] = tile.rounded()
    return result


def _joined(parts: list[Tensor], dim: int, empty: Tensor) -> Tensor:
    return torch.cat(parts, dim).double() if parts else empty.double()


@dataclass(frozen=True, slots=True)
class _Tile:
    """One tile of the sum: W [m, n] as stored, B [m, R] and A [R, n] in float64, D's [m, n] float32."""

    base: Tensor
    B: Tensor
    A: Tensor
    dense: list[Tensor]
    form: Format

    def rounded(self) -> Tensor:
        total, bound = self._bounded_sum()
        magnitude = total.abs()
        smallest, largest = (edge.item() for edge in torch.aminmax(magnitude))
        if not largest < self.form.largest / 2:  # also when it is NaN
            self._check_finite(total)
        bound.add_(magnitude, alpha=self.form.widen)
        low, high = (total - bound).to(self.base.dtype), (total + bound).to(self.base.dtype)
        unsure = low.view(self.form.bits) != high.view(self.form.bits)
        if smallest < self.form.tiny:
            unsure |= magnitude < self.form.tiny
        if not largest < self.form.largest / 2:
            unsure |= ~torch.isfinite(low)
        if unsure.any():
            self._settle(low, bound, unsure)
        return low

    def _bounded_sum(self) -> tuple[Tensor, Tensor]:
        """T and E, float64: the exact sum lies strictly within T ± E, or is T where E is zero."""
        total = torch.addmm(self.base.double(), self.B, self.A)
        mass = torch.outer(self.B.norm(dim=1), self.A.norm(dim=0))  # ≥ Σ|b a|, but for its own rounding
        for matrix in self.dense:
            total.add_(matrix)
            mass.add_(matrix.abs())
        # |W| ≤ |T| + mass + |error|, so Σ|terms| ≤ |T| + 2 mass + |error|. The second factor 2 outweighs
        # the rounding of the norms, of E itself, and of T ± E.
        terms = self.A.shape[0] + len(self.dense) + 8
        bound = mass.mul_(2).add_(total.abs()).mul_(2 * terms * _UNIT)
        return total, bound

    def _check_finite(self, total: Tensor) -> None:
        if not torch.isfinite(self.base).all():
            raise BadInput("holds NaN or infinity already; get the checkpoint again")
        if not torch.isfinite(total).all():
            raise BadInput("would hold NaN or infinity with these patches; one of them is broken")

    def _settle(self, result: Tensor, bound: Tensor, unsure: Tensor) -> None:
        """Put the right bits where the interval T ± E did not decide."""
        rows, columns = unsure.nonzero(as_tuple=True)
        still = bound[rows, columns] == 0  # W and every term are zero: the sign is the base's
        result[rows[still], columns[still]] = self.base[rows[still], columns[still]]
        rows, columns = rows[~still], columns[~still]
        step = max(1, _MAX_TERMS // (self.A.shape[0] + len(self.dense) + 1))
        for start in range(0, len(rows), step):
            i, j = rows[start : start + step], columns[start : start + step]
            exact = [_nearest_sum(terms, self.form) for terms in self._terms(i, j)]
            result[i, j] = torch.tensor(exact, dtype=torch.float64, device="cpu").to(result.dtype)

    def _terms(self, i: Tensor, j: Tensor) -> list[list[float]]:
        """For each entry (i, j): W, then every product (exact in float64: 24 + 24 bits), then every D."""
        parts = [self.base[i, j, None].double(), self.B[i] * self.A[:, j].T]
        parts += [matrix[i, j, None].double() for matrix in self.dense]
        terms: list[list[float]] = torch.cat(parts, 1).tolist()
        return terms


def _nearest_sum(terms: list[float], form: Format) -> float:
    """The exact sum of ``terms`` (the base's entry first), rounded once, half to even, to ``form``."""
    total = math.fsum(terms)  # the exact sum, rounded to float64: not yet to be rounded again
    if total == 0:
        return terms[0] if terms[0] == 0 else 0.0
    rest = math.fsum([*terms, -total])
    if rest and math.frexp(total)[0] * 2**53 % 2 == 0:
        # Round to odd: a last bit of 1 remembers that something was cut off, and on which side, so that
        # rounding again to at least two digits fewer is right (Boldo & Melquiond 2008).
        total = math.nextafter(total, math.copysign(math.inf, rest))
    return _nearest(total, form)


def _nearest(value: float, form: Format) -> float:
    exponent = max(math.frexp(value)[1] - form.digits, form.lowest)
    rounded = math.ldexp(round(math.ldexp(value, -exponent)), exponent)  # both scalings are exact
    if abs(rounded) > form.largest:
        raise BadInput("would overflow its dtype with these patches; one of them is broken")
    return math.copysign(rounded, value)
