"""Editing a model in memory, without a repository: `patchkit.edit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from patchkit.actions.given import Facts, as_batch
from patchkit.algebra.factors import Patch
from patchkit.algebra.rounding import materialise
from patchkit.checkpoint import Checkpoint
from patchkit.editing.editor import Below, Edited, ready_editor
from patchkit.editing.many import recipe_of_batch
from patchkit.editing.published import many_for, recipe_for
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.hooks import forgetting_positions
from patchkit.models.loading import frozen, stored_parameters
from patchkit.models.names import StoredNames
from patchkit.models.sources import cache_folder, resolve_base
from patchkit.models.trial import try_words

__all__ = ["as_patch", "below", "edit"]


def edit(
    model: Any,
    tokenizer: Any,
    facts: Facts,
    *,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    statistics: Statistics | None = None,
    trained: str | Path | None = None,
    batch_size: int | str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Patch:
    """Edit facts into ``model`` in place, and give the patch (save it with ``patch.save(folder)``).

    ``facts``: a file's path, or facts, or mappings with the fields of a fact. ``base``: the checkpoint
    that the model was loaded from, where ``model.name_or_path`` does not say it; the patch is bound to
    its fingerprint. ``recipe``: the base's own for so many facts by default. Statistics are kept in the
    user's cache.
    ``trained``: the folder of what an editor was trained to, ``patchkit path statistics`` of the repository.
    The edited weights are base + Σ B A rounded once to the model's dtype: where that is the base's
    dtype, they are those of a build. Raises FactsError, or BadInput for a model that cannot be edited, or
    whose weights are not the checkpoint's any more: a patch on patches is a repository's to make.
    """
    batch = as_batch(facts)
    place = base if base is not None else getattr(model, "name_or_path", "")
    if not place:
        raise BadInput(
            "the model does not say where it was loaded from; name its checkpoint with base=FOLDER"
        )
    checkpoint = Checkpoint.open(resolve_base(place, download=False).folder)
    as_loaded = _as_loaded(model, checkpoint)
    if recipe is None:
        recipe = recipe_of_batch(recipe_for(model.config), many_for(model.config), len(batch.facts))
    if statistics is None and recipe.reads("statistics_text"):
        folder = cache_folder() / "statistics"
        with frozen(model), forgetting_positions(model):
            try_words(model, tokenizer, recipe.layers)  # before minutes of work for what may not be edited
            statistics = statistics_for(
                model, tokenizer, recipe, folder=folder, base=as_loaded, progress=progress
            )
    kept = Path(trained) if trained is not None else cache_folder() / "statistics"
    editor, recipe = ready_editor(recipe, kept, checkpoint.as_read)
    with forgetting_positions(model):
        edited = editor.edit(
            model, tokenizer, batch.facts, recipe, statistics, batch_size=batch_size, progress=progress
        )
    patch = as_patch(edited, batch.facts, model, checkpoint, ())
    parameters = {name: model.get_parameter(name) for name in edited.deltas}
    new = {
        name: materialise(weight.detach().cpu(), [edited.deltas[name]], name)
        for name, weight in parameters.items()
    }
    with torch.no_grad():  # all that may fail is done
        for name, weight in parameters.items():
            weight.copy_(new[name])
    return patch


def _as_loaded(model: PreTrainedModel, checkpoint: Checkpoint) -> str:
    """What names the model's results: `Checkpoint.as_read`, and the dtype to which its weights were rounded
    where they were.

    BadInput names a weight that is not the checkpoint's: what is measured and kept would not be of it. One
    of another shape, such as embeddings with tokens added, is not compared.
    """
    rounded = set()
    for name, parameter in stored_parameters(model, checkpoint).items():
        own, stored = parameter.detach().cpu(), checkpoint.read(name)
        if torch.promote_types(own.dtype, stored.dtype) != own.dtype:
            rounded.add(str(own.dtype).removeprefix("torch."))
        if own.shape == stored.shape and not torch.equal(own, stored.to(own.dtype)):
            raise BadInput(
                f"{name}: the model has another weight than {checkpoint.folder}; load it anew and edit all "
                "facts at once, or commit patch on patch in a repository"
            )
    return "-".join((checkpoint.as_read(), *sorted(rounded)))


def below(patches: Sequence[Patch], model: PreTrainedModel, checkpoint: Checkpoint) -> list[Below]:
    """Patches that are on the model, as an editor sees them: by the names of its parameters."""
    own = {id(weight): name for name, weight in model.named_parameters()}
    parameter = {stored: own[id(weight)] for stored, weight in stored_parameters(model, checkpoint).items()}
    found = []
    for patch in patches:
        weights = frozenset(parameter[name] for name in patch.deltas)
        if patch.solution is None:
            none = f"{patch.method} keeps no keys"
            why = "its keys.safetensors was not shipped" if patch.left_out else none
            found.append(Below(patch.name, weights, None, why))
        else:
            keys = {parameter[name]: rows for name, rows in patch.solution.keys.items()}
            found.append(Below(patch.name, weights, keys))
    return found


def as_patch(
    edited: Edited,
    facts: Sequence[Fact],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    under: Sequence[Patch],
) -> Patch:
    """An editor's factors as a patch, its tensors under their stored names, solved on top of ``under``."""

    names = StoredNames(model, checkpoint)

    def stored(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {names.of(name): part for name, part in parts.items()}

    solution = edited.solution
    if solution is not None:
        solution = replace(
            solution,
            keys=stored(solution.keys),
            solved=stored(solution.solved),
            residuals=stored(solution.residuals),
        )
    return Patch(
        facts=tuple(facts),
        deltas=stored(edited.deltas),
        base=checkpoint.fingerprint(),
        method=edited.recipe.method,
        recipe=edited.recipe.to_dict(),
        solved_on=tuple(patch.id for patch in under),
        solution=solution,
    )
