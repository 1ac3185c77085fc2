"""What is measured of sums of updates from their factors, against the dense matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchkit.algebra.factors import Delta
from patchkit.algebra.spectrum import cosine, principal_angles, sum_of

SHAPE = (9, 13)


def made(seed: int, ranks: list[int], dense: bool) -> list[tuple[int, Delta]]:
    """Updates with signs in turn; where ``dense``, the last is stored multiplied out."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for number, rank in enumerate(ranks):
        B, A = (
            torch.randn(SHAPE[0], rank, generator=generator),
            torch.randn(rank, SHAPE[1], generator=generator),
        )
        last = dense and number == len(ranks) - 1
        terms.append(((-1) ** number, Delta(dense=B @ A) if last else Delta(B, A)))
    return terms


def multiplied(terms: list[tuple[int, Delta]]) -> np.ndarray:
    total = np.zeros(SHAPE)
    for sign, d in terms:
        whole = d.dense.double().numpy() if d.B is None else d.B.double().numpy() @ d.A.double().numpy()
        total += sign * whole
    return total


CASES = given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dense=st.booleans(),
)


@CASES
def test_norms_and_ranks_are_those_of_the_dense_matrix(seed: int, ranks: list[int], dense: bool) -> None:
    terms = made(seed, ranks, dense)
    found, whole = sum_of(terms, SHAPE), multiplied(terms)
    values = np.linalg.svd(whole, compute_uv=False)
    kept = values[values > 1e-9 * values[0]] if not dense else found.singular_values.numpy()
    p = kept / kept.sum()
    assert found.norm == pytest.approx(np.linalg.norm(whole), rel=1e-10)
    assert found.spectral_norm == pytest.approx(values[0], rel=1e-10)
    assert found.singular_values.numpy() == pytest.approx(values[: len(kept)], rel=1e-6)
    assert len(kept) == min(sum(ranks), *SHAPE) or dense
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-8)
    assert found.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-8)


@CASES
def test_the_cosine_is_that_of_the_dense_matrices(seed: int, ranks: list[int], dense: bool) -> None:
    one, other = made(seed, ranks, dense), made(seed + 1, [2], False) + made(seed, ranks, dense)[:1]
    x, y = multiplied(one), multiplied(other)
    wanted = (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y))
    assert cosine(sum_of(one, SHAPE), sum_of(other, SHAPE)) == pytest.approx(wanted, abs=1e-10)


@given(
    seed=st.integers(0, 10_000),
    p=st.integers(1, 5),
    q=st.integers(1, 5),
    tilt=st.sampled_from([1e-7, 0.3, 1.5]),
)
def test_principal_angles_are_the_ones_that_the_spaces_were_made_with(
    seed: int, p: int, q: int, tilt: float
) -> None:
    """Y's vectors are X's, each turned by a known angle towards a direction orthogonal to all of X."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    angles = np.sort(rng.uniform(0.1, 1.0, min(p, q)) * tilt)
    turned = [frame[:, i] * np.cos(a) + frame[:, 11 - i] * np.sin(a) for i, a in enumerate(angles)]
    rest = [frame[:, 5 + i] for i in range(q - len(turned))]
    spin = np.linalg.qr(rng.standard_normal((q, q)))[0]
    X, Y = torch.from_numpy(frame[:, :p].copy()), torch.from_numpy(np.stack([*turned, *rest], 1) @ spin)
    if q > p:  # the other directions are orthogonal to X: they meet no dimension of it
        assert len(principal_angles(X, Y)) == p
    assert principal_angles(X, Y) == pytest.approx(np.degrees(angles), rel=1e-6, abs=1e-9)


def test_what_is_zero_has_no_direction() -> None:
    delta = Delta(torch.ones(SHAPE[0], 1), torch.ones(1, SHAPE[1]))
    nothing, something = sum_of([(1, delta), (-1, delta)], SHAPE), sum_of([(1, delta)], SHAPE)
    for zero in (nothing, sum_of([], SHAPE)):
        assert len(zero.singular_values) == zero.effective_rank == zero.stable_rank == zero.spectral_norm == 0
        assert cosine(zero, something) is None
        assert principal_angles(zero.output_space, something.output_space) == []
    assert something.effective_rank == pytest.approx(1)


def test_no_matrix_of_the_weights_size_is_made_from_factors() -> None:
    """100,000 x 100,000 in float64 would take 80 GB."""
    big = (100_000, 100_000)
    delta = Delta(torch.ones(big[0], 1), torch.ones(1, big[1]))
    found = sum_of([(1, delta)], big)
    assert found.norm == pytest.approx(1e5)
    assert cosine(found, found) == pytest.approx(1)
