"""patchkit: Git for what a language model knows.

    import patchkit

    repository = patchkit.Repository.open("knowledge")
    repository.commit("facts.jsonl")
    model, tokenizer = repository.load()

`Repository`, `edit`, `Fact`, `Patch` and `PatchkitError` are the public Python interface; they are
imported when first used, so that `import patchkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit.actions.edit import edit
    from patchkit.algebra.factors import Patch
    from patchkit.errors import PatchkitError
    from patchkit.facts import Fact
    from patchkit.repository import Repository

__all__ = ["Fact", "Patch", "PatchkitError", "Repository", "edit"]

_HOMES = {
    "Fact": "patchkit.facts",
    "Patch": "patchkit.algebra.factors",
    "PatchkitError": "patchkit.errors",
    "Repository": "patchkit.repository",
    "edit": "patchkit.actions.edit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
