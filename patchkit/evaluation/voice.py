"""A model to be asked: how it scores objects, and what it says. Loaded, or as it was asked before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any, Protocol

from patchkit.evaluation.answers import Answers
from patchkit.evaluation.generation import continue_greedily, length_of
from patchkit.evaluation.likelihood import Score, score_targets

__all__ = ["Loaded", "Remembered", "Voice"]


class Voice(Protocol):
    """What an evaluation asks of a model."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Of each (prompt, object), as `score_targets`."""
        ...

    def say(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """After each prompt, as `continue_greedily`."""
        ...

    def length(self, object_: str) -> int:
        """Tokens of an object that follows a prompt."""
        ...


class Loaded:
    """A model and its tokenizer in memory."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        return score_targets(self.model, self.tokenizer, pairs)

    def say(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        return continue_greedily(self.model, self.tokenizer, prompts, new_tokens=new_tokens)

    def length(self, object_: str) -> int:
        return length_of(self.tokenizer, object_)


class Remembered:
    """A model that is asked only what ``answers`` do not hold, and is not loaded (``load``) before that.

    What is asked anew runs in batches of its own, so its last digits may differ from those of a run that
    asks everything at once.
    """

    def __init__(self, answers: Answers, tokenizer: Any, load: Callable[[], Any]) -> None:
        self.answers, self.tokenizer, self._load = answers, tokenizer, load

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        known = self.answers.scores
        if missing := [pair for pair in dict.fromkeys(pairs) if pair not in known]:
            found = Loaded(self._load(), self.tokenizer).score(missing)
            known.update(zip(missing, map(astuple, found), strict=True))
        return [Score(*known[pair]) for pair in pairs]

    def say(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        known = self.answers.texts
        if missing := [prompt for prompt in dict.fromkeys(prompts) if (prompt, new_tokens) not in known]:
            found = Loaded(self._load(), self.tokenizer).say(missing, new_tokens)
            known.update(((prompt, new_tokens), text) for prompt, text in zip(missing, found, strict=True))
        return [known[prompt, new_tokens] for prompt in prompts]

    def length(self, object_: str) -> int:
        return length_of(self.tokenizer, object_)
