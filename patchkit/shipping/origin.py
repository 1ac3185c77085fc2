"""What an export says of itself to programs: the base it goes on, and the versions of the patches in it.

``patchkit-export.json`` lies beside an adapter's files; of a build its own record says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchkit.builds.record import BuildRecord
from patchkit.canonical import canonical_json, strict_json
from patchkit.errors import BadInput
from patchkit.files import reading
from patchkit.problem import one_line

__all__ = ["ORIGIN", "Origin"]

ORIGIN = "patchkit-export.json"

_FORMAT = 1
_MAX = 64 << 20


@dataclass(frozen=True)
class Origin:
    """``base``: the fingerprint of the base's tensors. ``patches``: the ids of their versions by name."""

    base: str
    source: str | None
    """How the base is named for others."""
    revision: str | None
    commit: str | None
    patches: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_bytes(self) -> bytes:
        return canonical_json({"format": _FORMAT, **self.to_dict()}) + b"\n"

    @classmethod
    def of(cls, folder: Path) -> Origin | None:
        """What an exported folder or a build says, None where nothing; `BadInput` for a damaged file."""
        if (record := BuildRecord.read(folder)) is not None:
            return cls(record.base, None, None, None, {patch: patch for patch in record.patches})
        place = folder / ORIGIN
        if not place.is_file():
            return None
        with reading(place, follow=False) as file:
            data = file.read(_MAX)
        try:
            fields = strict_json(data)
            if fields.pop("format") != _FORMAT:
                raise ValueError("of another format")
            found = cls(**fields)
            texts = (found.base, *found.patches, *found.patches.values())
            named = (found.source, found.revision, found.commit)
            if not all(isinstance(one, str) for one in (*texts, *(one for one in named if one is not None))):
                raise ValueError("a text is missing")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{place}: cannot be read ({one_line(str(error))}); export again") from error
