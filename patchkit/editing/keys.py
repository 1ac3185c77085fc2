"""Keys and current states, read at each fact's subject (MEMIT eq. 18-19 and alg. 1).

The key k of a fact at a layer is the edited weight's input at the subject's last token: the bare
prompt and the mean over the written contexts count one half each. The current state is the last
edited block's output there, in the bare prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.editing.batching import pack
from patchkit.editing.templates import Passage
from patchkit.models.anatomy import Anatomy
from patchkit.models.replay import Row, prefill, reading_inputs, reading_outputs

__all__ = ["collect_keys", "collect_outputs", "collect_states"]

_TOKENS = 2048  # a forward pass: no gradients, so more fit than in a step of the optimisation


def collect_keys(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """Keys [N, d_ff] at ``layer``; ``passages`` is [fact][template], the bare prompt first."""
    rows = [_row(p, group) for texts in passages for group, p in enumerate(texts)]
    read = torch.empty(len(rows), anatomy.d_ff, dtype=model.dtype, device=model.device)
    for chosen in _chunks(rows):
        with reading_inputs(anatomy.downs[layer]) as inputs:
            prefill(model, anatomy, [rows[i] for i in chosen], until=layer)
        read[chosen] = inputs[-1].view(len(chosen), -1, anatomy.d_ff)[:, -1]  # some blocks flatten
    return _over_templates(read.view(len(passages), -1, anatomy.d_ff))


def collect_states(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """Outputs [N, d_model] of block ``layer`` for the bare prompts."""
    return _read(model, anatomy, passages, anatomy.blocks[layer], layer)


def collect_outputs(
    model: PreTrainedModel, anatomy: Anatomy, passages: Sequence[Sequence[Passage]], layer: int
) -> Tensor:
    """Outputs [N, d_model] of the edited projection of block ``layer`` for the bare prompts."""
    return _read(model, anatomy, passages, anatomy.downs[layer], layer)


def _read(
    model: PreTrainedModel,
    anatomy: Anatomy,
    passages: Sequence[Sequence[Passage]],
    module: nn.Module,
    layer: int,
) -> Tensor:
    """What ``module``, part of block ``layer``, gives at the subject of each bare prompt: [N, d_model]."""
    rows = [_row(texts[0], 0) for texts in passages]
    read = torch.empty(len(rows), anatomy.d_model, dtype=model.dtype, device=model.device)
    for chosen in _chunks(rows):
        with reading_outputs(module) as outputs:
            prefill(model, anatomy, [rows[i] for i in chosen], until=layer)
        read[chosen] = outputs[-1].view(len(chosen), -1, anatomy.d_model)[:, -1]  # some blocks flatten
    return read


def _over_templates(keys: Tensor) -> Tensor:
    """Mean of the bare prompt's key and the mean of the others: [N, T, d] to [N, d]."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2


def _row(passage: Passage, group: int) -> Row:
    """The text to the subject's last token, which `prefill` puts in the last column and never shares."""
    return Row(passage.tokens[: passage.subject + 1], (), group)


def _chunks(rows: Sequence[Row]) -> list[list[int]]:
    return pack([len(row.prefix) for row in rows], _TOKENS)
