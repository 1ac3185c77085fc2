"""How the model's answers bend with the states that an edit moves: G = E[g gᵀ], Fisher's information there.

g is the gradient of -log p(token), summed over a text, at one position of a block's output; the tokens are
drawn from the model itself. So a change r of the state at one position costs ½ rᵀ G r of KL on average, and
ΔW in front of it, whose keys have the second moment C, about ½ tr(G ΔW C ΔWᵀ): the Kronecker factors of K-FAC
(Martens and Grosse 2015, arXiv 1503.05671). MEMIT's solve weighs C. It cannot weigh G, as the residuals are
given by then; what chooses them is the search of targets, so that is where G enters (`whitening`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from patchkit.canonical import hash_bytes
from patchkit.editing.corpus import Progress, uniform
from patchkit.editing.pieces import Piece
from patchkit.editing.solve import exact_device
from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import leaves_at
from patchkit.models.loading import frozen

__all__ = ["TOKENS_PER_WIDTH", "Walk", "second_moment", "walk", "whitening"]

TOKENS_PER_WIDTH = 8
"""Tokens that G [d, d] is found from, for each of its d directions."""
_AT_ONCE = 4  # sequences: each holds its logits, and their gradients
_FLOOR = 0.01  # of the mean eigenvalue: below it so short a text says too little of a direction


@dataclass(frozen=True)
class Walk:
    """What a search of targets walks in: δ = T θ, ``T`` [d_model, d_model] symmetric.

    ``origin`` is the hash of the G that T is a power of. T's last bits depend on the number of threads, those
    of a G that is kept do not: so it is G that says whether kept targets are those of this search.
    """

    T: Tensor
    origin: str


def walk(G: Tensor, power: float) -> Walk:
    """The coordinates in which a step shuns directions that text depends on, G [d_model, d_model] float32."""
    return Walk(whitening(G, power), hash_bytes(G.cpu().contiguous().numpy().tobytes()))


def second_moment(
    model: PreTrainedModel,
    anatomy: Anatomy,
    layer: int,
    pieces: Sequence[Piece],
    seed: int,
    progress: Progress | None = None,
) -> Tensor:
    """G [d_model, d_model] of the output of block ``layer``, float32 on the CPU, over the first pieces.

    `TOKENS_PER_WIDTH` tokens a direction are counted, as far as there are so many. The answers are drawn with
    ``seed``, one for each token, so it is Fisher's information whatever the text.
    """
    chosen = list(_first(pieces, TOKENS_PER_WIDTH * anatomy.d_model))
    device = exact_device(model.device)
    total = torch.zeros(anatomy.d_model, anatomy.d_model, dtype=torch.float64, device=device)
    draws, counted = torch.Generator().manual_seed(seed), 0
    expected = sum(sum(mask) for _, mask in chosen)
    with frozen(model):
        for batch in _batches(chosen):
            slopes = _slopes(model, anatomy, layer, batch, draws).to(device, torch.float64)
            total += slopes.T @ slopes
            counted += len(slopes)
            if progress is not None:
                progress("curvature", counted, expected)
    return (total / counted).float().cpu()


def whitening(G: Tensor, power: float) -> Tensor:
    """T = (G / mean eigenvalue)^(-power / 2), scaled to a mean squared eigenvalue of 1; float64, symmetric.

    With ``power`` 1 a step of length 1 in θ, δ = T θ, costs the same KL in every direction. BadInput where G
    is no second moment.
    """
    if not bool(G.isfinite().all()) or float(G.diagonal().mean()) <= 0:
        raise BadInput("the curvature of this model is not a number; set curvature to 0")
    values, vectors = torch.linalg.eigh(G.to(exact_device(G.device)).double())
    scale = (values / values.mean()).clamp(min=_FLOOR) ** (-power / 2)
    return (vectors * (scale / scale.square().mean().sqrt())) @ vectors.T


def _first(pieces: Sequence[Piece], tokens: int) -> Iterator[Piece]:
    """Whole pieces up to ``tokens`` tokens that count."""
    for piece in pieces:
        if tokens <= 0:
            return
        tokens -= sum(piece[1])
        yield piece


def _batches(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Pieces of one length, a few at a time: a gradient through padding may be no number."""
    for _, same in groupby(sorted(pieces, key=_length), key=_length):
        while batch := list(islice(same, _AT_ONCE)):
            yield batch


def _length(piece: Piece) -> int:
    return len(piece[0])


def _slopes(
    model: PreTrainedModel, anatomy: Anatomy, layer: int, batch: Sequence[Piece], draws: torch.Generator
) -> Tensor:
    """The gradients [tokens, d_model] of a batch's summed surprise at the output of block ``layer``."""
    ids, counted = (torch.tensor(rows, device=model.device) for rows in zip(*batch, strict=True))
    with torch.enable_grad(), leaves_at(anatomy.blocks[layer]) as leaves:
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        surprise = cross_entropy(logits, _drawn(logits.detach(), draws), reduction="sum")
        (slopes,) = torch.autograd.grad(surprise, leaves[-1])
    return slopes[counted]


def _drawn(logits: Tensor, draws: torch.Generator) -> Tensor:
    """One token [P] for each row of logits [P, vocabulary], as the model would say it."""
    mass = logits.softmax(-1).cumsum(-1)
    point = next(uniform(len(mass), draws)).to(mass.device) * mass[:, -1:]
    return torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[-1] - 1).squeeze(1)
