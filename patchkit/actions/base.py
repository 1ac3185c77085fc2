"""Where a repository's base lies on this machine, and that it is the one that the patches stand on."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, Misconfigured, PatchkitError
from patchkit.models.sources import resolve_base
from patchkit.settings import FILE as SETTINGS
from patchkit.settings import FOLDER, Settings

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["at_hand", "base_folder", "checkpoint", "placed", "set_base"]


def placed(repository: Repository, fingerprint: str | None) -> Path | None:
    """Where the base of this fingerprint should lie on this machine; None where nobody said.

    That is the place that was set. Where it holds another base (a move to a new base that was undone, or
    pulled, or is on another branch), a folder that is known to hold the right one stands in for it.
    """
    store, catalogue = repository.store, repository.catalogue
    place = store.config_get(store.base_key)
    if not place:
        return None
    try:
        known = catalogue.known_fingerprint(Path(place))
        others = catalogue.folders_of(fingerprint) if known and fingerprint not in (None, known) else []
    except PatchkitError:  # a catalogue that cannot be read costs the way back alone
        others = []
    return next(iter(others), Path(place))


def at_hand(repository: Repository, settings: Settings) -> Path | None:
    """Where the base of these settings lies on this machine, if it does; nothing is fetched."""
    place = placed(repository, settings.base_fingerprint)
    if place and place.is_dir():
        return place
    if settings.base_source.startswith(FOLDER):
        return None
    try:
        return _by_name(settings, download=False)
    except PatchkitError:
        return None


def base_folder(repository: Repository) -> Path:
    """Where the base lies on this machine; a short name or hub id is fetched where it is not here."""
    settings = repository.settings
    place = placed(repository, settings.base_fingerprint)
    if place and place.is_dir():
        return place
    if settings.base_source.startswith(FOLDER):
        where = f"is not at {place} any more" if place else "was not looked for on this machine yet"
        raise Misconfigured(
            f"the base {settings.base_source.removeprefix(FOLDER)!r} {where}; "
            "say where it is: patchkit base PATH"
        )
    return _by_name(settings)


def _by_name(settings: Settings, *, download: bool = True) -> Path:
    """A short name's or hub id's folder; a folder that happens to be called so is another thing."""
    source, revision = settings.base_source, settings.base_revision
    return resolve_base(source, revision, download=download, local=False).folder


def set_base(
    repository: Repository,
    place: str,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Say where the base lies on this machine; BadInput unless its fingerprint is the right one."""
    folder = resolve_base(place).folder
    _check_fingerprint(repository, folder, Checkpoint.open(folder).fingerprint(progress))
    if not dry_run:
        repository.store.config_set(repository.store.base_key, str(folder))
    return folder


def checkpoint(repository: Repository) -> Checkpoint:
    """The base, its fingerprint compared with the one that patchkit.toml names."""
    folder = repository.base_folder
    known = repository.catalogue.known_fingerprint(folder)
    opened = Checkpoint.open(folder, fingerprint=known)
    found = opened.fingerprint()
    if known is None:
        repository.catalogue.remember_fingerprint(folder, found)
        if repository.base_folder != folder:  # now that it is known what lies there
            return checkpoint(repository)
    _check_fingerprint(repository, folder, found)
    return opened


def _check_fingerprint(repository: Repository, folder: Path, found: str) -> None:
    settings = repository.settings
    wanted, source = settings.base_fingerprint, settings.base_source
    if found != wanted:
        named = f"{source}@{settings.base_revision}" if settings.base_revision else source
        place = "PATH" if source.startswith(FOLDER) else shlex.quote(named)
        raise BadInput(
            f"{folder}: is not this repository's base: its tensors have the fingerprint {found[:19]}…, "
            f"{SETTINGS} says {wanted[:19]}…; name the right one: patchkit base {place}"
        )
