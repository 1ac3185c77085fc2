"""Where things stand in a tokenised prompt: the subject's last token, the target's tokens.

Always from a fast tokenizer's offset mapping over the whole text, never by tokenising pieces and
joining them: pieces tokenise differently (a lost blank, a second start token, a SentencePiece
space), and the edit would land beside the subject.
"""

from __future__ import annotations

from typing import Any

from patchkit.errors import BadInput
from patchkit.facts import Fact

__all__ = ["encode", "last_subject_token", "split_target"]


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids with the tokenizer's own start tokens, and each one's (start, end) in characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets; "
            "load the model with a fast tokenizer (tokenizer.json)"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def split_target(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens of ``prompt`` and of the target that follows it after a space.

    A token that spans the border belongs to the target, so that the two lists joined are the
    tokens of the whole text.
    """
    ids, spans = encode(tokenizer, f"{prompt} {target}")
    border = next(i for i in range(len(ids)) if spans[i][1] > len(prompt) and spans[i][1] > spans[i][0])
    end = len(ids)
    while end > border + 1 and spans[end - 1][0] == spans[end - 1][1]:
        end -= 1  # an end-of-text token that the tokenizer appended is not part of the target
    return ids[:border], ids[border:end]


def last_subject_token(tokenizer: Any, fact: Fact) -> int:
    """Index of the token of the fact's prompt that covers the subject's last character."""
    subject_end = fact.prompt.index("{}") + len(fact.subject)
    _, spans = encode(tokenizer, fact.text)
    return max(i for i, (start, end) in enumerate(spans) if start < subject_end <= end)
