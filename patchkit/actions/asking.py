"""A base whose stacks are asked; what was asked before is looked up, the model loaded for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patchkit.actions.environment import environment
from patchkit.actions.workbench import Workbench
from patchkit.evaluation.answers import Answers
from patchkit.evaluation.voice import Remembered
from patchkit.models.loading import load_tokenizer, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from patchkit.checkpoint import Checkpoint

__all__ = ["Asking"]


class Asking:
    """``checkpoint`` on ``device``, in float32; ``folder`` is where answers are kept (None: nowhere).

    ``bench``: the base where it is in memory already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        folder: Path | None,
        told: Callable[[str, int, int], None],
        bench: Workbench | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = pick_device(device)
        self.tokenizer: Any = bench.tokenizer if bench else load_tokenizer(checkpoint.folder)
        self._folder, self._told, self._bench = folder, told, bench

    @cached_property
    def bench(self) -> Workbench:
        """The base, loaded."""
        if self._bench is not None:
            return self._bench
        self._told("loading", 0, 1)
        bench = Workbench.open(self.checkpoint, str(self.device))
        self._told("loading", 1, 1)
        return bench

    def voice(self, patches: Collection[str], weights: Mapping[str, Tensor]) -> Remembered:
        """The base with the patches of these ids, whose ``weights`` are `stacked_weights` of them."""

        def load() -> Any:
            self.bench.use(weights)
            return self.bench.model

        answers = Answers(self._folder, {**self._about, "patches": sorted(patches)})
        return Remembered(answers, self.tokenizer, load)

    @cached_property
    def computed_with(self) -> dict[str, Any]:
        """Versions, device and threads."""
        return environment(str(self.device))

    @cached_property
    def _about(self) -> dict[str, Any]:
        """What the numbers of every stack on this base depend on, its patches apart."""
        named = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        computed_with = {**self.computed_with, "device": _numbered(self.device)}
        return {
            "base": self.checkpoint.fingerprint(),
            "files": self.checkpoint.reading(),
            "dtype": "float32",
            "computed_with": {**computed_with, "name": named, "tokenizers": version("tokenizers")},
        }


def _numbered(device: torch.device) -> str:
    """A device's name with its number, which is left out where one asks for it and told by a model on it."""
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
