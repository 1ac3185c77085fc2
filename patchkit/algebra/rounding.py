"""base + Σ B A as an exact real number, rounded once: the arithmetic under every build.

Promises: each entry of `round_sum` is the float32, bfloat16 or float16 nearest (ties to even) to
the exact sum of the base's entry and all float32 products, so the bytes depend on nothing but the
numbers themselves: no thread count, order of patches, blocking, library or machine.

How, tile by tile: a float64 product T, and a bound E on its error from the textbook analysis of inner
products (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §3.1: any order of summing
n numbers errs by at most γ_n Σ|terms|, γ_n = n u / (1 - n u)), with Σ|b_i a_i| ≤ ‖b‖ ‖a‖. Where
all numbers within T ± E round alike, so does the sum. The few entries where they do not are summed again term
by term with a tighter bound, and those that even this leaves open exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchkit.errors import BadInput

if TYPE_CHECKING:
    from patchkit.algebra.factors import Delta

__all__ = ["FORMATS", "Format", "materialise", "round_sum"]

_UNIT = 2.0**-53  # float64's unit roundoff
_TILE_ROWS, _TILE_COLUMNS = 256, 1024
_MAX_FACTOR = 1 << 22  # entries of one factor's tile in float64: 32 MiB
_MAX_TERMS = 1 << 18  # terms of exact sums held at once as Python's numbers: 8 MiB


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format.

    ``digits`` of significand (the hidden bit too); 2^``lowest`` is the smallest subnormal; ``largest`` is the
    largest finite number; ``tiny``: smaller sums are made exactly, whatever a processor does to subnormals;
    ``least``: the smallest number that has all digits, or ``tiny`` where that is larger.
    """

    digits: int
    lowest: int
    largest: float
    tiny: float
    least: float
    bits: torch.dtype


FORMATS = {
    torch.float32: Format(24, -149, (2 - 2.0**-23) * 2.0**127, 2.0**-148, 2.0**-126, torch.int32),
    torch.bfloat16: Format(8, -133, (2 - 2.0**-7) * 2.0**127, 2.0**-120, 2.0**-120, torch.int16),
    torch.float16: Format(11, -24, 65504.0, 2.0**-24, 2.0**-14, torch.int16),
}


def materialise(base: Tensor, deltas: Sequence[Delta], name: str = "the tensor") -> Tensor:
    """The weight that a build holds: the exact base + Σ ΔW, rounded once to the base's dtype.

    ``base`` as the checkpoint stores it, [d_out, d_in] or (Conv1D) [d_in, d_out]; updates marked
    ``transposed`` are turned here. `BadInput` begins with ``name``.
    """
    for delta in deltas:
        if tuple(base.shape) != (delta.shape[::-1] if delta.transposed else delta.shape):
            wanted = f"{list(base.shape)}, the patch is for {list(delta.shape)}"
            raise BadInput(f"{name}: its shape is {wanted}{' transposed' * delta.transposed}; wrong base?")
    return materialise_rows(base, deltas, 0, name)


