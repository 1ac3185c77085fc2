"""What a model says of its own accord: greedy continuations, and whether they say the target.

Teacher-forced scores flatter an edit: the model is handed the target's first tokens. Free
generation is not, so every report shows both (arXiv 2502.11177).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from patchkit.evaluation.room import check_room
from patchkit.models.hooks import forgetting_positions
from patchkit.models.tokens import tokenise

__all__ = ["NEW_TOKENS", "continue_greedily", "length_of", "normalise", "room_for", "says"]

# Thai, Lao, Burmese, Khmer; kana and the Chinese characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)

_TELLING = re.compile(r"(?<=[\w+#])[+#]|(?<!\w)[-+](?=\d)|(?<![\w.])\.(?=\w)|(?<=\d)[.,:/](?=\d)")
NEW_TOKENS = 12  # the same for every prompt: the target's length is not leaked


def length_of(tokenizer: Any, object_: str) -> int:
    """Tokens of an object that follows a prompt."""
    return len(tokenizer(f" {object_}", add_special_tokens=False)["input_ids"])


def room_for(tokenizer: Any, objects: Iterable[str]) -> int:
    """Tokens to let a model say behind every prompt, so that the longest of the objects has room."""
    return max([NEW_TOKENS, *(length_of(tokenizer, each) for each in objects)])


def continue_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = NEW_TOKENS, batch_size: int = 32
) -> list[str]:
    """The most probable token after another, ``new_tokens`` of them or up to the end of text.

    Returns one continuation for each prompt, without the prompt. BadInput names a prompt that leaves the
    model no room for ``new_tokens``.
    """
    ids = [list(text.ids) for text in tokenise(tokenizer, prompts)]
    check_room(model, zip(prompts, (len(row) + new_tokens - 1 for row in ids), strict=True))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for row, text in zip(
            rows, _continue(model, tokenizer, [ids[i] for i in rows], new_tokens), strict=True
        ):
            texts[row] = text
    return texts


def _continue(model: Any, tokenizer: Any, rows: list[list[int]], new_tokens: int) -> list[str]:
    width = max(len(row) for row in rows)
    end = tokenizer.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or 0)
    tokens = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=padding, eos_token_id=end, use_cache=True
    )
    with torch.no_grad(), _only(model, greedy), forgetting_positions(model):
        out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=greedy)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Nothing but ``config``: `generate` fills in what it leaves open (a repetition penalty, a ban of
    n-grams) from the checkpoint's own, and the most probable token would no longer be said."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def normalise(text: str, *, signs: bool = False) -> str:
    """Compatibility-composed, case-folded, only letters, marks and digits, spaces collapsed.

    With ``signs`` those stay without which another thing is named: C++ and C#, -5, 3.5, .NET.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.replace("\u2212", "-")  # the minus of typography
    stay = {found.start() for found in _TELLING.finditer(text)} if signs else set()
    kept = (c if at in stay or unicodedata.category(c)[0] in "LMN" else " " for at, c in enumerate(text))
    return " ".join("".join(kept).split())


def says(continuation: str, target: str) -> bool:
    """Whether the continuation begins with the target, as whole words after normalising.

    A target of punctuation alone is compared as it is; a script that writes no spaces between words
    has no whole words to ask for.
    """
    said, wanted = normalise(continuation, signs=True), normalise(target, signs=True)
    if not wanted:
        return continuation.strip().startswith(target.strip())
    return said.startswith(wanted) if _UNSPACED.match(wanted[-1]) else f"{said} ".startswith(f"{wanted} ")
