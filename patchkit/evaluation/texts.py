"""Two models on running text: KL of their next-token distributions, and the perplexity of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from patchkit.editing.recipe import positions
from patchkit.errors import BadInput, NotFound
from patchkit.evaluation.reading import Reading, mean_of_all
from patchkit.models.tokens import begun_and_running, in_rows
from patchkit.problem import one_line

__all__ = [
    "WINDOW",
    "Divergence",
    "compare_on",
    "read_bytes",
    "read_text",
    "text_of",
    "window_of",
    "windows",
]

WINDOW = 256
"""Tokens of a text that are read at once."""
TEXT_TOKENS = 4096
"""Tokens of a text that are read in all."""
_HELD = 512  # positions whose logits are held while the weights are exchanged

Progress = Callable[[int, int], None]


class Exchange(Protocol):
    """A model whose weights can be exchanged in place (`actions.workbench.Workbench`)."""

    model: Any

    def use(self, weights: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Divergence:
    """KL(p_A ‖ p_B) of the two models' next-token distributions in nats: mean and largest over the positions
    of ``text`` (what was read, in words); and each model's perplexity there, exp of the mean negative
    log-likelihood of the tokens that follow (None where none follows).

    ``low`` and ``high`` bound the mean, ``times_low`` and ``times_high`` the second perplexity as a multiple
    of the first: in 95 of 100 cases, rows of the text drawn again. None where one row is all there is.
    """

    text: str
    positions: int
    mean: float
    low: float | None
    high: float | None
    largest: float
    perplexity_old: float | None
    perplexity_new: float | None
    times_low: float | None
    times_high: float | None


def read_text(path: str) -> str:
    """A file of UTF-8 text to compare models on; BadInput where there is none in it."""
    text = text_of(read_bytes(path), path)
    if not text.strip():
        raise BadInput(f"{one_line(path)}: holds no text; name a file with some")
    return text


def read_bytes(path: str) -> bytes:
    """A file's bytes. NotFound, BadInput."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{one_line(path)}: there is no such file; name a readable one") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"{one_line(path)}: cannot be read ({reason}); name a readable file") from None


def text_of(data: bytes, path: str) -> str:
    """A file's bytes as text; BadInput names the line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{one_line(path)}:{line}: is not UTF-8; save it as UTF-8") from None


def window_of(config: Any) -> int:
    """How many tokens a model reads at once: WINDOW, or as many as it has positions for."""
    return min(WINDOW, positions(config) or WINDOW)


def windows(tokenizer: Any, name: str, text: str, length: int = WINDOW) -> tuple[str, list[list[int]]]:
    """What of ``text`` is read, in words, and its rows of at most ``length`` tokens."""
    begun, running = begun_and_running(tokenizer, text)
    cut = "" if len(running) <= TEXT_TOKENS else f", its first {TEXT_TOKENS} tokens"
    return f"{name}{cut}", in_rows(begun, running[:TEXT_TOKENS], length)


def compare_on(
    bench: Exchange,
    sides: Sequence[Mapping[str, Tensor]],
    name: str,
    rows: Sequence[list[int]],
    progress: Progress | None = None,
) -> Divergence:
    """Both sets of weights on the same rows of tokens (none of them empty), float32."""
    told = progress or (lambda done, total: None)
    divergences: list[tuple[float, int]] = []  # of each row: the sum, and over how many positions
    largest: list[float] = []
    losses: list[tuple[float, float]] = []
    tokens: list[int] = []
    batches = list(_batches(rows))
    for number, batch in enumerate(batches):
        told(number, len(batches))
        logits = []
        for weights in sides:
            bench.use(weights)
            logits.append([_log_probabilities(bench.model, row) for row in batch])
        for row, p, q in zip(batch, *logits, strict=True):
            values = (p.exp() * (p - q)).sum(-1).clamp_min(0).double()
            divergences.append((float(values.sum()), len(values)))
            largest.append(float(values.max()))
            losses.append((_loss(p, row), _loss(q, row)))
            tokens.append(len(row) - 1)
    told(len(batches), len(batches))
    old, new = (Reading(found, tuple(tokens)) for found in zip(*losses, strict=True))
    kl, times = mean_of_all(*zip(*divergences, strict=True)), new.times(old)
    return Divergence(
        name,
        sum(positions for _, positions in divergences),
        kl.value,
        *_known(kl.low, kl.high),
        float(np.max(largest)),
        *_known(old.perplexity, new.perplexity),
        *_known(times.low, times.high),
    )


def _loss(log_p: Tensor, row: Sequence[int]) -> float:
    """The negative log-likelihood of a row's tokens but the first, summed; [tokens, vocabulary] given."""
    following = torch.tensor(row[1:], dtype=torch.long, device=log_p.device)
    return -math.fsum(log_p[:-1].gather(-1, following[:, None]).flatten().tolist())


def _known(one: float, other: float) -> tuple[float | None, float | None]:
    """Both, None for a NaN."""
    return None if math.isnan(one) else one, None if math.isnan(other) else other


def _log_probabilities(model: Any, row: list[int]) -> Tensor:
    """[tokens, vocabulary], float32."""
    with torch.no_grad():
        ids = torch.tensor([row], device=model.device)
        return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)


def _batches(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Rows in order, about _HELD positions together."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and sum(map(len, batch)) + len(row) > _HELD:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
