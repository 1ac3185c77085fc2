"""Where a repository's base lies on this machine, and that it is the one that the patches stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, Misconfigured
from patchkit.models.sources import resolve_base
from patchkit.settings import FILE as SETTINGS
from patchkit.settings import FOLDER

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["base_folder", "checkpoint", "set_base"]


def base_folder(repository: Repository) -> Path:
    """Where the base lies on this machine; a short name or hub id is fetched where it is not here."""
    store = repository.store
    place = store.config_get(store.base_key)
    if place and Path(place).is_dir():
        return Path(place)
    settings = repository.settings
    if settings.base_source.startswith(FOLDER):
        where = f"is not at {place} any more" if place else "was not looked for on this machine yet"
        raise Misconfigured(
            f"the base {settings.base_source.removeprefix(FOLDER)!r} {where}; "
            "say where it is: patchkit base PATH"
        )
    return resolve_base(settings.base_source, settings.base_revision).folder


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
    _check_fingerprint(repository, folder, found)
    return opened


def _check_fingerprint(repository: Repository, folder: Path, found: str) -> None:
    wanted = repository.settings.base_fingerprint
    if found != wanted:
        raise BadInput(
            f"{folder}: is not this repository's base: its tensors have the fingerprint {found[:19]}…, "
            f"{SETTINGS} says {wanted[:19]}…; name the right one: patchkit base PATH"
        )
