"""Whether what is asked of a model fits the positions that it has learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from patchkit.editing.recipe import positions
from patchkit.errors import BadInput
from patchkit.fact import shown

__all__ = ["check_room"]

_OFFSET = 2  # OPT's table has two more rows than positions


def check_room(model: Any, asked: Iterable[tuple[str, int]]) -> None:
    """BadInput names the first prompt of ``asked``, (prompt, tokens read in all), that is longer than that.

    Of a model that looks its positions up in a table; one that computes them reads on.
    """
    longest = positions(model.config)
    if longest is None or not _looked_up(model, longest):
        return
    for prompt, count in asked:
        if count > longest:
            raise BadInput(
                f"{shown(prompt)}: {count} tokens with what is to follow, but the model reads {longest}; "
                "shorten the prompt"
            )


def _looked_up(model: Any, longest: int) -> bool:
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return any(
        table is not words and longest <= table.num_embeddings <= longest + _OFFSET for table in tables
    )
