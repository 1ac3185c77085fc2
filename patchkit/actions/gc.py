"""What this machine keeps for itself and nothing refers to any more: found, and removed when it is old.

Looks below the private folder alone; Git's objects are for `git gc`. A leftover is renamed before it is
removed, so that nobody meets half of one. Promises: what a branch, tag or reflog still refers to stays,
and so does everything that was used within the last hour, since a running command may be using it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.versions import Reached, reached, versions
from patchkit.canonical import strict_json
from patchkit.editing.many import SIZE
from patchkit.editing.recipe import Recipe
from patchkit.errors import PatchkitError
from patchkit.evaluation.answers import FOLDER, kept_answers, read_answers
from patchkit.files import is_temporary, writing
from patchkit.git.store import GitStore
from patchkit.git.writers import writers_lock
from patchkit.patch import solved_by
from patchkit.settings import parse_settings
from patchkit.stack import StoredPatch
from patchkit.tensors import header_of_file

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["GRACE", "Collected", "Leftover", "gc"]

GRACE = 14.0  # days, as long as `git gc` keeps what nothing refers to
_RUNNING = 3600.0  # seconds: what was used so lately may be in use
_DAY = 86400.0
Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Leftover:
    """Something that nothing refers to: what it is, where, its bytes, and the days since it was used."""

    kind: str
    path: Path
    size: int
    age: float

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": str(self.path), "bytes": self.size, "days": round(self.age, 2)}


@dataclass(frozen=True)
class Collected:
    """``removed`` (in a dry run: would be), ``young``: still within the grace, and rows of the catalogue."""

    removed: tuple[Leftover, ...]
    young: tuple[Leftover, ...]
    trees: int
    """Trees in the catalogue that nothing reaches; Git gives them again where one comes back."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "removed": [each.to_dict() for each in self.removed],
            "young": [each.to_dict() for each in self.young],
            "bytes": sum(each.size for each in self.removed),
            "catalogue_trees": self.trees,
        }


def gc(
    repository: Repository, *, grace: float = GRACE, dry_run: bool = False, progress: Progress = None
) -> Collected:
    """Remove what nothing refers to and was not used for ``grace`` days. NotWritten where it cannot be."""
    least = max(grace, _RUNNING / _DAY)
    found = list(_Search(repository, progress).leftovers())  # long, and needs no lock
    old = [each for each in found if each.age >= least]
    young = [each for each in found if each.age < least]
    trees = _stale_trees(repository, progress)
    if not dry_run:
        with writers_lock(repository.store):
            old = [each for each in old if _is_left(each, least)]
            for number, each in enumerate(old, 1):
                _remove(repository.store.private, each.path)
                if progress is not None:
                    progress("removing", number, len(old))
            _forget(repository, trees)
    return Collected(tuple(old), tuple(young), len(trees))


def _is_left(found: Leftover, least: float) -> bool:
    """Whether it is there still, and nobody used it since it was found."""
    return os.path.lexists(found.path) and _leftover(found.kind, found.path).age >= least


class _Search:
    """Goes through the private folder; of every stack that shares it."""

    def __init__(self, repository: Repository, progress: Progress) -> None:
        self.store, self.progress = repository.store, progress
        self.private = repository.store.private

    def leftovers(self) -> Iterator[Leftover]:
        owns = [self.private, *sorted((self.private / "stacks").glob("*"))]
        for own in owns:
            for path in sorted((own / "kept").glob("*")):
                yield _leftover("kept aside", path)
            for path in sorted(own.glob("catalogue.db.damaged-*")):
                yield _leftover("damaged catalogue", path)
        for path in sorted((self.private / "unfinished").glob("*")):
            if not is_temporary(path.name):
                yield _leftover("unfinished edit", path)
        yield from self._statistics()
        for path in kept_answers(self.private / FOLDER):
            if not self._is_asked(path):
                yield _leftover("answers", path)
        for place, folders, names in os.walk(self.private):
            for name in sorted(n for n in (*folders, *names) if is_temporary(n)):
                yield _leftover("temporary", Path(place, name))
            folders[:] = [name for name in folders if not is_temporary(name)]

    def _statistics(self) -> Iterator[Leftover]:
        """Of bases and recipes that no patch or patchkit.toml of any branch, tag or reflog names."""
        from patchkit.editing.kept import plain_name

        for path in sorted((self.private / "statistics").glob("*")):
            if is_temporary(path.name):
                continue
            if path.suffix == ".safetensors":
                if plain_name(path) not in self._networks:
                    yield _leftover("hypernetwork", path)
            elif path.suffix == ".json":
                if plain_name(path) not in self._texts:
                    yield _leftover("text", path)
            elif path.is_dir() and not self._is_used(path):
                yield _leftover("statistics", path)

    def _is_asked(self, path: Path) -> bool:
        """Whether a file of answers is whole, and of a stack that can be had from something that is there."""
        try:
            about = read_answers(path)["about"]
            ids, base = set(about["patches"]), about["base"]
        except (PatchkitError, ValueError, KeyError, TypeError):
            return False
        versions_, bases = self._found
        return base in bases and ids <= {stored.id for stored in versions_}

    @cached_property
    def _found(self) -> tuple[list[StoredPatch], dict[str, list[dict[str, Any]]]]:
        """Every patch version, and the recipes of every patchkit.toml by its base, of all stacks."""
        patches: list[StoredPatch] = []
        settings: dict[str, list[dict[str, Any]]] = {}
        for store in _stacks(self.store):
            everything = reached(store, reflogs=True, progress=self.progress)
            patches += versions(store, everything, self.progress).patches.values()
            for oid in everything.settings:
                with suppress(PatchkitError):
                    found = parse_settings(store.read(oid))
                    few = dict(found.recipe)
                    large = {**few, **{name: of for name, of in found.many.items() if name != SIZE}}
                    settings.setdefault(found.base_fingerprint, []).extend([few, large])
        return patches, settings

    @cached_property
    def _references(self) -> tuple[list[tuple[str, Recipe]], list[tuple[str, Recipe]]]:
        """(base, recipe) of every patch version, and of every patchkit.toml."""
        patches, settings = [], []
        versions_, tables = self._found
        for stored in versions_:
            for recipe in solved_by(stored.header, stored.name):
                with suppress(PatchkitError):  # of another editor, which has no statistics of ours
                    patches.append((stored.header.base, Recipe.from_dict(recipe)))
        for base, recipes in tables.items():
            for recipe in recipes:
                with suppress(PatchkitError):
                    settings.append((base, Recipe.from_dict(recipe)))
        return patches, settings

    @cached_property
    def _texts(self) -> set[str]:
        from patchkit.actions.harm import TEXT
        from patchkit.editing.written import contexts_name, text_name

        patches, settings = self._references
        used = [*patches, *settings]
        named = {contexts_name(recipe, base) for base, recipe in used}
        named |= {text_name(each, base) for base, recipe in used for each in (recipe, TEXT)}
        return {Path(name).stem for name in named}

    @cached_property
    def _networks(self) -> set[str]:
        from patchkit.editing.hypernetwork import network_name

        named = [(base, recipe) for of in self._references for base, recipe in of]
        found = {network_name(base, recipe.layers) for base, recipe in named if recipe.method == "mend"}
        return {Path(name).stem for name in found}

    def _is_used(self, folder: Path) -> bool:
        """Whether a patch's or a patchkit.toml's recipe asks for these; where nothing is noted beside them,
        by the digest that a patch has of its own, and any patchkit.toml with their layers."""
        patches, settings = self._references
        held = {int(path.stem.partition("-")[2]) for path in folder.glob("layer-[0-9]*.safetensors")}
        try:
            note = strict_json((folder / "about.json").read_bytes())
            about = (note["base"], note["tokens"], note["length"])
        except (OSError, ValueError, KeyError, TypeError):
            if any(set(recipe.layers) <= held for _, recipe in settings):
                return True
        else:
            for base, recipe in (*patches, *settings):
                if about == (base, recipe.statistics_tokens, recipe.statistics_length):
                    return True
        fitting = [recipe for _, recipe in patches if set(recipe.layers) <= held]
        return any(_digest(folder, recipe.layers) == recipe.statistics_digest for recipe in fitting)


