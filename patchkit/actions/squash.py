"""Several patches become one folder with the same ΔW; whether a build keeps its bytes is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import large_files, record
from patchkit.algebra.factors import Patch
from patchkit.algebra.parts import joined
from patchkit.algebra.rounding import FORMATS, materialise
from patchkit.builds.build import stacked
from patchkit.errors import BadInput, Busy, Refused
from patchkit.facts import FactsError, dump_facts, load_canonical
from patchkit.git.store import Changes
from patchkit.problem import one_line
from patchkit.stack import Stack, find_patch

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Distance", "Squashed", "squash"]


@dataclass(frozen=True)
class Distance:
    """How far the build of one stack is from that of another: all zero where the bytes are the same."""

    entries: int
    """Entries of edited weights that differ."""
    of: int
    """Entries of edited weights."""
    largest: float
    """The largest difference, as a share of the larger of both entries."""

    def __str__(self) -> str:
        if not self.entries:
            return f"the same bytes: {self.of} entries compared"
        return f"{self.entries} of {self.of} entries differ, by a share of {self.largest:.1e} at most"


@dataclass(frozen=True)
class Squashed:
    """Patches that became one; ``commit`` is None for a dry run."""

    patch: Patch
    removed: tuple[str, ...]
    distance: Distance
    message: str
    size: int
    """Bytes of its files."""
    commit: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.patch.name,
            "id": self.patch.id,
            "facts": len(self.patch.facts),
            "squashed": list(self.removed),
            "size": self.size,
            "entries_compared": self.distance.of,
            "entries_that_differ": self.distance.entries,
            "largest_difference": self.distance.largest,
            "message": self.message,
            "commit": self.commit,
            "notes": list(self.notes),
        }


def squash(
    repository: Repository,
    words: Sequence[str],
    *,
    message: str | None = None,
    inexact: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Squashed:
    """Join the patches that ``words`` name, oldest first, in one commit; no model is loaded.

    The weights of the whole stack are computed before and after, as a build computes them. Refused where
    bytes differ (factors past the break-even are multiplied out and rounded), unless ``inexact``.
    """
    if not dry_run:
        repository.store.ensure_ready(for_patches=True)
    began_on = repository.store.standing()
    stack = repository.stack()
    named = {find_patch(stack, word).name for word in words}
    if len(named) < 2:
        raise BadInput("a squash joins several patches: name two or more; patchkit stack lists them")
    history = repository.store.history()
    chosen = [stored for stored, _ in stack.by_date(history) if stored.name in named]
    patches = repository.patches(stack)
    whole = joined([patches[stored.id] for stored in chosen])
    _check_facts(whole)
    if whole.name not in named and stack.get(whole.name) is not None:
        raise BadInput(f"{whole.name}: a patch of that name is in force already; revert it first")
    rest = [patches[stored.id] for stored in stack.patches if stored.name not in named]
    distance = _distance(repository, [*patches.values()], [*rest, whole], set(whole.deltas), progress)
    if distance.entries and not inexact:
        raise Refused(
            f"squashed, the patches would give other bytes ({distance}): their factors are larger together "
            "than the update multiplied out, which is rounded; squash fewer, or take it with --inexact"
        )
    names = tuple(stored.name for stored in chosen)
    files = whole.files()
    done = Squashed(
        whole,
        names,
        distance,
        message
        or f"Squash {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
        sum(map(len, files.values())),
        notes=(*_notes(whole, [patches[stored.id] for stored in chosen]), *large_files(repository, whole)),
    )
    if dry_run:
        return done

    def still_right(now: Stack) -> None:
        for stored in chosen:
            if now.get(stored.name) != stored:
                raise Busy(
                    f"{stored.name}: was changed by another commit meanwhile; look at it and try again"
                )

    trailers = [("Patchkit-Patch", whole.name), ("Patchkit-Id", whole.id)]
    trailers += [("Patchkit-Squashes", stored.id) for stored in chosen]
    gone = tuple(name for name in names if name != whole.name)  # one of them may have had these facts once
    changes = Changes(patches={whole.name: files}, removed=gone)
    commit = record(repository, stack, changes, done.message, trailers, still_right, began_on=began_on)
    return replace(done, commit=commit)


def _check_facts(whole: Patch) -> None:
    """BadInput where two facts are one to whoever reads the patch: a relation alone told them apart."""
    try:
        load_canonical(dump_facts(whole.facts), whole.name)
    except FactsError as error:
        fault = error.faults[0]
        if fault.line is None:
            raise BadInput(f"squashed, the facts would be too many: {fault.message}; squash fewer") from error
        fact = whole.facts[fault.line - 1]
        raise BadInput(
            f"squashed, {one_line(fact.text)!r} would be said twice ({fault.message}): take one of the two "
            "back first, with patchkit revert PATCH --fact"
        ) from error


def _distance(
    repository: Repository,
    before: Sequence[Patch],
    after: Sequence[Patch],
    weights: set[str],
    progress: Callable[[str, int, int], None] | None,
) -> Distance:
    """Both stacks on the base, as builds hold them."""
    checkpoint = repository.checkpoint()
    old, new = stacked(before), stacked(after)
    entries, of, largest = 0, 0, 0.0
    for number, name in enumerate(sorted(weights)):
        if progress is not None:
            progress("comparing", number, len(weights))
        base = checkpoint.read(name)
        one, other = (materialise(base, deltas[name], name) for deltas in (old, new))
        bits = FORMATS[base.dtype].bits
        apart = one.view(bits) != other.view(bits)
        of += apart.numel()
        if apart.any():
            entries += int(apart.sum())
            a, b = one[apart].double(), other[apart].double()
            largest = max(largest, float(((a - b).abs() / a.abs().maximum(b.abs())).nan_to_num().max()))
    if progress is not None:
        progress("comparing", len(weights), len(weights))
    return Distance(entries, of, largest)


def _notes(whole: Patch, parts: Sequence[Patch]) -> tuple[str, ...]:
    notes = []
    shared = {fact.id for part in parts for fact in part.facts} - {fact.id for fact in whole.facts}
    if lost := sorted(filter(None, shared)):
        notes.append(f"facts of several patches have the id {one_line(', '.join(lost))}: they have none now")
    if whole.solution is None:
        missing = ", ".join(part.name for part in parts if part.solution is None)
        kept_by = f"no keys are kept, since {missing} has none"
        notes.append(f"{kept_by}: no single fact can be taken out of {whole.name}")
    return tuple(notes)
