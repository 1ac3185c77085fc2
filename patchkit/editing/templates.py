"""The texts in which a fact is said, and where its subject and target stand among their tokens.

A text is tokenised whole, once, with offsets: the target begins at the first token that ends past
the prompt, the subject ends with the token that covers its last character. That holds for BPE and
SentencePiece alike, with whatever special tokens the tokenizer itself puts in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.editing.corpus import sample
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.wordings import wordings_of
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.past import Row
from patchkit.models.tokens import tokenise

__all__ = ["Passage", "drift_passages", "plain", "rewriting_passages", "write_templates"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A tokenised text.

    ``subject`` is the index of the subject's last token, ``target`` that of the first target token; a
    text without a target has ``target`` past its end.
    """

    tokens: tuple[int, ...]
    subject: int
    target: int

    def row(self, group: int) -> Row:
        """What a teacher-forced loss needs: all tokens but the last, cut at the subject's last token."""
        end = max(len(self.tokens) - 1, self.subject + 1)
        return Row(self.tokens[: self.subject], self.tokens[self.subject : end], group)

    def to_subject(self, group: int) -> Row:
        """The text up to the subject's last token and no further."""
        return Row(self.tokens[: self.subject], (self.tokens[self.subject],), group)

    @property
    def whole(self) -> Passage:
        """The same text replayed from its first token, for weights that act on all of them."""
        return replace(self, subject=0)

    @property
    def labels(self) -> tuple[int, ...]:
        return self.tokens[self.target :]

    @property
    def read(self) -> range:
        """Positions in the row's suffix whose next token is a target token."""
        return range(self.target - 1 - self.subject, len(self.tokens) - 1 - self.subject)


def write_templates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> tuple[str, ...]:
    """The bare "{}", and texts that the model writes itself, each followed by ". {}".

    Short continuations of the recipe's openings, sampled among the ``context_top_k`` most probable
    tokens, seeded; duplicates are left out.
    """
    longest = positions(model.config)
    if recipe.contexts and longest and recipe.context_tokens > longest:
        raise BadInput(
            f"context_tokens = {recipe.context_tokens}: the base has {longest} positions; choose fewer, "
            "--set context_tokens=10 or in patchkit.toml"
        )
    openings = [
        tokenise(tokenizer, [recipe.context_openings[index % len(recipe.context_openings)]])[0].ids
        for index in range(recipe.contexts)
    ]
    generator = torch.Generator().manual_seed(recipe.context_seed)
    points = [
        torch.rand(max(recipe.context_tokens - len(opening), 0), generator=generator) for opening in openings
    ]
    texts: dict[int, str] = {}
    for length in {len(opening): None for opening in openings}:  # those of one length are written together
        places = [place for place, opening in enumerate(openings) if len(opening) == length]
        start = torch.tensor([openings[place] for place in places])
        own = iter(torch.stack([points[place] for place in places], 1).unsqueeze(-1))
        tokens = sample(model, start, recipe.context_tokens, own, top_k=recipe.context_top_k)
        texts |= zip(places, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True)
    plain = (texts[place].replace("{", " ").replace("}", " ").split() for place in range(recipe.contexts))
    templates = ["{}", *(" ".join(words) + ". {}" for words in plain)]
    return tuple(dict.fromkeys(templates))


def rewriting_passages(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    templates: Sequence[str],
    longest: int | None = None,
    wordings: int = 0,
) -> list[list[Passage]]:
    """For each fact its prompt and target in every template: [fact][template].

    Its wordings, its own and at most ``wordings`` that other facts lend it, take turns; the first template
    holds its own. BadInput names the fact where subject and target share a token, or the text is too long.
    """
    texts = [
        _place(template, prompts[place % len(prompts)], fact.subject)
        for fact, prompts in zip(facts, wordings_of(facts, wordings), strict=True)
        for place, template in enumerate(templates)
    ]
    whole = [
        text + " " + fact.target
        for fact, text in zip(_repeat(facts, len(templates)), _texts(texts), strict=True)
    ]
    passages = _tokenise(tokenizer, whole, [end for _, end in texts], [len(text) for text in _texts(texts)])
    for fact, passage in zip(_repeat(facts, len(templates)), passages, strict=True):
        _check(fact, passage, longest)
    return [passages[i : i + len(templates)] for i in range(0, len(passages), len(templates))]


def plain(rewriting: Sequence[Sequence[Passage]], drift: Sequence[Passage]) -> list[list[Any]]:
    """Of each fact all passages as JSON has them, to name what was found on them."""
    return [
        [[list(text.tokens), text.subject, text.target] for text in (*texts, last)]
        for texts, last in zip(rewriting, drift, strict=True)
    ]


def drift_passages(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], prompt: str, longest: int | None = None
) -> list[Passage]:
    """For each fact the text whose next-token distribution should not drift ("{subject} is a").

    BadInput where one has more than ``longest`` tokens.
    """
    texts = [_place("{}", prompt, fact.subject) for fact in facts]
    ends = [end for _, end in texts]
    passages = _tokenise(tokenizer, _texts(texts), ends, [len(text) for text in _texts(texts)])
    for fact, passage in zip(facts, passages, strict=True):
        _check_subject(fact, passage)
        if longest is not None and len(passage.tokens) > longest:
            raise BadInput(
                f"kl_prompt: with {fact.subject!r} it has {len(passage.tokens)} tokens, but the model reads "
                f"{longest}; shorten it"
            )
    return passages


def _place(template: str, prompt: str, subject: str) -> tuple[str, int]:
    """The text, and the index of the subject's last character in it."""
    before = template.index("{}") + prompt.index("{}")
    return template.replace("{}", prompt.replace("{}", subject)), before + len(subject) - 1


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], subjects: Sequence[int], prompts: Sequence[int]
) -> list[Passage]:
    return [
        Passage(text.ids, text.covering(subject), text.past(prompt))
        for text, subject, prompt in zip(tokenise(tokenizer, texts), subjects, prompts, strict=True)
    ]


def _check_subject(fact: Fact, passage: Passage) -> None:
    if passage.subject < 0:
        raise BadInput(
            f"fact {fact.subject!r}: the tokenizer drops the subject's last character; write it differently"
        )


def _check(fact: Fact, passage: Passage, longest: int | None) -> None:
    _check_subject(fact, passage)
    if passage.target >= len(passage.tokens):
        raise BadInput(f"fact {fact.subject!r}: the target {fact.target!r} has no tokens in this tokenizer")
    if passage.subject >= passage.target:
        raise BadInput(
            f"fact {fact.subject!r}: subject and target {fact.target!r} share a token; "
            "put words between them in the prompt"
        )
    if longest is not None and len(passage.tokens) > longest:
        raise BadInput(
            f"fact {fact.subject!r}: {len(passage.tokens)} tokens, but the model reads {longest}; "
            "shorten the prompt"
        )


def _repeat(facts: Sequence[Fact], times: int) -> list[Fact]:
    return [fact for fact in facts for _ in range(times)]


def _texts(placed: Sequence[tuple[str, int]]) -> list[str]:
    return [text for text, _ in placed]
