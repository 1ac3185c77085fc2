"""The solve equals the paper's dense equation in float64, and its factors are one term a fact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.editing import solve
from patchkit.editing.solve import exact_device, solve_keys
from patchkit.errors import BadInput

D_IN, D_OUT = 24, 10


def problem(count, seed, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(4 * D_IN, D_IN, generator=random, dtype=torch.float64)
    C = text.T @ text / len(text)
    keys = torch.randn(count, D_IN, generator=random, dtype=torch.float64)
    residuals = torch.randn(count, D_OUT, generator=random, dtype=torch.float64)
    return C, keys.to(dtype), residuals


def dense(C, keys, residuals, lambda_):
    """Δ = R Kᵀ (λC + K Kᵀ)⁻¹, written out (MEMIT eq. 14)."""
    K, R = keys.double().T, residuals.T
    return R @ K.T @ torch.linalg.inv(lambda_ * C + K @ K.T)


@settings(max_examples=60)
@given(count=st.integers(1, 40), lambda_=st.floats(1e-2, 1e5), seed=st.integers(0, 2**31))
def test_factors_multiply_to_the_papers_dense_update(count, lambda_, seed):
    C, keys, residuals = problem(count, seed)
    solved = solve_keys(keys, torch.linalg.cholesky(lambda_ * C))
    assert solved.shape == (count, D_IN)
    wanted = dense(C, keys, residuals, lambda_)
    assert (residuals.T @ solved - wanted).norm() <= 1e-9 * wanted.norm()


@pytest.mark.parametrize(("count", "system"), [(1, 1), (D_IN, D_IN), (D_IN + 1, D_IN), (5 * D_IN, D_IN)])
def test_no_system_is_larger_than_the_facts_or_the_keys(count, system, monkeypatch):
    sizes, lower = [], solve._lower
    monkeypatch.setattr(solve, "_lower", lambda system: sizes.append(system.shape) or lower(system))
    C, keys, residuals = problem(count, 4)
    solved = solve_keys(keys, torch.linalg.cholesky(3.0 * C))
    assert sizes == [(system, system)]
    wanted = dense(C, keys, residuals, 3.0)
    assert (residuals.T @ solved - wanted).norm() <= 1e-9 * wanted.norm()


@pytest.mark.parametrize(
    ("count", "spared"), [(3, 5), (D_IN - 5, 5), (3, D_IN - 2), (2 * D_IN, 1), (1, 3 * D_IN)]
)
def test_keys_to_be_spared_stand_beside_the_new_ones(count, spared, monkeypatch):
    sizes, lower = [], solve._lower
    monkeypatch.setattr(solve, "_lower", lambda system: sizes.append(len(system)) or lower(system))
    C, keys, _ = problem(count, 5)
    _, beside, _ = problem(spared, 6)
    solved = solve_keys(keys, torch.linalg.cholesky(3.0 * C), beside=beside)
    assert sizes == [min(count + spared, D_IN)]
    K, P = keys.T, beside.T
    wanted = torch.linalg.solve(3.0 * C + P @ P.T + K @ K.T, K).T
    assert (solved - wanted).norm() <= 1e-9 * wanted.norm()


def test_float32_keys_are_solved_in_float64():
    C, keys, _ = problem(6, 0, torch.float32)
    factor = torch.linalg.cholesky(300.0 * C)
    solved = solve_keys(keys, factor)
    assert solved.dtype == torch.float64
    assert torch.equal(solved, solve_keys(keys.double(), factor))


def test_a_fact_takes_its_place_with_it():
    """Term i is fact i: another order of facts is another order of rows."""
    C, keys, _ = problem(5, 1)
    factor = torch.linalg.cholesky(3.0 * C)
    order = [4, 2, 0, 1, 3]
    assert torch.allclose(solve_keys(keys[order], factor), solve_keys(keys, factor)[order], rtol=1e-10)


def test_two_facts_with_one_key_share_it():
    C, keys, _ = problem(1, 2)
    factor = torch.linalg.cholesky(3.0 * C)
    twice = solve_keys(keys.repeat(2, 1), factor)
    assert torch.allclose(twice[0], twice[1])
    K = keys.T
    wanted = torch.linalg.solve(3.0 * C + 2 * K @ K.T, K).T
    assert torch.allclose(twice[:1], wanted)


def test_keys_that_are_not_numbers_are_refused():
    C, keys, _ = problem(3, 3)
    keys[1, 0] = float("nan")
    with pytest.raises(BadInput, match="cannot be solved for; raise lambda"):
        solve_keys(keys, torch.linalg.cholesky(C))


def test_float64_runs_where_there_is_any():
    assert exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert exact_device(torch.device("cpu")) == torch.device("cpu")
    assert exact_device(torch.device("mps")) == torch.device("cpu")
