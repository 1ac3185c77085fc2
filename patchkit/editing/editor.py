"""What an editor is: a small class that turns facts into factors, found by its name.

Editors are registered by the entry point group ``patchkit.editors``; those of patchkit itself are
known without being installed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from patchkit.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from patchkit.algebra.factors import Delta, Solution
    from patchkit.editing.batching import BatchSize
    from patchkit.editing.recipe import Recipe
    from patchkit.editing.statistics import Statistics
    from patchkit.facts import Fact

__all__ = [
    "Below",
    "Edited",
    "Editor",
    "Refitter",
    "Trained",
    "about",
    "editor_names",
    "find_editor",
    "foreign_editors",
]

GROUP = "patchkit.editors"
_OWN = {
    "alphaedit": "patchkit.editing.alphaedit:AlphaEdit",
    "emmet": "patchkit.editing.emmet:Emmet",
    "encore": "patchkit.editing.encore:Encore",
    "ft": "patchkit.editing.finetune:FineTune",
    "memit": "patchkit.editing.memit:Memit",
    "mend": "patchkit.editing.mend:Mend",
    "rome": "patchkit.editing.rome:Rome",
    "ultraedit": "patchkit.editing.ultraedit:UltraEdit",
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Edited:
    """What an edit gives: factors by parameter name, what they were solved from, and how it went.

    ``solution`` is None for an editor that has no keys. ``recipe`` is resolved: templates written, digest of
    C filled in. ``timings`` are seconds a phase; ``steps`` and ``losses`` are of each fact's target.
    """

    deltas: dict[str, Delta]
    solution: Solution | None
    recipe: Recipe
    timings: dict[str, float]
    steps: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Below:
    """A patch that is on the model while an edit is solved, by parameter names.

    ``weights`` are those that it changes, ``keys`` [N, d_in] those of its facts at each. They are None
    where ``why`` says why there are none.
    """

    name: str
    weights: frozenset[str]
    keys: Mapping[str, Tensor] | None
    why: str = ""


class Editor(Protocol):
    """Turns facts into factors. The model's weights are the same, bit for bit, before and after.

    ``below`` are the patches that are on the model. ``unfinished`` is a folder of this machine that belongs
    to the weights as they are: an editor may keep there what the same edit need not do again after it was
    killed.
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
        below: Sequence[Below] = (),
        batch_size: BatchSize = "auto",
        unfinished: Path | None = None,
        progress: Progress | None = None,
    ) -> Edited: ...


@runtime_checkable
class Refitter(Protocol):
    """An editor that can solve facts again for targets it found before, on another model: no optimising,
    but for the facts whose places are in ``anew``. The weights stay as they are, as for an `Editor`."""

    def refit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        targets: Tensor,
        recipe: Recipe,
        statistics: Statistics | None = None,
        *,
        below: Sequence[Below] = (),
        anew: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Edited: ...


@runtime_checkable
class Trained(Protocol):
    """An editor that was trained on the base beforehand."""

    def load(self, folder: Path, base: str, recipe: Recipe) -> Recipe:
        """Read what was trained on ``base`` (`Checkpoint.as_read`) for ``recipe``, from the folder of
        statistics; the recipe that names it.

        NotFound where nothing was, BadInput where it is not what the recipe names; both say how to train it.
        """


def editor_names() -> list[str]:
    """The editors that can be named, in order."""
    return sorted({*_OWN, *(point.name for point in entry_points(group=GROUP))})


def foreign_editors() -> set[str]:
    """Those that are not patchkit's own."""
    return set(editor_names()) - set(_OWN)


def about(name: str) -> str:
    """The first line of what the editor of that name says of itself. As `find_editor`.

    Read in its source where there is one, so that nothing has to be loaded: torch takes seconds.
    """
    module, attribute = _place(name)
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    said = None
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        body = ast.parse(Path(spec.origin).read_bytes()).body
        classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        said = ast.get_docstring(classes[attribute]) if attribute in classes else None
    return (said or inspect.getdoc(type(find_editor(name))) or "").split("\n", 1)[0]


def _place(name: str) -> tuple[str, str]:
    """Module and class of the editor of that name."""
    if name not in editor_names():
        raise BadInput(f"{name!r} is not an editor; there are {', '.join(editor_names())}")
    points = {point.name: point.value for point in entry_points(group=GROUP)} | _OWN
    module, _, attribute = points[name].partition(":")
    return module, attribute


def ready_editor(recipe: Recipe, folder: Path, base: Callable[[], str]) -> tuple[Editor, Recipe]:
    """The editor of a recipe, with what it was trained to on ``base``, if it was; and the recipe that names
    that. ``folder`` holds the statistics; ``base``, called where something is sought, gives
    `Checkpoint.as_read`. As `find_editor` and `Trained.load`."""
    editor = find_editor(recipe.method)
    return editor, editor.load(folder, base(), recipe) if isinstance(editor, Trained) else recipe


def find_editor(name: str) -> Editor:
    """The editor of that name. BadInput where there is none, Unavailable where it fails to load."""
    module, attribute = _place(name)
    try:
        editor: Editor = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"editor {name!r} cannot be loaded ({error}); install its package again") from error
    return editor
