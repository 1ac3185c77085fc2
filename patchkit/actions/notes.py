"""What a commit says beside its results: a recipe that one may not expect, and why a fact is not said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchkit.actions.workbench import Workbench
from patchkit.editing.many import described
from patchkit.editing.recipe import Recipe
from patchkit.editing.sinks import out_of_sinks
from patchkit.evaluation.measure import FactChange
from patchkit.models.tokens import last_subject_token
from patchkit.settings import FILE as SETTINGS

if TYPE_CHECKING:
    from patchkit.editing.statistics import Statistics
    from patchkit.repository import Repository

__all__ = ["many_facts", "short_text", "unread_settings", "why_unsaid"]


def unread_settings(repository: Repository) -> tuple[str, ...]:
    """Said where somebody may think that the recipe was another one."""
    if all(path != SETTINGS for _, path in repository.store.status()):
        return ()
    return (
        f"{SETTINGS} has changes that are not committed, and this edit used the recipe that is: "
        f"git commit {SETTINGS} before an edit that is to use them",
    )


def short_text(recipe: Recipe, statistics: Statistics | None) -> tuple[str, ...]:
    """Said where a corpus holds fewer tokens than the recipe asks for."""
    if (
        statistics is None
        or recipe.statistics_text == "self"
        or statistics.tokens >= recipe.statistics_tokens
    ):
        return ()
    return (
        f"statistics_text has {statistics.tokens} tokens for the {recipe.statistics_tokens} that "
        "statistics_tokens asks for, so C is of fewer; name a longer text",
    )


def many_facts(repository: Repository, count: int, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Said where the recipe is not that of a few facts, of what was not asked for otherwise."""
    named = {name.removesuffix("_") for name in overrides}
    kept = {name: value for name, value in repository.settings.many.items() if name not in named}
    many = f"{described(kept)} ([recipe.many] of {SETTINGS})"
    return (f"{count} facts in one batch were edited with {many}",)


def why_unsaid(bench: Workbench, changes: Sequence[FactChange], recipe: Recipe) -> tuple[str, ...]:
    """Why a fact did not take, or is preferred and still not said, where the reason is known."""
    unsaid = [change for change in changes if not (change.took and change.after.rewrite.says)]
    facts = [change.fact for change in unsaid]
    sinks = [text is not None for text in out_of_sinks(bench.model, bench.tokenizer, facts, recipe)]
    notes = []
    for change, sink in zip(unsaid, sinks, strict=True):
        if sink or last_subject_token(bench.tokenizer, change.fact) == 0:
            what = "is not said" if change.took else "did not take"
            where = " as it stands, where the text begins" if sink else ""
            notes.append(
                f"“{change.fact.text}” {what}{where}: its subject ends where every text of this model has "
                "the same state; put words in front of it"
            )
    return tuple(notes)
