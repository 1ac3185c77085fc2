"""A patch folder from elsewhere becomes a patch of this repository."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.errors import BadInput
from patchkit.factors import Patch
from patchkit.facts import Batch, FactsError, clashes
from patchkit.patch import valid_patch_name

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
        return {"patch": self.name, "id": self.patch.id, "facts": len(self.patch.facts), "commit": self.commit}
