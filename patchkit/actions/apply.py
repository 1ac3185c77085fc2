"""A patch folder from elsewhere becomes a patch of this repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import Taken, record, refuse_clashes, superseded
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput, Busy
from patchkit.factors import Patch
from patchkit.facts import Batch
from patchkit.gitstore import Changes
from patchkit.patch import DELTA, FACTS, valid_patch_name
from patchkit.stack import Stack

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

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.name,
            "id": self.patch.id,
            "facts": len(self.patch.facts),
            "replaced": [{"patch": t.patch, "facts": [f.text for f in t.facts]} for t in self.replaced],
            "commit": self.commit,
        }


def apply(
    repository: Repository,
    folder: Path,
    *,
    message: str | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> Applied:
    """Check the patch in ``folder`` and commit its very bytes; it keeps the folder's name for life.

    BadInput when it stands on another base or its files do not belong together, FactsError when a
    fact of it is in force already. With ``replace`` such facts are taken out of their patches, in
    the same commit.
    """
    if not dry_run:
        repository.store.ensure_ready()
    patch = Patch.load(folder)
    base = repository.settings.base_fingerprint
    if patch.base != base:
        raise BadInput(
            f"{folder}: was made on another base ({patch.base[:19]}…) than this repository's ({base[:19]}…)"
        )
    files = patch.files()
    if hash_bytes(files[DELTA]) != patch.id:
        raise BadInput(
            f"{folder}: {DELTA} is not spelled as patchkit spells it, so its id would change; make it anew"
        )
    stack = repository.stack()
    name = folder.resolve().name if valid_patch_name(folder.resolve().name) else patch.name
    batch = Batch(str(folder / FACTS), patch.facts, tuple(range(1, len(patch.facts) + 1)))

    replaced = tuple(superseded(stack, patch.facts, repository.patch)) if replace else ()
    gone = {taken.patch for taken in replaced if taken.remaining is None}

    def still_right(now: Stack) -> None:
        for taken in replaced:
            if stack.get(taken.patch) != now.get(taken.patch):
                raise Busy(f"{taken.patch}: was changed by another commit while its fact was being replaced")
        refuse_clashes(batch, now, {taken.patch for taken in replaced})
        if now.get(name) is not None and name not in gone:
            raise BadInput(f"{name}: a patch of that name is in force already; revert it first")

    still_right(stack)
    text = message or f"Apply {name}"
    if dry_run:
        return Applied(name, patch, text, replaced, None)
    trailers = [("Patchkit-Patch", name), ("Patchkit-Id", patch.id)]
    solved = {taken.patch: taken.remaining.files() for taken in replaced if taken.remaining is not None}
    changes = Changes(patches={**solved, name: files}, removed=gone - {name})
    commit = record(repository, stack, changes, text, trailers, still_right)
    return Applied(name, patch, text, replaced, commit)