def _stacks(store: GitStore) -> list[GitStore]:
    """The one at hand and every other whose patchkit.toml any commit has added."""
    options = ("--all", "--reflog", "--format=", "--name-only", "--no-renames", "--diff-filter=A", "-z")
    names = store.git.read("log", *options, "--", ":(top,glob)**/patchkit.toml").split(b"\0")
    folders = {store.root / Path(os.fsdecode(name.strip(b"\n"))).parent for name in names if name.strip()}
    found = [store]
    for folder in sorted(folders - {store.folder}):
        found.append(GitStore(store.root, folder, store.git_dir, store.common_dir, store.objects.hash_name))
    return found


def _digest(folder: Path, layers: tuple[int, ...]) -> str:
    """As `Statistics.digest`, from the files: each holds one float32 tensor."""
    digest = hashlib.sha256()
    try:
        for layer in layers:
            path = folder / f"layer-{layer}.safetensors"
            start = header_of_file(path).data_start
            with open(path, "rb") as file:
                file.seek(start)
                while piece := file.read(1 << 20):
                    digest.update(piece)
    except (OSError, PatchkitError):
        return ""
    return digest.hexdigest()


def _stale_trees(repository: Repository, progress: Progress) -> list[str]:
    """The believed trees that neither a reference nor a reflog reaches."""
    held = {row["id"] for row in repository.catalogue.rows("select id from trees")}
    if not held:
        return []
    everything: Reached = reached(repository.store, reflogs=True, progress=progress)
    return sorted(held - everything.trees.keys())


def _forget(repository: Repository, trees: list[str]) -> None:
    """Drop trees from the catalogue, with their members."""
    if trees:
        with repository.catalogue.writing() as db:
            for tree in trees:
                db["members"].delete_where("tree = ?", [tree])
                db["trees"].delete_where("id = ?", [tree])


def _leftover(kind: str, path: Path) -> Leftover:
    size, used = _measured(path)
    return Leftover(kind, path, size, max(0.0, time.time() - used) / _DAY)


def _measured(path: Path) -> tuple[int, float]:
    """Bytes of the files below, and when the youngest was last changed; links are not followed."""
    size, used = 0, 0.0
    paths = [path]
    if path.is_dir() and not path.is_symlink():
        paths += [Path(at, name) for at, folders, names in os.walk(path) for name in (*folders, *names)]
    for each in paths:
        with suppress(FileNotFoundError):  # it went meanwhile
            status = os.lstat(each)
            used = max(used, status.st_mtime)
            size += 0 if each.is_dir() and not each.is_symlink() else status.st_size
    return size, used


def _remove(private: Path, path: Path) -> None:
    """Out of everybody's sight first; a kill leaves a temporary, which the next run finds."""
    with writing(path), suppress(FileNotFoundError):
        away = path
        if not is_temporary(path.name):
            away = private / f".patchkit-{secrets.token_hex(8)}.tmp"
            os.rename(path, away)
        if away.is_dir() and not away.is_symlink():
            shutil.rmtree(away)
        else:
            away.unlink()
