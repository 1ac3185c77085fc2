"""What MEND's hypernetwork is trained on: a fact, prompts that should say it, text that should stay as it is.

A page is a text with the positions at which what follows is read. Pages are replayed above the blocks that no
edit changes (`gradients.Feet`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from patchkit.editing.gradients import Feet
from patchkit.editing.templates import Passage, rewriting_passages
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.replay import Tail
from patchkit.models.tokens import begun_and_running, in_rows, tokenise

__all__ = ["Lesson", "Opened", "Page", "lessons_of", "opened", "pages_of"]

_PIECE = 64  # tokens of a running text that are read at once


@dataclass(frozen=True)
class Page:
    """``tokens``; the places in ``read`` say what comes next, which for a target are its ``labels``."""

    tokens: tuple[int, ...]
    read: tuple[int, ...]
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """A fact: ``said`` are its prompt and paraphrases, the target behind each; ``stays`` its neighbours."""

    said: tuple[Page, ...]
    stays: tuple[Page, ...]

    @property
    def edit(self) -> Page:
        """What the fact is edited in with."""
        return self.said[0]


def lessons_of(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    answers: Sequence[Sequence[str]],
    longest: int | None = None,
) -> list[Lesson]:
    """``answers``: those of each fact's neighbours, where known; else a neighbour is read at its end.

    BadInput names the fact where a text is too long for the model, or a target has no tokens.
    """
    edits = rewriting_passages(tokenizer, facts, ("{}",), longest)
    lessons = []
    for fact, (edit,), right in zip(facts, edits, answers, strict=True):
        said = [_page(fact, text, fact.target, tokenizer, longest) for text in fact.paraphrases]
        known = right or [""] * len(fact.neighbors)
        stays = [_page(fact, *pair, tokenizer, longest) for pair in zip(fact.neighbors, known, strict=True)]
        lessons.append(Lesson((_of_passage(edit), *said), tuple(stays)))
    return lessons


def pages_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Page]:
    """A running text in pieces, read at every token."""
    pieces = map(tuple, in_rows(*begun_and_running(tokenizer, text), _PIECE))
    return [Page(piece, tuple(range(len(piece)))) for piece in pieces]


def _of_passage(passage: Passage) -> Page:
    end = len(passage.tokens) - 1
    return Page(passage.tokens[:end], tuple(range(passage.target - 1, end)), passage.labels)


def _page(
    fact: Fact, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Page:
    (text,) = tokenise(tokenizer, [f"{prompt} {answer}" if answer else prompt])
    start = text.past(len(prompt))
    if not 0 < start <= len(text.ids) - bool(answer) or (longest is not None and len(text.ids) > longest):
        raise BadInput(
            f"fact {fact.subject!r}: the model cannot read {prompt[:60]!r}; shorten it, or leave it out"
        )
    if not answer:
        return Page(text.ids, (len(text.ids) - 1,))
    end = len(text.ids) - 1
    return Page(text.ids[:end], tuple(range(start - 1, end)), text.ids[start:])


@dataclass(frozen=True)
class Opened:
    """Pages ready to be replayed. Of the P places that are read: where they are among all tokens, the labels
    that are known (else 0), and the share of each in its own page's mean."""

    tail: Tail
    pages: int
    read: Tensor
    labels: Tensor
    share: Tensor

    def logits(self) -> Tensor:
        """[P, vocabulary] of the model as it is now."""
        states = self.tail.states(self.tail.hidden).flatten(0, 1)
        return self.tail.logits(states.index_select(0, self.read))

    def nll(self, logits: Tensor) -> Tensor:
        """Σ over pages of the mean over its labels of -log p."""
        return (self.share * cross_entropy(logits, self.labels, reduction="none")).sum()

    def kl(self, before: Tensor, now: Tensor) -> Tensor:
        """Σ over pages of the mean over its places of KL(before ‖ now), of log probabilities."""
        return (self.share * (before.exp() * (before - now)).sum(-1)).sum()

    def right(self, logits: Tensor) -> float:
        """How many pages have every label as the argmax."""
        wrong = (logits.argmax(-1) != self.labels).to(self.share) * self.share
        width = self.tail.mask.shape[1]
        of_page = torch.zeros(self.pages, dtype=wrong.dtype, device=wrong.device)
        return float((of_page.index_add(0, self.read // width, wrong) == 0).sum())

    def same(self, before: Tensor, now: Tensor) -> float:
        """Σ over pages of the share of its places whose most probable next token is still the same."""
        return float((self.share * (before.argmax(-1) == now.argmax(-1))).sum())


def opened(feet: Feet, pages: Sequence[Page]) -> Opened:
    """The pages, run up to the blocks that edits change."""
    tail = feet.tail([page.tokens for page in pages])
    width = tail.hidden.shape[1]
    read = [place * width + at for place, page in enumerate(pages) for at in page.read]
    labels = [label for page in pages for label in page.labels or (0,) * len(page.read)]
    share = [1 / len(page.read) for page in pages for _ in page.read]
    device, dtype = tail.hidden.device, tail.hidden.dtype
    return Opened(
        tail,
        len(pages),
        torch.tensor(read, device=device),
        torch.tensor(labels, device=device),
        torch.tensor(share, device=device, dtype=dtype),
    )
