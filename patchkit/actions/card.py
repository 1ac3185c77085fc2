"""What a model card tells of patches in force: collected from the stack and from what was measured of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patchkit.actions.base import at_hand
from patchkit.actions.show import latest_results, recipe_line
from patchkit.errors import BadInput, NotFound
from patchkit.facts import Fact
from patchkit.models.wheels import MODELS
from patchkit.settings import FOLDER, Settings
from patchkit.shipping.card import Card, FactRow, PatchRow, WeightRow, markdown
from patchkit.stack import Stack, StoredPatch, find_patch

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["card", "card_of", "check_licence", "chosen_from"]

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+-]{0,63}")


def card(
    repository: Repository,
    words: Sequence[str] = (),
    revision: str = "HEAD",
    *,
    licence: str | None = None,
) -> str:
    """The card of the patches that ``words`` name (all in force where none is named), as Markdown.

    Loads no model: what it tells as measured was measured on this machine when the patches were made.
    """
    stack = chosen_from(repository.stack(revision), words)
    return markdown(card_of(repository, stack, revision, kind="patches", licence=licence))


def chosen_from(stack: Stack, words: Sequence[str]) -> Stack:
    """The stack with the named patches alone; NotFound where a word names none, or nothing is in force."""
    named = {patch.name: patch for patch in (find_patch(stack, word) for word in words)}
    chosen = named.values() if words else stack.patches
    if not chosen:
        raise NotFound(
            "no patch is in force, so there is nothing to ship; make one: patchkit commit facts.jsonl"
        )
    return replace(stack, patches=tuple(sorted(chosen, key=lambda stored: stored.name)))


def check_licence(licence: str | None) -> None:
    """BadInput for what is no licence's identifier."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise BadInput(
            f"--license {licence[:60]!r}: is no identifier; write one of SPDX's, such as apache-2.0"
        )


def card_of(repository: Repository, stack: Stack, revision: str, *, kind: str, licence: str | None) -> Card:
    """The card of a stack's patches; ``kind`` is what they are shipped as."""
    check_licence(licence)
    settings = repository.store.settings(revision)
    results = {stored.name: latest_results(repository, stored) for stored in stack.patches}
    rows = [row for stored in stack.patches for row in _facts(stored.facts, results[stored.name])]
    return Card(
        kind=kind,
        source=settings.base_source.removeprefix(FOLDER),
        revision=settings.base_revision if settings.base_on_hub else None,
        fingerprint=settings.base_fingerprint,
        commit=stack.commit,
        licence=licence or _licence_of(settings.base_source),
        patches=[
            PatchRow(p.name, p.id, recipe_line(p.header.method, p.header.recipe), len(p.facts))
            for p in stack.patches
        ],
        facts=rows,
        weights=_weights(stack.patches),
        measured=_measured([one for found in results.values() for one in found.values()], len(rows)),
        loader=_loader(repository, settings, kind),
    )


def _loader(repository: Repository, settings: Settings, kind: str) -> str:
    """The class that loads the base, where the card has a use for it and the base is at hand."""
    place = at_hand(repository, settings) if kind in ("peft", "build") else None
    if place is None:
        return Card.loader
    from patchkit.models.loading import loader_of, read_config

    try:
        return str(loader_of(read_config(place), place).__name__)
    except BadInput:  # a base that can be built on is not always one that transformers knows
        return Card.loader


def _licence_of(source: str) -> str | None:
    """The licence of a base with a short name, as hubs spell it; of others nothing is known."""
    model = MODELS.get(source)
    return None if model is None else model.licence.lower()


def _facts(facts: Sequence[Fact], results: Mapping[int, Mapping[str, Any]]) -> Iterator[FactRow]:
    for line, fact in enumerate(facts, 1):
        row = FactRow(fact.text, fact.target, fact.was, source=fact.source)
        if (found := results.get(line)) is not None:
            before, after = found["before"]["rewrite"], found["after"]["rewrite"]
            row = replace(row, before=before["target"], after=after["target"], says=after["text"])
        yield row


def _weights(patches: Sequence[StoredPatch]) -> list[WeightRow]:
    """Ranks add up over patches, to no more than a weight's own."""
    ranks: dict[str, int] = {}
    for stored in patches:
        for name, entry in stored.header.weights.items():
            ranks[name] = min(ranks.get(name, 0) + entry.rank, *entry.shape)
    return [WeightRow(name, rank) for name, rank in sorted(ranks.items())]


def _measured(results: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """Sums over what was measured of each fact when its patch was made."""
    if not results:
        return []
    prefers = sum(one["after"]["rewrite"]["prefers"] for one in results)
    says = sum(bool(one["after"]["rewrite"]["says"]) for one in results)
    lines = [
        f"Measured when each patch was made, on the model of that moment: {len(results)} of {count} facts.",
        f"The target is preferred: {prefers} of {len(results)}. Free generation says it: {says}.",
    ]
    for kind, told in (("paraphrases", "Paraphrases that prefer it"), ("neighbors", "Neighbours kept")):
        pairs = [
            (before, after)
            for one in results
            for before, after in zip(one["before"][kind], one["after"][kind], strict=True)
        ]
        good = sum(
            after["prefers"] if kind == "paraphrases" else before["next_token"] == after["next_token"]
            for before, after in pairs
        )
        if pairs:
            lines.append(f"{told}: {good} of {len(pairs)}.")
    return lines
