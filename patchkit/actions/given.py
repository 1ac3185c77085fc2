"""The facts that a commit is given, checked before anything that multiplies is imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, PatchkitError
from patchkit.facts import Batch, Fact, FactsError, Key, clashes, parse_records, read_facts

__all__ = ["Facts", "as_batch", "checked"]

Facts = str | Path | Batch | Fact | Mapping[str, Any] | Sequence[Fact] | Sequence[Mapping[str, Any]]


def as_batch(facts: Facts) -> Batch:
    """Facts from a file, or checked as if they stood in one; FactsError lists every fault."""
    if isinstance(facts, Batch):
        return facts
    if isinstance(facts, (str, Path)):
        return read_facts(facts)
    listed = [facts] if isinstance(facts, (Fact, Mapping)) else facts
    if not isinstance(listed, Iterable):
        raise BadInput(
            f"{type(facts).__name__}: is no facts; give a file's path, or a list of facts or dicts"
        )
    return parse_records(json.loads(fact.to_line()) if isinstance(fact, Fact) else fact for fact in listed)


def checked(read: Callable[[], Batch], in_force: Callable[[], Mapping[Key, tuple[str, Fact]]]) -> Batch:
    """What ``read`` gives, where nothing speaks against it; FactsError lists its own faults and its
    clashes with the facts in force together, by line."""
    try:
        batch = read()
    except FactsError as error:
        if error.batch is None:
            raise
        try:
            found = [*error.faults, *clashes(error.batch, in_force())]
        except PatchkitError:  # no stack to compare with: the file's own faults come first
            raise error from None
        raise FactsError(sorted(found, key=lambda f: (f.line is None, f.line or 0)), error.batch) from None
    if faults := clashes(batch, in_force()):
        raise FactsError(faults, batch)
    return batch
