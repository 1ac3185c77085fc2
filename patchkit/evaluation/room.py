"""Whether what is asked of a model fits what it reads at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from patchkit.editing.recipe import positions
from patchkit.errors import BadInput
from patchkit.fact import shown

__all__ = ["check_room"]


def check_room(model: Any, asked: Iterable[tuple[str, int]]) -> None:
    """BadInput names the first prompt of ``asked``, (prompt, tokens read in all), that is longer than that.

    Learned positions have nothing to look up there; a model with others was never trained there.
    """
    longest = positions(model.config)
    for prompt, count in asked:
        if longest is not None and count > longest:
            raise BadInput(
                f"{shown(prompt)}: {count} tokens with what is to follow, but the model reads {longest}; "
                "shorten the prompt"
            )
