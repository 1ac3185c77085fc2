"""One patch, in full: its facts with what was measured of them, its weights, its recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from patchkit.editing.recipe import format_layers
from patchkit.errors import NotFound, PatchkitError
from patchkit.facts import Fact
from patchkit.git.history import Commit
from patchkit.patch import SCALE
from patchkit.stack import StoredPatch, find_patch

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Shown", "Weight", "latest_results", "recipe_line", "show"]


@dataclass(frozen=True)
class Weight:
    """‖ΔW‖ (Frobenius) of one weight, and its share of the base weight's norm where that is known here."""

    name: str
    rank: int
    norm: float
    share: float | None


@dataclass(frozen=True)
class Shown:
    """What ``patchkit show`` says; ``results`` by line, empty where nothing was measured on this machine."""

    name: str
    id: str
    base: str
    commit: str | None
    date: datetime | None
    author: str | None
    size: int
    method: str
    recipe: Mapping[str, Any]
    facts: tuple[Fact, ...]
    results: Mapping[int, Mapping[str, Any]]
    weights: tuple[Weight, ...]
    claimed: str | None
    """What the commit that made this version says of all its facts; anybody can write that."""

    @property
    def recipe_line(self) -> str:
        return recipe_line(self.method, self.recipe)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "id": self.id,
            "base": self.base,
            "commit": self.commit,
            "date": None if self.date is None else self.date.isoformat(),
            "author": self.author,
            "size": self.size,
            "method": self.method,
            "recipe": dict(self.recipe),
            "facts": [
                {
                    "line": line,
                    "id": fact.id,
                    **json.loads(fact.to_line()),
                    "measured": self.results.get(line),
                }
                for line, fact in enumerate(self.facts, 1)
            ],
            "weights": [asdict(weight) for weight in self.weights],
            "claimed": self.claimed,
        }


def show(repository: Repository, word: str | None = None, revision: str = "HEAD") -> Shown:
    """A patch in force at ``revision``, by folder name or slug; the newest where none is named."""
    stack = repository.stack(revision)
    history = repository.store.history(revision)
    dated = stack.by_date(history)
    if not dated:
        raise NotFound("no patch is in force; make one: patchkit commit facts.jsonl")
    stored = find_patch(stack, word) if word else dated[-1][0]
    commit = {patch.name: commit for patch, commit in dated}[stored.name]
    return Shown(
        name=stored.name,
        id=stored.id,
        base=stored.header.base,
        commit=commit.id if commit else None,
        date=commit.date if commit else None,
        author=commit.author if commit else None,
        size=stored.size,
        method=stored.header.method,
        recipe=stored.header.recipe,
        facts=stored.facts,
        results=latest_results(repository, stored),
        weights=tuple(_weights(repository, stored)),
        claimed=_claimed(history, stored),
    )


def _claimed(history: Sequence[Commit], stored: StoredPatch) -> str | None:
    """From the newest commit that made this version alone: of several patches its sums are of all."""
    for commit in history:
        ids = [value for key, value in commit.trailers if key == "Patchkit-Id"]
        if ids == [stored.id]:
            return dict(commit.trailers).get("Patchkit-Results")
    return None


def recipe_line(method: str, recipe: Mapping[str, Any]) -> str:
    """The editor with the numbers that tell most, as far as the recipe has them."""
    layers = recipe.get("layers")  # a stranger's recipe may hold anything
    numbers = ""
    if isinstance(layers, list) and layers and all(isinstance(layer, int) for layer in layers):
        numbers = f"layers {format_layers(layers)}"
    named = {"lambda": "λ", "shrinkage": "shrinkage", "context_weight": "context weight", SCALE: "scaled by"}
    told = ((word, recipe.get(name)) for name, word in named.items())
    rest = [f"{word} {_shown(value)}" for word, value in told if isinstance(value, int | float) and value]
    return ", ".join(part for part in (method, numbers, *rest) if part)


def _shown(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:  # JSON's whole numbers have no end
        return "out of bounds"


def latest_results(repository: Repository, stored: StoredPatch) -> dict[int, Mapping[str, Any]]:
    """The newest result of each line of a version, as far as it was measured on this machine."""
    found: dict[int, Mapping[str, Any]] = {}
    for row in repository.catalogue.results(stored.id):
        found.setdefault(row["line"], {"before": row["before"], "after": row["after"], "date": row["date"]})
    return found


def _weights(repository: Repository, stored: StoredPatch) -> list[Weight]:
    """From the catalogue where it knows the norms, else from the factors."""
    known = {row["weight"]: row for row in repository.catalogue.layers(stored.id)}
    if any(known.get(name, {}).get("norm") is None for name in stored.header.weights):
        norms = repository.patch(stored).norms()
        with suppress(PatchkitError):  # kept, so that torch need not be loaded for them again
            repository.catalogue.record_norms(stored.id, norms, stored.header.base, {})
        of_base = repository.catalogue.base_norms(stored.header.base)
        return [
            Weight(name, entry.rank, norms[name], norms[name] / of_base[name] if of_base.get(name) else None)
            for name, entry in sorted(stored.header.weights.items())
        ]
    return [
        Weight(name, entry.rank, known[name]["norm"], known[name]["share"])
        for name, entry in sorted(stored.header.weights.items())
    ]
