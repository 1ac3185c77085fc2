"""A repository that stands on a base: what it stands on, and how it edits, committed once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from patchkit.catalogue import Catalogue
from patchkit.checkpoint import Checkpoint
from patchkit.editing.editor import foreign_editors
from patchkit.editing.published import many_for, read_recipe, recipe_for
from patchkit.editing.recipe import Recipe
from patchkit.errors import BadInput, Busy, Misconfigured, NotFound, WouldOverwrite
from patchkit.git.command import Git
from patchkit.git.history import PATCHES
from patchkit.git.lfs import ensure_installed
from patchkit.git.store import Changes, GitStore
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import read_config, without_weights
from patchkit.models.names import edited_weights
from patchkit.models.pickles import safetensors_folder
from patchkit.models.sources import Base, resolve_base
from patchkit.problem import one_line
from patchkit.settings import FILE, FOLDER, Settings, dump_settings
from patchkit.stack import problems, read_stack

__all__ = ["Initialised", "init", "recipe_table", "source_of"]

RESOLVED = ("templates", "statistics_digest")
"""Recipe fields that an edit fills in; they stand in each patch, not in patchkit.toml."""


@dataclass(frozen=True)
class Initialised:
    """A repository that was made, or found to be there already."""

    folder: Path
    source: str
    base_folder: Path
    fingerprint: str
    recipe: Recipe | None
    """None where the one in its patchkit.toml is none; ``fault`` says what is wrong with it."""
    many: dict[str, Any]
    """[recipe.many]: what differs for a batch of many facts (`editing.many`)."""
    commit: str | None
    """The commit that made it; None where it was there already, and for a dry run."""
    existed: bool = False
    lfs: bool = False
    """Whether its patches are kept in Git LFS."""
    fault: str | None = None
    root: Path | None = None
    """The Git repository in which ``folder`` lies, where it is another folder."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "folder": str(self.folder),
            "base_folder": str(self.base_folder),
            "root": None if self.root is None else str(self.root),
            "recipe": None if self.recipe is None else recipe_table(self.recipe),
        }


def init(
    base: str,
    folder: Path,
    *,
    revision: str | None = None,
    convert: bool = False,
    lfs: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Initialised:
    """Make ``folder`` a repository on ``base``; in one on the same base it only says so.

    With ``lfs`` its patches are kept in Git LFS from now on, those that are there already too.
    With ``convert`` a base that has only pickles is copied into the user's cache as safetensors first.
    A stack never lies in another: a folder below one belongs to it. Raises WouldOverwrite where
    ``folder`` is, or lies in, a stack on another base.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; name a folder for the repository")
    git = Git(_nearest(folder))
    if lfs:
        ensure_installed(git, str(folder))
    if not dry_run:
        git.ensure_identity()  # before a base is fetched
    began_on = _checked_out(folder)
    place = resolve_base(base, revision, pickles=convert, progress=progress)
    source = source_of(base, place)
    if convert:
        place = replace(place, folder=safetensors_folder(place.folder, progress))
    checkpoint = Checkpoint.open(place.folder)
    config = read_config(place.folder)
    recipe = recipe_for(config)
    built = without_weights(config, place.folder)
    if not foreign_editors():  # an editor of another package may edit other kinds of model
        # refuse what a model's kind, and how its weights are stored, keep from being edited
        edited_weights(built, anatomy_of(built), checkpoint, recipe.layers)
    fingerprint = checkpoint.fingerprint(progress)
    standing = _standing(folder)
    at = folder.absolute() if standing is None else standing.folder
    in_lfs = lfs or (standing is not None and standing.tree().lfs)
    many, existed = many_for(config), standing is not None
    made = Initialised(at, source, place.folder, fingerprint, recipe, many, None, existed, in_lfs)
    if standing is not None and (settings := standing.settings()).base_fingerprint != fingerprint:
        raise WouldOverwrite(
            f"{at / FILE}: stands on another base already ({settings.base_source}); name a folder outside"
        )
    if standing is not None:
        try:
            own = read_recipe(settings, str(at / FILE), None, lambda: place.folder)
            made = replace(made, recipe=own, many=settings.many)
        except (Misconfigured, BadInput) as error:  # the base is found all the same: more than edits need it
            made = replace(made, recipe=None, many={}, fault=str(error))
    settings = Settings(source, place.revision, fingerprint, recipe_table(recipe), many)
    if standing is None and began_on is not None and folder.is_dir():
        _refuse_another_use(GitStore.init(folder), settings)
    if dry_run:
        return made
    store = standing or GitStore.init(folder)
    commit = None
    if standing is None:
        message = f"Start a stack of knowledge patches on {source}"
        changes = Changes(settings=dump_settings(settings), lfs=lfs)
        head, trailers = store.head(), [("Patchkit-Base", fingerprint)]
        if _standing(folder) is not None:
            raise Busy(f"{at / FILE}: another command made a stack there meanwhile; look at it and try again")
        commit = store.record(changes, message, trailers, expected_head=head, began_on=began_on)
    elif lfs and not standing.tree().lfs:
        commit = _bring_over(standing)
    store.config_set(store.base_key, str(place.folder))
    Catalogue(store.own).remember_fingerprint(place.folder, fingerprint)
    root = store.root if store.prefix else None
    return replace(made, folder=store.folder, commit=commit, root=root)


def _checked_out(folder: Path) -> str | None:
    """What HEAD names where the stack will lie; None where there is no Git repository yet."""
    place = _nearest(folder)
    try:
        Git(place).read("rev_parse", "--git-dir")
    except NotFound:
        return None
    return GitStore.init(place).standing()


def _refuse_another_use(store: GitStore, settings: Settings) -> None:
    """WouldOverwrite where Git has a patches/ that is no stack's: it would be taken for one."""
    if store.head() is None or store.tree().patches is None:
        return
    if found := problems(store, settings=settings):
        raise WouldOverwrite(
            f"{store.folder / PATCHES}: is there already, and is no stack's ({one_line(found[0].path)}: "
            f"{found[0].message}); name another folder for the stack"
        )


def _bring_over(store: GitStore) -> str:
    """Keep a stack's patches in Git LFS from this commit on; what the commits before hold stays there."""
    stack = read_stack(store)
    files = {
        patch.name: {file: store.read(entry.oid) for file, entry in patch.files.items()}
        for patch in stack.patches
    }
    return store.record(
        Changes(patches=files, lfs=True), "Keep patches in Git LFS", expected_head=stack.commit
    )


def recipe_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as patchkit.toml holds it: without what each edit resolves anew."""
    return {name: value for name, value in recipe.to_dict().items() if name not in RESOLVED}


def source_of(base: str, place: Base) -> str:
    """What patchkit.toml calls a base that was named so; of a folder it keeps no path."""
    if os.path.isdir(os.path.expanduser(base)):
        return f"{FOLDER}{place.folder.name}"
    return place.source


def _nearest(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists: where Git is asked who commits."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _standing(folder: Path) -> GitStore | None:
    """The stack that is committed there, or in a folder above: one never lies in another."""
    place = _nearest(folder)
    while True:
        try:
            store = GitStore.find(place)
        except NotFound:
            return None
        try:
            store.settings()
            return store
        except NotFound:  # a patchkit.toml that is not committed is none
            if store.folder == store.root:
                return None
            place = store.folder.parent
