"""What an editor is: a small class that turns facts into factors, found by its name.

Editors are registered by the entry point group ``patchkit.editors``; those of patchkit itself are
known without being installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from patchkit.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from patchkit.editing.batching import BatchSize
    from patchkit.editing.recipe import Recipe
    from patchkit.editing.statistics import Statistics
    from patchkit.factors import Delta, Solution
    from patchkit.facts import Fact

__all__ = ["Edited", "Editor", "editor_names", "find_editor"]

GROUP = "patchkit.editors"
_OWN = {"memit": "patchkit.editing.memit:Memit"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Edited:
    """What an edit gives: factors by parameter name, what they were solved from, and how it went.

    ``recipe`` is resolved: templates written, digest of C filled in. ``timings`` are seconds a
    phase; ``steps`` and ``losses`` are of each fact's target.
    """

    deltas: dict[str, Delta]
    solution: Solution
    recipe: Recipe
    timings: dict[str, float]
    steps: list[int]
    losses: list[float]


class Editor(Protocol):
    """Turns facts into factors. The model's weights are the same, bit for bit, before and after.

    ``unfinished`` is a folder of this machine that belongs to the weights as they are: an editor may
    keep there what the same edit need not do again after it was killed.
    """

    name: str

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        recipe: Recipe,
        statistics: Statistics | None = None,
        *,
        batch_size: BatchSize = "auto",
        unfinished: Path | None = None,
        progress: Progress | None = None,
    ) -> Edited: ...


def editor_names() -> list[str]:
    """The editors that can be named, in order."""
    return sorted({*_OWN, *(point.name for point in entry_points(group=GROUP))})


def find_editor(name: str) -> Editor:
    """The editor of that name. BadInput where there is none, Unavailable where it fails to load."""
    if name not in editor_names():
        raise BadInput(f"{name!r} is not an editor; there are {', '.join(editor_names())}")
    points = {point.name: point.value for point in entry_points(group=GROUP)} | _OWN
    module, _, attribute = points[name].partition(":")
    try:
        editor: Editor = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"editor {name!r} cannot be loaded ({error}); install its package again") from error
    return editor
