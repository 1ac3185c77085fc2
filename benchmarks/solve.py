"""The solve: patchkit's N x N systems against the dense LU that MEMIT's public code runs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import seconds_of
from benchmarks.report import Bar, Effort, Measured
from patchkit.editing.solve import solve_keys

__all__ = ["measure"]


def measure(effort: Effort) -> Measured:
    """Seconds a layer at SmolLM2's d_ff, both in float64, from the same keys; C is random and regular."""
    width = 64 if effort is Effort.QUICK else 1536
    counts = (1, 10) if effort is Effort.QUICK else (1, 100, 1000)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(10 * width, width, generator=generator, dtype=torch.float64)
    C = 300.0 * (text.T @ text) / len(text)
    factored = seconds_of(lambda: torch.linalg.cholesky(C))
    factor = torch.linalg.cholesky(C)
    rows, bars = [], []
    for count in counts:
        K = torch.randn(count, width, generator=generator, dtype=torch.float64)
        ours = seconds_of(partial(solve_keys, K, factor))
        dense = seconds_of(partial(_dense, C, K))
        apart = solve_keys(K, factor) - _dense(C, K).T
        error = float(apart.norm() / solve_keys(K, factor).norm())
        rows.append(
            {
                "facts": count,
                "patchkit, s": ours,
                "dense LU, s": dense,
                "times faster": dense / ours,
                "relative difference": error,
            }
        )
        bars.append(Bar(f"difference for {count} facts", error, 1e-9, most=True))
    note = f"λC is factored once for a model and layer: {factored:.3f} s. d_ff is {width}."
    return Measured(rows, bars, [note])


def _dense(C: Tensor, K: Tensor) -> Tensor:
    return torch.linalg.solve(C + K.T @ K, K.T)
