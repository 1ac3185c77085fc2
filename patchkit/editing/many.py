"""Other values of a recipe's fields for a batch of many facts, which get in one another's way.

They stand in ``[recipe.many]`` of patchkit.toml, with ``facts``, the size from which on a batch takes them.
How they were chosen: docs/recipes.md, "Many facts in one batch". No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchkit.editing.recipe import Recipe, format_layers
from patchkit.errors import BadInput

__all__ = ["SIZE", "described", "recipe_of_batch"]

SIZE = "facts"
"""The key in the table that says from how many facts on a batch is one of many."""
_FEWEST = 2


def recipe_of_batch(
    recipe: Recipe, many: Mapping[str, Any], facts: int, where: str = "[recipe.many]"
) -> Recipe:
    """``recipe`` for a batch of so many facts, with the table for large ones, which may be empty.

    BadInput names ``where`` and what is wrong in the table, whatever the batch.
    """
    if not many:
        return recipe
    changes = {name: value for name, value in many.items() if name != SIZE}
    if "method" in changes:
        raise BadInput(f"{where}: a large batch has the recipe's own method; leave out method")
    size = many.get(SIZE)
    if type(size) is not int or size < _FEWEST:
        said = "is missing" if size is None else f"is {size!r}"
        rule = f"set it to the size from which on a batch is large, a whole number from {_FEWEST} up"
        raise BadInput(f"{where}: {SIZE} {said}; {rule}")
    try:
        large = recipe.override(**changes)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    return large if facts >= size else recipe


def described(many: Mapping[str, Any]) -> str:
    """What differs, as a person reads it: "layers 1-8, λ 1500, shrinkage 0.15"."""
    said = []
    for name, value in many.items():
        if name == "layers" and not isinstance(value, str):
            value = format_layers(value)
        elif isinstance(value, float):
            value = f"{value:g}"
        if name != SIZE:
            said.append(f"{'λ' if name == 'lambda' else name} {value}")
    return ", ".join(said)
