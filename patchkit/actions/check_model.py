"""Whether a base can be edited, and how it would be: nothing is written, nothing is edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from patchkit.actions.init import recipe_table
from patchkit.actions.workbench import Workbench
from patchkit.checkpoint import Checkpoint
from patchkit.editing.published import many_for, recipe_for
from patchkit.editing.recipe import Recipe
from patchkit.models.anatomy import anatomy_of
from patchkit.models.names import edited_weights
from patchkit.models.sources import resolve_base
from patchkit.models.trial import try_words

__all__ = ["ModelReport", "check_model"]


@dataclass(frozen=True)
class ModelReport:
    """What an edit would touch. ``transposed``: weights lie as [d_in, d_out] (Conv1D).

    ``outlets``: for each layer, how the residual stream takes what the edited weight writes.
    """

    source: str
    folder: str
    architecture: str
    blocks: int
    d_model: int
    d_ff: int
    dtype: str
    weights: dict[int, str]
    transposed: bool
    outlets: dict[int, str]
    recipe: Recipe
    many: dict[str, Any]
    """What differs for a batch of many facts (`editing.many`); empty where nothing does."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": recipe_table(self.recipe)}


def check_model(
    base: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> ModelReport:
    """Load ``base`` and try it on a few tokens; BadInput says what keeps it from being edited."""
    place = resolve_base(base, revision, progress=progress)
    checkpoint = Checkpoint.open(place.folder)
    bench = Workbench.open(checkpoint, device)
    anatomy = anatomy_of(bench.model)
    recipe = recipe_for(bench.model.config)
    weights = edited_weights(bench.model, anatomy, checkpoint, recipe.layers)
    outlets = try_words(bench.model, bench.tokenizer, recipe.layers)
    _, stored = checkpoint.tensors[weights[recipe.layers[0]]]
    return ModelReport(
        source=place.source,
        folder=str(place.folder),
        architecture=type(bench.model).__name__,
        blocks=anatomy.depth,
        d_model=anatomy.d_model,
        d_ff=anatomy.d_ff,
        dtype=stored.dtype,
        weights=weights,
        transposed=anatomy.transposed,
        outlets={layer: str(outlet) for layer, outlet in outlets.items()},
        recipe=recipe,
        many=many_for(bench.model.config),
    )
