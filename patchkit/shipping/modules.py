"""The modules of a model that hold a patch's weights, under the names that PEFT looks for.

An adapter names modules, a patch names stored tensors. Between them stands the model that transformers
builds from the base's config (without memory for its weights). Promises: every weight is found and is one
that PEFT can put an adapter on, or is refused by name; no other module answers to the names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, NotFound
from patchkit.models.loading import read_config, without_weights
from patchkit.models.names import StoredNames

__all__ = ["Modules"]


@dataclass(frozen=True)
class Modules:
    """A base's modules with a matrix for a weight. ``paths``: stored name -> module path."""

    model: PreTrainedModel
    paths: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Modules:
        """Read from the base's config; `BadInput` where transformers does not know it."""
        model = without_weights(read_config(checkpoint.folder), checkpoint.folder)
        names = StoredNames(model, checkpoint)
        paths: dict[str, str] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                try:
                    paths.setdefault(names.of(f"{path}.weight"), path)
                except (BadInput, NotFound):  # built from others, or not stored: no patch can name it
                    continue
        return cls(model, paths)

    @property
    def architecture(self) -> str:
        """The class of the model, as transformers names it."""
        return type(self.model).__name__

    @property
    def depth(self) -> int:
        """Blocks of the text decoder."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def of_weights(self, weights: Collection[str]) -> dict[str, str]:
        """Stored name -> module path of each of ``weights``; `BadInput` names one that PEFT cannot take."""
        for weight in sorted(weights):
            if weight not in self.paths:
                raise BadInput(
                    f"{weight}: is the weight of no Linear or Conv1D module of {self.architecture}, so PEFT "
                    "cannot put an adapter on it; ship the patches as a checkpoint: patchkit build --out DIR"
                )
        return {weight: self.paths[weight] for weight in sorted(weights)}

    def stored(self, path: str) -> str | None:
        """The stored name of the weight of the module at ``path``, if it has one."""
        return next((weight for weight, found in self.paths.items() if found == path), None)

    def transposed(self, path: str) -> bool:
        """Whether the module keeps its weight as [d_in, d_out]."""
        return isinstance(self.model.get_submodule(path), Conv1D)

    def shape(self, path: str) -> tuple[int, int]:
        """(d_out, d_in) of a module's weight, whatever way it is stored."""
        weight = self.model.get_submodule(path).weight
        assert isinstance(weight, nn.Parameter)
        rows, columns = weight.shape
        return (columns, rows) if self.transposed(path) else (rows, columns)
