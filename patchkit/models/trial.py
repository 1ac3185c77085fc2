"""Whether a model can be edited, shown on a few tokens of it: what a module tree cannot tell.

Its logits are numbers; tokens do not look ahead; running in parts gives the whole model's logits; what an
edited projection writes reaches the residual stream in a way that a residual can be aimed through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.loading import float32_compute, frozen, silence
from patchkit.models.outlet import Outlet, outlet_of
from patchkit.models.past import Row
from patchkit.models.replay import capture

__all__ = ["outlets_of", "try_out", "try_words"]

_CLOSE = 1e-3  # of the largest logit, in float32
_WORDS = "The city of Paris lies in the north of France."


def try_out(
    model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int], tokens: Sequence[int]
) -> dict[int, Outlet]:
    """The outlet of each of ``layers``; BadInput says by name and reason why the model cannot be edited.

    ``tokens`` are some of an ordinary text. The model computes in float32 or wider.
    """
    name = type(model).__name__
    tokens = _enough(tokens)
    try:
        row = torch.tensor([tokens], device=model.device)
        with torch.no_grad(), silence():
            whole = model(input_ids=row, use_cache=False).logits[0]
        _check_finite(model, whole, name)
        _check_causal(model, row, whole, name)
        _check_parts(model, anatomy, layers[-1], tokens, whole, name)
        return outlets_of(model, anatomy, layers, tokens)
    except torch.OutOfMemoryError:  # a RuntimeError too, and nothing that is wrong with the model
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise BadInput(
            f"{name}: cannot be run in parts, which editing needs ({reason}); choose another model"
        ) from error


def try_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int]
) -> dict[int, Outlet]:
    """`try_out` on a few words, for before what takes long; whatever the model's dtype is."""
    anatomy = anatomy_of(model)
    anatomy.check_layers(layers)
    with float32_compute(model), frozen(model):
        return try_out(model, anatomy, layers, tokenizer(_WORDS)["input_ids"])


def outlets_of(
    model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int], tokens: Sequence[int]
) -> dict[int, Outlet]:
    """The outlet of each of ``layers`` in a model that is known to be one that can be edited."""
    row = torch.tensor([_enough(tokens)], device=model.device)
    return {layer: outlet_of(model, anatomy, layer, row) for layer in layers}


def _enough(tokens: Sequence[int]) -> list[int]:
    return list(tokens) * (1 if len(tokens) > 3 else 4)


def _check_finite(model: PreTrainedModel, whole: Tensor, name: str) -> None:
    """Before the comparisons, all of which a NaN fails: their reasons would be wrong ones."""
    if whole.isfinite().all():
        return
    for parameter, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise BadInput(f"{name}: {parameter} holds NaN or infinity; get the checkpoint again")
    raise BadInput(f"{name}: its logits are NaN or infinite, though no weight is; choose another model")


def _check_causal(model: PreTrainedModel, row: Tensor, whole: Tensor, name: str) -> None:
    other = row.clone()
    other[0, -1] = row[0, 0] if row[0, 0] != row[0, -1] else row[0, 1]
    with torch.no_grad():
        changed = model(input_ids=other, use_cache=False).logits[0]
    if not _same(changed[:-1], whole[:-1]):
        raise BadInput(f"{name}: its attention looks ahead (an encoder); patchkit edits decoders")


def _check_parts(
    model: PreTrainedModel, anatomy: Anatomy, layer: int, tokens: Sequence[int], whole: Tensor, name: str
) -> None:
    """Two rows of unlike lengths with a token in common, so that padding stands in all its places."""
    half = len(tokens) // 2
    shorter = [tokens[0], *tokens[half:]]
    rows = [Row(tuple(tokens[:half]), tuple(tokens[half:])), Row(tuple(shorter[:2]), tuple(shorter[2:]))]
    tail = capture(model, anatomy, rows, layer=layer)
    with torch.no_grad():
        states = tail.states(tail.hidden)
        alone = model(input_ids=torch.tensor([shorter], device=model.device), use_cache=False).logits[0]
        first = tail.logits(states[0])
        second = tail.logits(states[1, : len(shorter) - 2])
        kept = tail.keep(torch.tensor([1], device=model.device))  # a search goes on with some of the rows
        third = kept.logits(kept.states(kept.hidden)[0, : len(shorter) - 2])
    if not (_same(first, whole[half:]) and _same(second, alone[2:]) and _same(third, alone[2:])):
        raise BadInput(
            f"{name}: run in parts it does not say what it says as a whole, so no target can be found on it; "
            "choose another model"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(one.isfinite().all()) and float((one - other).abs().max()) <= _CLOSE * float(
        other.abs().max()
    )
