"""The same prompt to the base and to the stack: what each says, and how probable its next words are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from patchkit.actions.workbench import Workbench
from patchkit.editing.recipe import positions
from patchkit.errors import BadInput
from patchkit.evaluation.generation import continue_greedily
from patchkit.models.tokens import tokenise

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Answer", "Said", "ask"]


@dataclass(frozen=True)
class Said:
    """One model's answer: a greedy continuation, and the most probable next tokens."""

    text: str
    next: tuple[tuple[str, float], ...]
    """(token as text, probability), most probable first."""


@dataclass(frozen=True)
class Answer:
    """One prompt, asked of the base and of the stack."""

    prompt: str
    base: Said
    stack: Said

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask(
    repository: Repository,
    prompts: Sequence[str],
    *,
    revision: str = "HEAD",
    new_tokens: int = 24,
    top: int = 5,
    device: str = "auto",
) -> list[Answer]:
    """Ask every prompt of the base and of base and stack at ``revision``, computed in float32.

    BadInput names the place of a prompt that leaves the model no room for ``new_tokens``.
    """
    stack = repository.stack(revision)
    bench = repository.workbench(device)
    _check_room(bench, prompts, new_tokens)
    base = _answers(bench, prompts, new_tokens, top)
    bench.put(repository.patches(stack).values())
    edited = _answers(bench, prompts, new_tokens, top)
    return [Answer(*triple) for triple in zip(prompts, base, edited, strict=True)]


def _check_room(bench: Workbench, prompts: Sequence[str], new_tokens: int) -> None:
    longest = positions(bench.model.config)
    for place, prompt in enumerate(prompts, 1):
        count = len(tokenise(bench.tokenizer, [prompt])[0].ids)
        if not count:
            raise BadInput(f"prompt {place}: has no tokens; ask something")
        if longest is not None and count + new_tokens - 1 > longest:  # the last one is said, not read
            raise BadInput(
                f"prompt {place}: {count} tokens and {new_tokens} to come, but the model reads {longest}; "
                "shorten it, or let it say less with --tokens"
            )


def _answers(bench: Workbench, prompts: Sequence[str], new_tokens: int, top: int) -> list[Said]:
    texts = continue_greedily(bench.model, bench.tokenizer, prompts, new_tokens)
    return [Said(text, _next(bench, prompt, top)) for prompt, text in zip(prompts, texts, strict=True)]


def _next(bench: Workbench, prompt: str, top: int) -> tuple[tuple[str, float], ...]:
    ids = torch.tensor([tokenise(bench.tokenizer, [prompt])[0].ids], device=bench.model.device)
    with torch.no_grad():
        logits = bench.model(input_ids=ids, use_cache=False).logits[0, -1].float()
    probabilities, tokens = logits.softmax(-1).topk(min(top, logits.shape[-1]))
    pairs = zip(tokens.tolist(), probabilities.tolist(), strict=True)
    return tuple((bench.tokenizer.decode([token]), probability) for token, probability in pairs)
