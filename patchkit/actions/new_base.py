"""Another base under the same patches: whether it fits them, and the one commit that moves everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.base import at_hand
from patchkit.actions.init import source_of
from patchkit.algebra.factors import Patch
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, Busy, PatchkitError
from patchkit.git.store import Changes
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.loading import read_config, without_weights
from patchkit.models.names import StoredNames
from patchkit.models.sources import resolve_base
from patchkit.settings import FILE, Settings, dump_settings
from patchkit.stack import Stack

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["NewBase", "commit_move", "new_base"]


@dataclass(frozen=True)
class NewBase:
    """A base that the patches fit; ``settings`` are those of patchkit.toml once they stand on it."""

    checkpoint: Checkpoint
    settings: Settings
    was: Settings

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.settings.base_source,
            "revision": self.settings.base_revision,
            "fingerprint": self.settings.base_fingerprint,
            "folder": str(self.checkpoint.folder),
            "was": self.was.base_fingerprint,
        }


def new_base(repository: Repository, base: str, patches: Mapping[str, Patch]) -> NewBase:
    """The base that ``base`` names, as `init` names it; BadInput where it is the old one or does not fit."""
    place = resolve_base(base)
    checkpoint = Checkpoint.open(place.folder)
    old = repository.settings
    fingerprint = checkpoint.fingerprint()
    if fingerprint == old.base_fingerprint:
        raise BadInput(f"{place.folder}: is this repository's base already; leave --base out")
    _check_kind(repository, place.folder)
    model = without_weights(read_config(place.folder), place.folder)
    anatomy, names = anatomy_of(model), StoredNames(model, checkpoint)
    edited = {names.of(weight) for weight in anatomy.weights}
    for patch in patches.values():
        _check_fit(patch, checkpoint, anatomy, edited)
        checkpoint.check_editable(patch.deltas)
    settings = replace(
        old,
        base_source=source_of(base, place),
        base_revision=place.revision,
        base_fingerprint=fingerprint,
    )
    return NewBase(checkpoint, settings, old)


def _check_kind(repository: Repository, folder: Path) -> None:
    """The same kind and depth of model, where the old base is at hand to compare with."""
    place = at_hand(repository, repository.settings)
    if not place or not (place / "config.json").is_file():
        return
    old, new = (read_config(path).get_text_config(decoder=True) for path in (place, folder))
    one, other = ((config.model_type, config.num_hidden_layers) for config in (old, new))
    if one != other:
        raise BadInput(
            f"{folder}: is a {other[0]} of {other[1]} blocks, the base is a {one[0]} of {one[1]}; patches "
            "move to a base of the same architecture, such as one tuned from theirs; commit the facts "
            "anew there"
        )


def _check_fit(patch: Patch, checkpoint: Checkpoint, anatomy: Anatomy, edited: set[str]) -> None:
    wrong = ""
    for name, delta in patch.deltas.items():
        shape = delta.shape[::-1] if delta.transposed else delta.shape
        if name not in edited:
            wrong = f"{name} is not a weight that can be edited there"
        elif checkpoint.tensors[name][1].shape != shape or delta.transposed != anatomy.transposed:
            wrong = (
                f"{name} is {list(checkpoint.tensors[name][1].shape)} there, the patch is for {list(shape)}"
            )
    width = anatomy.d_model if patch.solution is None else patch.solution.targets.shape[1]
    if width != anatomy.d_model:
        wrong = f"its states have {anatomy.d_model} numbers, the patch's targets {width}"
    if wrong:
        raise BadInput(
            f"{checkpoint.folder}: {patch.name} does not fit this base: {wrong}; patches move to a base of "
            "the same architecture, such as one tuned from theirs; commit the facts anew there"
        )


def commit_move(
    repository: Repository,
    began_on: str,
    stack: Stack,
    base: NewBase,
    files: Mapping[str, Mapping[str, bytes]],
    message: str,
    trailers: Sequence[tuple[str, str]],
) -> str:
    """Every patch and patchkit.toml in one commit, then the base's place on this machine; the commit's id.

    Busy where anything was committed meanwhile: it would be left on the old base; or where something else
    than ``began_on`` is checked out.
    """
    store = repository.store
    tree = store.tree("HEAD")
    if tree.id != stack.tree or tree.settings is None or repository.settings != base.was:
        raise Busy("another commit came while the patches were being refitted onto the new base; try again")
    changes = Changes(patches=files, settings=dump_settings(base.settings, store.read(tree.settings.oid)))
    commit = store.record(
        changes,
        message,
        [("Patchkit-Base", base.settings.base_fingerprint), *trailers],
        expected_head=tree.commit,
        began_on=began_on,
    )
    folder = base.checkpoint.folder
    try:
        store.config_set(store.base_key, str(folder))
        repository.catalogue.remember_fingerprint(folder, base.settings.base_fingerprint)
    except PatchkitError as error:
        raise error.retold(
            f"{error}; the move is committed ({commit[:10]}), only {FILE}'s new base has no place on this "
            f"machine yet: patchkit base {folder}"
        ) from error
    return commit
