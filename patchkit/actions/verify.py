"""Who vouches for what is in force: every byte hashed, each commit that counts signed by one who is believed.

A commit's signature covers its whole tree and all that came before it, by their hashes. So the commit that is
verified has to be signed, and each commit that brought a patch in force to this branch as it now is: a merge
brings what the other branch had. Commits between them need not be: what they took away or did elsewhere, the
newest signature stands for. That it is the newest there is, nothing here can know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.base import at_hand
from patchkit.actions.fsck import base_problems, undisturbed
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, CheckFailed
from patchkit.git.history import read_mainline, writers_of
from patchkit.git.signatures import Signature, Signers, read_signatures
from patchkit.merging.merges import is_shallow
from patchkit.problem import Problem, one_line
from patchkit.shipping.origin import ORIGIN, Origin
from patchkit.stack import problems

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Trusted", "Verified", "Vouched", "verify", "verify_shipped"]

Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Vouched:
    """A commit that has to be signed: who signed it, whether that is one who is believed, and what it is."""

    signature: Signature
    believed: bool
    subject: str
    patches: tuple[str, ...]
    """The patches in force that it brought as they are; none where it is only the newest."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.signature.to_dict(),
            "believed": self.believed,
            "subject": self.subject,
            "patches": list(self.patches),
        }


@dataclass(frozen=True)
class Verified:
    """What was found of one commit; ``problems``: of Git's data, the base and its tree."""

    commit: str
    base: bool
    """Whether the base was here to be hashed."""
    vouched: tuple[Vouched, ...]
    problems: tuple[Problem, ...]

    @property
    def good(self) -> bool:
        return not self.problems and all(one.believed for one in self.vouched)

    def to_dict(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "verified": self.good,
            "base": "checked" if self.base else "not here",
            "commits": [one.to_dict() for one in self.vouched],
            "problems": [problem.to_dict() for problem in self.problems],
        }


@dataclass(frozen=True)
class Trusted:
    """A folder whose every file is as it was signed, by whose key, and what it says of itself."""

    folder: Path
    key: Path
    origin: Origin | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "verified": True,
            "problems": [],
            "key": str(self.key),
            "origin": None if self.origin is None else self.origin.to_dict(),
        }


def verify(
    repository: Repository,
    revision: str = "HEAD",
    *,
    signers: Sequence[str] = (),
    progress: Progress = None,
) -> Verified:
    """Hash everything again and read the signatures that stand for what is in force at ``revision``.

    ``signers``: whom to believe (`Signers.named`); without any, whomever Git's configuration knows. Loads no
    model. `BadInput` for a signer that is none, `NotFound` for a commit that is not there.
    """
    store = repository.store
    believed = Signers.named(signers, store.root)
    commit = store.resolve(revision)
    if is_shallow(store) or (store.common_dir / "info" / "grafts").exists():
        raise BadInput(
            f"{store.folder}: holds a part of its history, so that nobody knows who brought what; get all "
            "of it: git fetch --unshallow"
        )
    base, found = _base(repository, commit, progress)
    found = [*undisturbed(store, here=commit == store.head()), *found]
    found += [problem for problem in problems(store, commit) if problem not in found]
    if found:
        return Verified(commit, base, (), tuple(found))
    names = {stored.name for stored in repository.stack(commit).patches}
    history = read_mainline(store, commit)
    brought: dict[str, list[str]] = {commit: []}
    for name, writer in writers_of(history, merges=True).items():
        if name in names:
            brought.setdefault(writer.id, []).append(name)
    if unclaimed := names.difference(*brought.values()):
        raise BadInput(
            f"{min(unclaimed)}: no commit of this branch brought it, so that nobody vouches for it; look "
            "with: git log --first-parent"
        )
    signatures = read_signatures(store, list(brought), believed)
    subjects = {entry.id: entry.subject for entry in history}
    vouched = (
        Vouched(*signatures[oid], subjects.get(oid, ""), tuple(sorted(listed)))
        for oid, listed in brought.items()
    )
    return Verified(commit, base, tuple(vouched), ())


def _base(repository: Repository, commit: str, progress: Progress) -> tuple[bool, list[Problem]]:
    """Whether the base that ``commit`` names is on this machine, and what is wrong with it, hashed again."""
    settings = repository.store.settings(commit)
    place = at_hand(repository, settings)
    if place is None:
        return False, []
    told = None if progress is None else lambda done, total, _: progress("base", done, total)
    return True, base_problems(str(place), settings.base_fingerprint, told)


def verify_shipped(folder: Path, keys: Sequence[Path], base: Path | None = None) -> Trusted:
    """An exported folder or a build: each file as one of ``keys`` signed it, and made for ``base``.

    `CheckFailed` names what differs, `BadInput` a key that is none.
    """
    from patchkit.shipping.signing import verify_folder

    key = verify_folder(folder, keys)
    origin = Origin.of(folder)
    if base is not None:
        if origin is None:
            raise CheckFailed(f"{folder}: does not say which base it is for (it holds no {ORIGIN})")
        if Checkpoint.open(base).fingerprint() != origin.base:
            raise CheckFailed(
                f"{folder}: was made for another base than {base} (for {one_line(origin.base)})"
            )
    return Trusted(folder, key, origin)
