"""Editors that spare the facts of the patches below: those patches' keys enter the solve.

The keys come from the patches that are in force and are kept nowhere else, so a patch that was reverted is
forgotten by every later edit, and by an earlier one once it is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.editing.editor import Below
from patchkit.editing.mass import MassEditor, Place
from patchkit.errors import BadInput

__all__ = ["SparingEditor", "keys_below"]


class SparingEditor(MassEditor):
    """A mass editor whose `terms` read the keys of the patches below."""

    def check(self, weights: Sequence[str], below: Sequence[Below]) -> None:
        """BadInput names a patch below that changes these weights and whose keys are not there."""
        for patch in below:
            if patch.keys is None and patch.weights & set(weights):
                raise BadInput(
                    f"{patch.name}: {patch.why}, so {self.name} cannot spare its facts; put the keys back, "
                    "revert it, or edit with --method memit"
                )


def keys_below(place: Place, like: Tensor) -> Tensor:
    """K_p: rows [N_p, d_in] of all keys that patches below have at this weight, as ``like`` [..., d_in]."""
    found = [patch.keys[place.weight] for patch in place.below if patch.keys and place.weight in patch.keys]
    return torch.cat([rows.to(like) for rows in found]) if found else like.new_zeros(0, like.shape[-1])
