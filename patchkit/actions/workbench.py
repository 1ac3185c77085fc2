"""A base in memory with patches put on it, to the bit what a build of them would hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.actions.build import stack_on_base
from patchkit.algebra.factors import Delta, Patch
from patchkit.algebra.rounding import materialise
from patchkit.builds.build import stacked
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput
from patchkit.models.loading import load_model, put_weights, stored_parameters

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Workbench", "load_stack", "stacked_weights"]


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
        self.use(self.weights(patches))

    def weights(self, patches: Iterable[Patch]) -> dict[str, Tensor]:
        """The weights that these patches change (by stored name), as a build holds them; for `use`."""
        return stacked_weights(self.checkpoint, patches)

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Make the model that of the base with ``weights`` in place of its own."""
        back = {name: self.checkpoint.read(name) for name in sorted(self._touched - weights.keys())}
        put_weights(self.model, {**weights, **back}, self.checkpoint)
        self._touched = set(weights)

    @contextmanager
    def without(self, patch: Patch) -> Iterator[None]:
        """The model without ``patch``, which is on it: W − B A in float32, for that patch's weights alone.

        The difference is not rounded to the base's dtype again, so it is that of a build without the patch up
        to one rounding of each weight. Afterwards every weight has the bits that it had.
        """
        parameters = stored_parameters(self.model, self.checkpoint)
        weights = {name: parameters[name] for name in patch.deltas}
        saved = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    _subtract(weight, patch.deltas[name])
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(saved[name])


def stacked_weights(checkpoint: Checkpoint, patches: Iterable[Patch]) -> dict[str, Tensor]:
    """The weights of the base that these patches change (by stored name), as a build holds them.

    BadInput for a patch of another base.
    """
    chosen = list(patches)
    for patch in chosen:
        if patch.base != checkpoint.fingerprint():
            raise BadInput(
                f"{patch.name}: was made for another base ({patch.base[:19]}…); "
                "name a commit that stands on the base of HEAD"
            )
    return {
        name: materialise(checkpoint.read(name), deltas, name)
        for name, deltas in sorted(stacked(chosen).items())
    }


def _subtract(weight: Tensor, delta: Delta) -> None:
    """W −= ΔW in place; W [d_out, d_in], or [d_in, d_out] where the update is marked transposed."""
    target = weight.T if delta.transposed else weight
    if delta.B is not None and delta.A is not None:
        B, A = (factor.to(weight.device, weight.dtype) for factor in (delta.B, delta.A))
        target.addmm_(B, A, alpha=-1)
    elif delta.dense is not None:
        target.sub_(delta.dense.to(weight.device, weight.dtype))


def load_stack(repository: Repository, revision: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) with the stack at ``revision`` on the base; BadInput where that is of another."""
    patches = repository.patches(stack_on_base(repository, revision))
    bench = repository.workbench(device)
    bench.put(patches.values())
    return bench.model, bench.tokenizer
