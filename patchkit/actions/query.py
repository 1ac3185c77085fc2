"""Questions to the catalogue, once it is of HEAD and its history: words of facts, and SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchkit.database.questions import Answer, answer

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["search", "sql"]


def search(repository: Repository, text: str, *, everything: bool = False) -> list[dict[str, Any]]:
    """Facts in force (or of the whole history) whose words begin with those of ``text``."""
    tree = _indexed(repository)
    return repository.catalogue.search(text, None if everything else tree)


def sql(repository: Repository, query: str) -> Answer:
    """What one SQL select gives; BadInput where it is none or would write."""
    _indexed(repository)
    return answer(repository.catalogue.path, query)


def _indexed(repository: Repository) -> str:
    """The stack's tree, once the catalogue is of it and of its history."""
    stack = repository.stack()
    if not repository.catalogue.current(stack.tree, stack.commit):
        repository.catalogue.reindex(repository.store, norms=False)
    return stack.tree
