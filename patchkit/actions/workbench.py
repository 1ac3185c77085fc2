"""A base in memory with patches put on it, to the bit what a build of them would hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchkit.checkpoint import Checkpoint
from patchkit.factors import Delta, Patch
from patchkit.models.loading import load_model, put_weights
from patchkit.rounding import materialise

__all__ = ["Workbench", "stacked"]


def stacked(patches: Iterable[Patch]) -> dict[str, list[Delta]]:
    """For each touched tensor (stored name), the deltas of all patches."""
    deltas: dict[str, list[Delta]] = {}
    for patch in patches:
        for weight, delta in patch.deltas.items():
            deltas.setdefault(weight, []).append(delta)
    return deltas


class Workbench:
    """Computes in float32; the weights are round_once(base + Σ B A) in the base's own dtype."""

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.tokenizer = tokenizer
        self._touched: set[str] = set()

    @classmethod
    def open(cls, folder: Path, device: str = "auto") -> Workbench:
        """Load the checkpoint in ``folder``; nothing is put on it yet."""
        model, tokenizer = load_model(folder, device=device)
        return cls(Checkpoint.open(folder), model, tokenizer)

    def put(self, patches: Iterable[Patch]) -> None:
        """Make the model that of the base with exactly these patches."""
        deltas = stacked(patches)
        weights = {
            name: materialise(self.checkpoint.read(name), deltas.get(name, []))
            for name in sorted(self._touched | deltas.keys())
        }
        put_weights(self.model, weights, self.checkpoint)
        self._touched = set(deltas)
