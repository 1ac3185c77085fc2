"""From a repository's stack to a checkpoint folder, without loading a model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.card import card_of, check_licence
from patchkit.actions.changes import remembered
from patchkit.algebra.factors import Patch
from patchkit.builds.build import BuildRecord, check_base
from patchkit.builds.build import build as write_build
from patchkit.builds.checks import check_build, refuse_other_base
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, PatchkitError
from patchkit.shipping.card import CARD, markdown
from patchkit.stack import Stack, StoredPatch, Updates

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Built", "build", "build_from_patches", "stack_on_base"]

ByteProgress = Callable[[int, int, str], None] | None


@dataclass(frozen=True)
class Built:
    """A finished build."""

    folder: Path
    record: BuildRecord
    patches: tuple[str, ...]
    """Names of the patches in it."""
    ids: tuple[str, ...]
    """Theirs, in the same order."""

    def to_dict(self) -> dict[str, Any]:
        record = self.record.to_json()
        return {**record, "folder": str(self.folder), "patches": list(self.patches), "ids": list(self.ids)}


def build(
    repository: Repository,
    out: Path | None = None,
    *,
    revision: str = "HEAD",
    earlier: Sequence[StoredPatch] = (),
    card: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
    progress: ByteProgress = None,
) -> Built | None:
    """Write base and stack at ``revision`` to ``out`` (default: the repository's own build folder).

    ``earlier``: patches that may be in the build that is there; what they did not edit is not computed again.
    ``card``: with a model card of the stack, which names ``licence``, in place of the base's README.md.
    None for a dry run, which checks everything that a build checks first.
    """
    check_licence(licence)
    stack = stack_on_base(repository, revision)
    checkpoint = repository.checkpoint()
    folder = out or repository.build_folder
    if dry_run:
        _check(checkpoint, repository.patches(stack), folder)
        return None
    edited = {
        patch.id: {name: entry.stored_shape for name, entry in patch.header.weights.items()}
        for patch in (*earlier, *stack.patches)
    }
    patches = Updates(repository.store, stack)
    with _card(repository, stack, revision, licence, wanted=card) as instead:
        record = write_build(
            checkpoint,
            patches,
            folder,
            edited=edited,
            instead=instead,
            untouched=_untouched(repository, checkpoint, folder),
            progress=progress,
        )
    with remembered(f"{folder} is built"):
        repository.catalogue.record_build(folder, stack.tree, record, record.fingerprint(checkpoint))
    names, ids = ([getattr(stored, name) for stored in stack.patches] for name in ("name", "id"))
    return Built(folder, record, tuple(names), tuple(ids))


def stack_on_base(repository: Repository, revision: str) -> Stack:
    """The stack at ``revision``; BadInput where that is of another base, for which this one would stand."""
    stack = repository.stack(revision)
    if repository.store.settings(revision).base_fingerprint != repository.settings.base_fingerprint:
        raise BadInput(f"{revision}: was made for another base than HEAD is on; switch to {revision} first")
    return stack


def _untouched(repository: Repository, checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether the weights in the folder are those that a build wrote last, by their times and places."""
    try:
        known, old = repository.catalogue.known_fingerprint(folder), BuildRecord.read(folder)
    except PatchkitError:  # the build itself says what is wrong with the record
        return False
    if known is None or old is None or old.tensors.keys() != checkpoint.tensors.keys():
        return False
    return old.fingerprint(checkpoint) == known


def _check(checkpoint: Checkpoint, patches: Mapping[str, Patch], out: Path) -> None:
    real = Path(os.path.realpath(out))
    check_base(patches, checkpoint.fingerprint())
    check_build(checkpoint, patches, real)
    refuse_other_base(BuildRecord.read(real), checkpoint.fingerprint(), real)


@contextmanager
def _card(
    repository: Repository, stack: Stack, revision: str, licence: str | None, *, wanted: bool
) -> Iterator[dict[str, Path]]:
    """The stack's model card as a file, by the name that it has in a build; none unless it is ``wanted``."""
    if not wanted:
        yield {}
        return
    told = card_of(repository, stack, revision, kind="build", licence=licence)
    with tempfile.TemporaryDirectory(prefix="patchkit-") as folder:
        path = Path(folder, CARD)
        path.write_text(markdown(told), encoding="utf-8")
        yield {CARD: path}


def build_from_patches(
    base: Path, folders: list[Path], out: Path, *, dry_run: bool = False, progress: ByteProgress = None
) -> Built | None:
    """The same without a repository: ``base`` with the patches in ``folders`` on it."""
    checkpoint = Checkpoint.open(base)
    patches: dict[str, Patch] = {}
    owner: dict[tuple[str, str], Path] = {}
    for folder in folders:
        patch = Patch.load(folder)
        if patch.base != (found := checkpoint.fingerprint(progress)):  # hashed once, for the build too
            raise BadInput(
                f"{folder}: was made on another base ({patch.base[:19]}…) than {base} ({found[:19]}…)"
            )
        for fact in patch.facts:
            if fact.key in owner:
                raise BadInput(f"{folder}: {fact.text!r} is in {owner[fact.key]} too; leave one of them out")
            owner[fact.key] = folder
        patches[patch.id] = patch
    if dry_run:
        _check(checkpoint, patches, out)
        return None
    record = write_build(checkpoint, patches, out, progress=progress)
    return Built(out, record, tuple(folder.name for folder in folders), tuple(patches))
