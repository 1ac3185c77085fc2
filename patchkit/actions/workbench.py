"""A base in memory with patches put on it, to the bit what a build of them would hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from patchkit.build import stacked
from patchkit.checkpoint import Checkpoint
from patchkit.factors import Patch
from patchkit.models.loading import load_model, put_weights
from patchkit.rounding import materialise

__all__ = ["Workbench"]


class Workbench:
    """Computes in float32; the weights are base + Σ B A, rounded once to the base's own dtype."""

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.tokenizer = tokenizer
        self._touched: set[str] = set()

    @classmethod
    def open(cls, checkpoint: Checkpoint, device: str = "auto") -> Workbench:
        """Load the checkpoint; nothing is put on it yet."""
        model, tokenizer = load_model(checkpoint.folder, device=device)
        return cls(checkpoint, model, tokenizer)

    def put(self, patches: Iterable[Patch]) -> None:
        """Make the model that of the base with exactly these patches."""
        deltas = stacked(patches)
        weights = {
            name: materialise(self.checkpoint.read(name), deltas.get(name, []), name)
            for name in sorted(self._touched | deltas.keys())
        }
        put_weights(self.model, weights, self.checkpoint)
        self._touched = set(deltas)
