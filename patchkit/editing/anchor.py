"""Norm-Anchor Scaling: every new value as long as an unedited model's (Liu et al. 2026, arXiv 2602.02543).

Edits upon edits make values and weights drive each other's norms up until the model collapses. With h the
state at the subject after block L and v₀ what that block's feed-forward part adds to it, δ makes it
v* = v₀ + δ. That is scaled to one length s, and the target is z = h - v₀ + s v* / ‖v*‖. s belongs to the
unedited model: the mean of ‖v*‖ over facts whose δ are sought on it with the bare prompt alone, the largest
5 % left out (`reference_norm`). As the public code has it (SasyaTitech/NAS), where the search stands in an
AlphaEdit; here any mass editor can be told to, by the field ``norm_anchor`` = s.

Differences from the public code: s is a number of the recipe, not measured in silence on CounterFact; and
that code does not edit a fact whose ‖v*‖ is more than 2 s, while here it is scaled as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.editing.keys import collect_outputs, collect_states
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import Passage, drift_passages, rewriting_passages
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.loading import float32_compute, frozen
from patchkit.models.outlet import Outlet
from patchkit.models.trial import try_out

__all__ = ["anchored", "reference_norm"]

_TOP = 0.05  # the share of the largest norms that the reference leaves out


def anchored(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    z: Tensor,
    recipe: Recipe,
    outlet: Outlet,
) -> Tensor:
    """z - v* + s v* / ‖v*‖ for ``z`` [N, d_model] found on this model, on the CPU; s is ``norm_anchor``."""
    value = _values(model, anatomy, rewriting, z, recipe.layers[-1], outlet)
    length = value.norm(dim=1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
    return z + ((recipe.norm_anchor / length - 1) * value).to(z)


def reference_norm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], recipe: Recipe
) -> float:
    """s for a model as it stands, from facts that are sought on it with the recipe's search, walked plainly.

    The paper took a thousand CounterFact facts. BadInput without facts, or where one cannot be used.
    """
    if not facts:
        raise BadInput("there are no facts to measure the reference norm on")
    anatomy = anatomy_of(model)
    anatomy.check_layers(recipe.layers)
    recipe = recipe.override(contexts=0, templates=("{}",), templates_per_step=0, curvature=0.0)
    layer = recipe.layers[-1]
    with float32_compute(model), frozen(model):
        longest = positions(model.config)
        rewriting = rewriting_passages(tokenizer, facts, recipe.templates, longest)
        outlet = try_out(model, anatomy, (layer,), rewriting[0][0].tokens)[layer]
        drift = drift_passages(tokenizer, facts, recipe.kl_prompt, longest)
        z = find_targets(model, anatomy, rewriting, drift, recipe).z
        norms = _values(model, anatomy, rewriting, z, layer, outlet).norm(dim=1).sort().values
    return float(norms[: len(norms) - int(_TOP * len(norms))].mean())


def _values(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    z: Tensor,
    layer: int,
    outlet: Outlet,
) -> Tensor:
    """v* = v₀ + (z - h) [N, d_model], for the bare prompts."""
    written = outlet.passed(collect_outputs(model, anatomy, rewriting, layer))
    return written + z.to(written) - collect_states(model, anatomy, rewriting, layer)
