"""A patch folder from elsewhere becomes a patch of this repository."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import Taken, large_files, record, refittable, solved_on_top, superseded
from patchkit.algebra.factors import Patch
from patchkit.algebra.parts import scaled
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput, Busy, NotFound
from patchkit.facts import Fact, FactsError, Fault, normal
from patchkit.git.store import PATCHES, Changes
from patchkit.patch import DELTA, FACTS, valid_patch_name
from patchkit.stack import Stack, StoredPatch, find_patch

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Applied", "apply"]


@dataclass(frozen=True)
class Applied:
    """A patch that was taken in; ``commit`` is None for a dry run."""

    name: str
    patch: Patch
    message: str
    replaced: tuple[Taken, ...]
    commit: str | None
    notes: tuple[str, ...] = ()
    """What a person should know of this patch, a line each."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.name,
            "id": self.patch.id,
            "facts": len(self.patch.facts),
            "replaced": [{"patch": t.patch, "facts": [f.text for f in t.facts]} for t in self.replaced],
            "commit": self.commit,
            "notes": list(self.notes),
        }


def apply(
    repository: Repository,
    folder: Path,
    *,
    message: str | None = None,
    replace: bool = False,
    scale: float = 1.0,
    dry_run: bool = False,
) -> Applied:
    """Check the patch in ``folder`` and commit its very bytes; it keeps the folder's name for life.

    BadInput when it stands on another base or its files do not belong together, FactsError when a
    fact of it is in force already. With ``replace`` such facts are taken out of their patches, in
    the same commit. With a ``scale`` it is the version with ΔW times that; then ``folder`` may also name
    a patch in force, which is scaled in its place.
    """
    if not dry_run:
        repository.store.ensure_ready(for_patches=True)
    began_on = repository.store.standing()
    if (scale != 1.0 or not folder.exists()) and (stored := _in_force(repository, folder)) is not None:
        if scale == 1.0:
            raise BadInput(f"{stored.name}: is in force as it is; to change it, name a --scale")
        if replace:
            raise BadInput(f"{stored.name}: is in force itself, so --replace has no meaning; leave it out")
        return _scale_in_force(repository, stored, scale, message, dry_run, began_on)
    patch = Patch.load(folder)
    base = repository.settings.base_fingerprint
    if patch.base != base:
        raise BadInput(
            f"{folder}: was made on another base ({patch.base[:19]}…) than this repository's ({base[:19]}…)"
        )
    name = folder.resolve().name if valid_patch_name(folder.resolve().name) else patch.name
    if scale != 1.0:
        patch = scaled(patch, scale)
    files = patch.files()
    if hash_bytes(files[DELTA]) != patch.id:
        raise BadInput(
            f"{folder}: {DELTA} is not spelled as patchkit spells it, so its id would change; make it anew"
        )
    stack = repository.stack()
    replaced = tuple(superseded(stack, patch.facts, repository.patch)) if replace else ()
    gone = {taken.patch for taken in replaced if taken.remaining is None}

    def still_right(now: Stack) -> None:
        for taken in replaced:
            if stack.get(taken.patch) != now.get(taken.patch):
                raise Busy(f"{taken.patch}: was changed by another commit while its fact was being replaced")
        if faults := list(_clashes(folder, patch.facts, now, {taken.patch for taken in replaced})):
            raise FactsError(faults)
        if now.get(name) is not None and name not in gone:
            raise BadInput(f"{name}: a patch of that name is in force already; revert it first")

    still_right(stack)
    text = message or (f"Apply {name}" if scale == 1.0 else f"Apply {name}, scaled by {scale:g}")
    if dry_run:
        return Applied(name, patch, text, replaced, None, large_files(repository, patch))
    trailers = [("Patchkit-Patch", name), ("Patchkit-Id", patch.id)]
    solved = {taken.patch: taken.remaining.files() for taken in replaced if taken.remaining is not None}
    changes = Changes(patches={**solved, name: files}, removed=gone - {name})
    commit = record(repository, stack, changes, text, trailers, still_right, began_on=began_on)
    return Applied(name, patch, text, replaced, commit, large_files(repository, patch))


def _in_force(repository: Repository, folder: Path) -> StoredPatch | None:
    """The patch in force that is meant: its folder in the work tree, or a name where no such folder lies."""
    stack = repository.stack()
    place = folder.resolve()
    if place.parent == (repository.store.folder / PATCHES).resolve():
        return stack.get(place.name)
    if folder.exists() or folder.is_absolute():
        return None
    try:
        return find_patch(stack, str(folder))
    except NotFound as error:
        raise NotFound(f"{error}; and there is no such folder") from None


def _scale_in_force(
    repository: Repository,
    stored: StoredPatch,
    scale: float,
    message: str | None,
    dry_run: bool,
    began_on: str,
) -> Applied:
    """Rewrite a patch in place, its ΔW times ``scale``."""
    stack = repository.stack()
    patch = scaled(repository.patch(stored), scale)
    text = message or f"Scale {stored.name} by {scale:g}"
    on_top = solved_on_top(stack, [stored])
    again = {name: f": patchkit refit {name}" for name in refittable(stack, on_top)}
    above = tuple(
        f"{name} was solved on top of it; its facts may hold less well{again.get(name, '')}"
        for name in on_top
    )
    done = Applied(stored.name, patch, text, (), None, (*above, *large_files(repository, patch)))
    if dry_run:
        return done

    def still_right(now: Stack) -> None:
        if now.get(stored.name) != stored:
            raise Busy(f"{stored.name}: was changed by another commit meanwhile; look at it and try again")

    trailers = [("Patchkit-Patch", stored.name), ("Patchkit-Id", patch.id)]
    changes = Changes(patches={stored.name: patch.files()})
    commit = record(repository, stack, changes, text, trailers, still_right, began_on=began_on)
    return fields(done, commit=commit)


def _clashes(folder: Path, facts: Sequence[Fact], stack: Stack, leaving: Collection[str]) -> Iterator[Fault]:
    """Facts of the patch whose key is in force, in patches that stay; each with both ways out."""
    places = {
        fact.key: (stored.name, number, fact)
        for stored in stack.patches
        if stored.name not in leaving
        for number, fact in enumerate(stored.facts, 1)
    }
    for line, fact in enumerate(facts, 1):
        if fact.key in places:
            name, number, older = places[fact.key]
            named = shlex.quote(older.id or str(number))
            same = normal(older.target) == normal(fact.target)
            what = f"is in force already in {name}" if same else f"contradicts {older.target!r} of {name}"
            yield Fault(
                str(folder / FACTS),
                line,
                f"{fact.target!r} {what}; take the older fact out, patchkit revert {name} --fact {named}, "
                "or with this patch, --replace",
            )