def materialise_rows(rows: Tensor, deltas: Sequence[Delta], first: int, name: str) -> Tensor:
    """The same for some ``rows``, from number ``first`` on, of a base whose shape is known to fit."""
    chosen = slice(first, first + rows.shape[0])
    low: list[tuple[Tensor, Tensor]] = []
    dense: list[Tensor] = []
    for delta in deltas:
        if delta.B is not None and delta.A is not None:
            left, right = (delta.A.T, delta.B.T) if delta.transposed else (delta.B, delta.A)
            low.append((left[chosen], right))
        elif delta.dense is not None:
            dense.append((delta.dense.T if delta.transposed else delta.dense)[chosen])
    try:
        return round_sum(rows, low, dense)
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
        raise BadInput(
            f"is stored as {base.dtype}; only float32, bfloat16 and float16 can be edited; save the model in "
            "one of them and use that"
        )
    base = base.detach()
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    rank = sum(left.shape[1] for left, _ in products)
    width = max(16, min(_TILE_COLUMNS, _MAX_FACTOR // max(rank, 1)))
    height = max(16, min(_TILE_ROWS, _MAX_FACTOR // max(rank, 1)))
    for first in range(0, base.shape[1], width):
        columns = slice(first, first + width)
        A = _joined([right[:, columns] for _, right in products], 0, base[:0, columns])
        lengths = A.square().sum(0).sqrt_()  # several times faster than norm, down columns
        for top in range(0, base.shape[0], height):
            rows = slice(top, top + height)
            tile = _Tile(
                base[rows, columns],
                _joined([left[rows] for left, _ in products], 1, base[rows, :0]),
                A,
                lengths,
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
    lengths: Tensor
    """‖a_j‖ of A's columns [n]."""
    dense: list[Tensor]
    form: Format

    def rounded(self) -> Tensor:
        total = self.base.double().addmm_(self.B, self.A)
        for matrix in self.dense:
            total.add_(matrix)
        result, unsure = self._by_last_bits(total) or self._between(total, self._bound(total))
        self._settle(result, unsure)
        return result

    @property
    def _terms_in_error(self) -> int:
        return self.A.shape[0] + len(self.dense) + 8

    def _bound(self, total: Tensor) -> Tensor:
        """E, float64: the exact sum lies strictly within T ± E, or is T where E is zero."""
        mass = torch.outer(self.B.norm(dim=1), self.lengths)  # ≥ Σ|b a|, but for its own rounding
        for matrix in self.dense:
            mass.add_(matrix.abs())
        # |W| ≤ |T| + mass + |error|, so Σ|terms| ≤ |T| + 2 mass + |error|. The second factor 2 outweighs
        # the rounding of the norms, of E itself, and of T ± E.
        return mass.mul_(2).add_(total.abs()).mul_(2 * self._terms_in_error * _UNIT)

    def _by_last_bits(self, total: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `_between` gives, in half the passes, for formats reached through float32; None elsewhere.

        Where E ≤ 2^-25 |T|, the float32 nearest to T is within one unit of its last place of the exact sum:
        both round alike, unless the bits that the rounding cuts off are within that of a tie.
        """
        cut = 24 - self.form.digits
        mass = (self.B.norm(dim=1).max() * self.lengths.max()).item() if self.A.shape[0] else 0.0
        mass += sum(matrix.abs().max().item() for matrix in self.dense)
        nearest = total.float()
        magnitude = nearest.abs()
        if not cut or not max(magnitude.max().item(), mass) < self.form.largest / 2:
            return None
        tie = 1 << (cut - 1)
        bits = nearest.view(torch.int32).sub(tie - 2).bitwise_and_((tie << 1) - 1)
        unsure = bits <= 4  # two units to either side
        # E ≤ 2 n u (2 mass + |T|) ≤ 2^-25 |T| from here on, n being far below 2^26
        unsure |= magnitude < max(self._terms_in_error * mass * 2.0**-25, self.form.least)
        return nearest.to(self.base.dtype), unsure

    def _between(self, total: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """What all numbers within T ± E (float64) are rounded to, and where they are not rounded alike."""
        magnitude = total.abs()
        smallest, largest = (edge.item() for edge in torch.aminmax(magnitude))
        if not largest < self.form.largest / 2:  # also when it is NaN
            self._check_finite(total)
        low, high = self._converted(total - bound), self._converted(total + bound)
        unsure = low.view(self.form.bits) != high.view(self.form.bits)
        if smallest < self.form.tiny:
            unsure |= magnitude < self.form.tiny
        if not largest < self.form.largest / 2:
            unsure |= ~torch.isfinite(low)
        return low, unsure

    def _converted(self, exact: Tensor) -> Tensor:
        """float64 in the base's dtype, rounded once.

        bfloat16 and float16 are reached through float32, where what is cut off leaves a last bit of 1 (round
        to odd, Boldo and Melquiond 2008): so the second rounding takes no number for a tie that is none.
        """
        nearest = exact.float()
        if self.base.dtype == torch.float32:
            return nearest
        held = nearest.double()
        bits = nearest.view(torch.int32) - (held.abs() > exact.abs()).int() | (held != exact).int()
        return bits.view(torch.float32).to(self.base.dtype)

    def _check_finite(self, total: Tensor) -> None:
        if not torch.isfinite(self.base).all():
            raise BadInput("holds NaN or infinity already; get the checkpoint again")
        if not torch.isfinite(total).all():
            raise BadInput("would hold NaN or infinity with these patches; one of them is broken")

    def _settle(self, result: Tensor, unsure: Tensor) -> None:
        """Put the right bits where the whole tile's bound did not decide."""
        # NumPy's is faster than torch's where few are: a handful of each tile.
        places = torch.from_numpy(np.flatnonzero(unsure.numpy()))
        rows, columns = places // unsure.shape[1], places % unsure.shape[1]
        step = max(1, _MAX_TERMS // (self.A.shape[0] + len(self.dense) + 1))
        for start in range(0, len(rows), step):
            i, j = rows[start : start + step], columns[start : start + step]
            result[i, j] = self._entries(self._terms(i, j), self.base[i, j])

    def _entries(self, terms: Tensor, base: Tensor) -> Tensor:
        """The rounded sums of rows of terms [k, n], the base's entry [k] first; float64 decides most."""
        mass = terms.abs().sum(1)
        rounded, unsure = self._between(terms.sum(1), mass * (2 * (terms.shape[1] + 2) * _UNIT))
        nothing = mass == 0  # W and every term are zero: the sign is the base's
        rounded[nothing] = base[nothing]
        left = (unsure & ~nothing).nonzero()[:, 0]
        exact = [_nearest_sum(row, self.form) for row in terms[left].tolist()]
        rounded[left] = torch.tensor(exact, dtype=torch.float64, device="cpu").to(rounded.dtype)
        return rounded

    def _terms(self, i: Tensor, j: Tensor) -> Tensor:
        """For each entry (i, j): W, then every product (exact in float64: 24 + 24 bits), then every D."""
        parts = [self.base[i, j, None].double(), self.B[i] * self.A[:, j].T]
        return torch.cat([*parts, *(matrix[i, j, None].double() for matrix in self.dense)], 1)


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
