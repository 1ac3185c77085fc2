"""A patch folder from elsewhere becomes a patch of this repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import record, refuse_clashes
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput
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
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.name,
            "id": self.patch.id,
            "facts": len(self.patch.facts),
            "commit": self.commit,
        }


def apply(
    repository: Repository, folder: Path, *, message: str | None = None, dry_run: bool = False
) -> Applied:
    """Check the patch in ``folder`` and commit its very bytes; it keeps the folder's name for life.

    BadInput when it stands on another base or its files do not belong together, FactsError when a
    fact of it is in force already.
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

    def still_right(now: Stack) -> None:
        refuse_clashes(batch, now)
        if now.get(name) is not None:
            raise BadInput(f"{name}: a patch of that name is in force already; revert it first")

    still_right(stack)
    text = message or f"Apply {name}"
    if dry_run:
        return Applied(name, patch, text, None)
    trailers = [("Patchkit-Patch", name), ("Patchkit-Id", patch.id)]
    changes = Changes(patches={name: files})
    return Applied(name, patch, text, record(repository, stack, changes, text, trailers, still_right))
