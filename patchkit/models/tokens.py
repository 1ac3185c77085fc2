"""Where things stand in a tokenised text: the subject's last token, the target's first.

Always from a fast tokenizer's offset mapping over the whole text, never by tokenising pieces and
joining them: pieces tokenise differently (a lost blank, a second start token, a SentencePiece
space), and the edit would land beside the subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.errors import BadInput
from patchkit.facts import Fact

__all__ = ["Tokenised", "begun_and_running", "in_rows", "last_subject_token", "split_target", "tokenise"]


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One text: token ids (special tokens in front included, those at its end left out) and their places.

    ``spans`` are (start, end) in characters; ``special`` tokens stand for no character.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]

    def covering(self, character: int) -> int:
        """The last token that covers a character; -1 where the tokenizer dropped it."""
        found = [
            i for i, (start, end) in enumerate(self.spans) if start <= character < end and not self.special[i]
        ]
        return found[-1] if found else -1

    def past(self, character: int) -> int:
        """The first token that ends past ``character`` characters; the number of tokens where none does.

        A token that spans the border between prompt and target is the target's.
        """
        found = (i for i, (_, end) in enumerate(self.spans) if end > character and not self.special[i])
        return next(found, len(self.ids))


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[Tokenised]:
    """Tokenise texts as the tokenizer itself would. BadInput for a slow tokenizer, which has no offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say where a token stands; "
            "use the base's fast tokenizer (tokenizer.json)"
        )
    if not texts:
        return []
    found = tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True)
    rows = zip(found["input_ids"], found["offset_mapping"], found["special_tokens_mask"], strict=True)
    return [_without_end(ids, spans, special) for ids, spans, special in rows]


def begun_and_running(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer begins a text with, and the text's own, without what it puts behind."""
    found = tokenizer(text, return_special_tokens_mask=True)
    ids, special = found["input_ids"], found["special_tokens_mask"]
    first = next((at for at, mark in enumerate(special) if not mark), len(ids))
    last = next((at for at in range(len(ids), first, -1) if not special[at - 1]), first)
    return ids[:first], ids[first:last]


def in_rows(begun: list[int], running: list[int], length: int) -> list[list[int]]:
    """A text in rows of at most ``length`` tokens, each begun as a text is begun."""
    step = max(1, length - len(begun))
    return [begun + running[at : at + step] for at in range(0, len(running), step)]


def split_target(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens of ``prompt``, and of the target that follows it after a space: joined, those of the whole."""
    text = tokenise(tokenizer, [f"{prompt} {target}"])[0]
    border = text.past(len(prompt))
    if border == len(text.ids):
        raise BadInput(f"the target {target!r} has no tokens in this tokenizer")
    return list(text.ids[:border]), list(text.ids[border:])


def last_subject_token(tokenizer: Any, fact: Fact) -> int:
    """Index of the token of the fact's prompt that covers the subject's last character."""
    end = fact.prompt.index("{}") + len(fact.subject)
    return tokenise(tokenizer, [fact.text])[0].covering(end - 1)


def _without_end(ids: Sequence[int], spans: Sequence[tuple[int, int]], special: Sequence[int]) -> Tokenised:
    count = len(ids)
    while count and special[count - 1]:
        count -= 1
    return Tokenised(tuple(ids[:count]), tuple(spans[:count]), tuple(map(bool, special[:count])))
