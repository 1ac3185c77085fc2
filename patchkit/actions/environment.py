"""What a result was computed with: versions, device, threads. Never part of a patch's id."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from patchkit.actions.gates import SHARES
from patchkit.evaluation.measure import Summary

__all__ = ["environment", "environment_line", "measured_trailers"]


def environment(device: str) -> dict[str, Any]:
    """Versions and device, as the catalogue keeps them."""
    return {
        "patchkit": version("patchkit-llm"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def environment_line(values: Mapping[str, Any]) -> str:
    """The same as one line, for a commit's trailer."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def measured_trailers(summary: Summary, timings: Mapping[str, float], device: str) -> list[tuple[str, str]]:
    """Shares, seconds and versions of an edit, as the trailers of its commit."""
    shares = {name: getattr(summary, name) for name in SHARES}
    return [
        ("Patchkit-Results", ", ".join(f"{n} {v:.3f}" for n, v in shares.items() if v is not None)),
        ("Patchkit-Seconds", f"{sum(timings.values()):.1f}"),
        ("Patchkit-Versions", environment_line(environment(device))),
    ]
