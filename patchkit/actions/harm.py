"""Measures what stacks do to everything else (`evaluation.harm`), each stack once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from patchkit.actions.asking import Asking
from patchkit.editing.recipe import Recipe
from patchkit.editing.written import kept_text, text_for
from patchkit.errors import PatchkitError
from patchkit.evaluation.answers import FOLDER
from patchkit.evaluation.harm import Harm, growths, read

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from patchkit.actions.workbench import Workbench
    from patchkit.repository import Repository

__all__ = ["TEXT", "Stacked", "asking_of", "harm_of", "moved", "own_text"]

Stacked = tuple[Collection[str], Mapping[str, "Tensor"]]

TEXT = Recipe(layers=(0,), lambda_=1.0, statistics_tokens=1024, statistics_length=32, statistics_seed=1)
"""How much text the base writes for this; its seed is another than that of a recipe's statistics."""


def harm_of(asking: Asking, stacks: Sequence[Stacked], statistics: Path) -> list[Harm]:
    """Of each stack on the base: the ids of its patches, and the weights that they make (`stacked_weights`).

    Growth is over the weights that any of them edits.

    ``statistics`` is the folder that keeps the base's text. What is asked for the first time is asked of the
    model, on which other patches may be afterwards.
    """
    documents = own_text(asking, statistics)
    found = []
    for ids, edited in (((), {}), *stacks):
        voice = asking.voice(ids, edited)
        found.append(read(voice, documents))
        with suppress(PatchkitError):  # what cannot be kept costs only time
            voice.answers.keep()
    sizes = growths(asking.checkpoint.read, [edited for _, edited in stacks])
    base, *edited_ones = found
    return [Harm(reading, base, size) for reading, size in zip(edited_ones, sizes, strict=True)]


def asking_of(repository: Repository, bench: Workbench) -> Asking:
    """To ask stacks of a repository whose base is in memory."""
    folder = repository.store.private / FOLDER
    return Asking(bench.checkpoint, str(bench.model.device), folder, lambda phase, done, total: None, bench)


def moved(repository: Repository, asking: Asking, before: Stacked, after: Stacked) -> tuple[Harm, Harm]:
    """`harm_of` two stacks of a repository."""
    one, other = harm_of(asking, (before, after), repository.store.private / "statistics")
    return one, other


def own_text(asking: Asking, folder: Path) -> Sequence[str]:
    """What the base wrote once for this; kept in ``folder``."""
    base = asking.checkpoint.as_read()
    kept = kept_text(TEXT, folder, base)
    if kept is not None:
        return kept
    asking.bench.use({})
    write = partial(text_for, asking.bench.model, asking.tokenizer, TEXT)
    try:
        return list(write(folder=folder, base=base))
    except (OSError, PatchkitError):  # a repository that takes no writes can still be evaluated
        return list(write())
