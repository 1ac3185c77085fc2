"""Under which name a checkpoint stores a loaded model's weight.

Files and classes differ: a prefix more or less, and for some models a table of renamings that
transformers applies when it loads. What it renames is renamed here in the same way; what it builds
out of several stored tensors, or turns, has no stored name, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedModel, conversion_mapping, core_model_loading

from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy

__all__ = ["StoredNames", "edited_weights"]


class StoredNames:
    """The stored names of one model's parameters in one checkpoint."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint

    def of(self, parameter: str) -> str:
        """The stored name of a parameter; NotFound where nothing is stored for it, or more than one thing."""
        if parameter in self._renamed:
            return self._renamed[parameter]
        if parameter in self._built:
            raise BadInput(
                f"{self._checkpoint.folder}: {parameter!r} is built from tensors that are stored in another "
                "form; save the model with transformers 5 and save_original_format=False, and use that"
            )
        return self._checkpoint.stored_name(parameter)

    @cached_property
    def _found(self) -> tuple[dict[str, str], set[str]]:
        """Parameters by what transformers renames stored tensors to, and those that it builds."""
        rules = conversion_mapping.get_model_conversion_mapping(self._model)
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        wanted = self._model.state_dict()
        renamed: dict[str, str] = {}
        built: set[str] = set()
        for stored in sorted(self._checkpoint.tensors, key=core_model_loading.dot_natural_key):
            name, converter = core_model_loading.rename_source_key(
                stored, renamings, converters, self._model.base_model_prefix, wanted
            )
            if converter is not None:
                built.add(name)
            elif name in wanted:
                renamed.setdefault(name, stored)
        return renamed, built

    @property
    def _renamed(self) -> dict[str, str]:
        return self._found[0]

    @property
    def _built(self) -> set[str]:
        return self._found[1]


def edited_weights(
    model: PreTrainedModel, anatomy: Anatomy, checkpoint: Checkpoint, layers: Sequence[int]
) -> dict[int, str]:
    """By layer, the stored name of the weight that is edited there.

    BadInput where a layer is not in the model, or its weight is stored so that no update can be added to it.
    """
    anatomy.check_layers(layers)
    names = StoredNames(model, checkpoint)
    found = {layer: names.of(anatomy.weights[layer]) for layer in layers}
    checkpoint.check_editable(found.values())
    return found
