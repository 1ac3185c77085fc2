"""The front door for Python: a repository of knowledge patches on a base.

Everything the commands do is a method here. Nothing that multiplies is imported before a method
needs it, so that opening a repository and reading its history costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.catalogue import Catalogue
from patchkit.errors import BadInput, Misconfigured
from patchkit.gitstore import Commit, GitStore
from patchkit.settings import FILE as SETTINGS
from patchkit.settings import FOLDER, Settings
from patchkit.stack import Problem, Stack, StoredPatch, find_patch, problems, read_patch, read_stack

if TYPE_CHECKING:
    from patchkit.actions.apply import Applied
    from patchkit.actions.ask import Answer
    from patchkit.actions.build import Built
    from patchkit.actions.commit import Committed
    from patchkit.actions.diff import Difference
    from patchkit.actions.given import Facts
    from patchkit.actions.revert import Reverted
    from patchkit.actions.show import Shown
    from patchkit.actions.status import Row, Status
    from patchkit.actions.workbench import Workbench
    from patchkit.checkpoint import Checkpoint
    from patchkit.editing.recipe import Recipe
    from patchkit.factors import Patch

__all__ = ["Repository"]


class Repository:
    """An ordinary Git repository (or a subfolder of one) that holds patches on one base.

    >>> repository = Repository.open("knowledge")            # doctest: +SKIP
    >>> done = repository.commit("facts.jsonl")              # doctest: +SKIP
    >>> model, tokenizer = repository.load()                 # doctest: +SKIP
    >>> repository.revert(done.patch.name)                   # doctest: +SKIP
    """

    def __init__(self, store: GitStore) -> None:
        self.store = store
        self.catalogue = Catalogue(store.own)

    @classmethod
    def open(cls, folder: str | Path = ".") -> Repository:
        """The repository that ``folder`` lies in; NotFound says how to make one."""
        return cls(GitStore.find(Path(folder)))

    @classmethod
    def init(
        cls,
        base: str | Path,
        folder: str | Path = ".",
        *,
        revision: str | None = None,
        convert: bool = False,
    ) -> Repository:
        """Make a repository on ``base`` in ``folder`` (or open the one there); see ``patchkit init``."""
        from patchkit.actions.init import init

        return cls.open(init(str(base), Path(folder), revision=revision, convert=convert).folder)

    # -- what is in force ------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """patchkit.toml as it is committed at HEAD."""
        return self.store.settings()

    def stack(self, revision: str = "HEAD") -> Stack:
        """The patches in force at a commit; BadInput lists the tree's problems if it has any."""
        return read_stack(self.store, revision, self.catalogue)

    def problems(self, revision: str = "HEAD") -> list[Problem]:
        """Everything that keeps the tree at ``revision`` from being believed."""
        return problems(self.store, revision, memory=self.catalogue)

    def patch(self, word: str | StoredPatch, revision: str = "HEAD") -> Patch:
        """One patch in force, by folder name or slug, read and checked."""
        stored = word if isinstance(word, StoredPatch) else find_patch(self.stack(revision), word)
        return read_patch(self.store, stored)

    def patches(self, stack: Stack | None = None) -> dict[str, Patch]:
        """The patches of a stack by id, read and checked."""
        chosen = stack if stack is not None else self.stack()
        return {stored.id: self.patch(stored) for stored in chosen.patches}

    def recipe(self, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe in patchkit.toml with some fields changed; BadInput names the field that is wrong."""
        from patchkit.editing.recipe import Recipe

        recipe = Recipe.from_dict(self.settings.recipe, f"{SETTINGS}: [recipe]")
        return recipe.override(**overrides) if overrides else recipe

    # -- the base --------------------------------------------------------------------------

    @property
    def base_folder(self) -> Path:
        """Where the base lies on this machine; a short name or hub id is fetched where it is not here."""
        from patchkit.models.sources import resolve_base

        place = self.store.config_get(self.store.base_key)
        if place and Path(place).is_dir():
            return Path(place)
        settings = self.settings
        if settings.base_source.startswith(FOLDER):
            where = f"is not at {place} any more" if place else "was not looked for on this machine yet"
            raise Misconfigured(
                f"the base {settings.base_source.removeprefix(FOLDER)!r} {where}; "
                "say where it is: patchkit base PATH"
            )
        return resolve_base(settings.base_source, settings.base_revision).folder

    def set_base(
        self,
        place: str,
        *,
        dry_run: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Path:
        """Say where the base lies on this machine; BadInput unless its fingerprint is the right one."""
        from patchkit.checkpoint import Checkpoint
        from patchkit.models.sources import resolve_base

        folder = resolve_base(place).folder
        self._check_fingerprint(folder, Checkpoint.open(folder).fingerprint(progress))
        if not dry_run:
            self.store.config_set(self.store.base_key, str(folder))
        return folder

    def checkpoint(self) -> Checkpoint:
        """The base, its fingerprint compared with the one that patchkit.toml names."""
        from patchkit.checkpoint import Checkpoint

        folder = self.base_folder
        known = self.catalogue.known_fingerprint(folder)
        checkpoint = Checkpoint.open(folder, fingerprint=known)
        found = checkpoint.fingerprint()
        if known is None:
            self.catalogue.remember_fingerprint(folder, found)
        self._check_fingerprint(folder, found)
        return checkpoint

    def _check_fingerprint(self, folder: Path, found: str) -> None:
        wanted = self.settings.base_fingerprint
        if found != wanted:
            raise BadInput(
                f"{folder}: is not this repository's base: its tensors have the fingerprint {found[:19]}…, "
                f"{SETTINGS} says {wanted[:19]}…; name the right one: patchkit base PATH"
            )

    def workbench(self, device: str = "auto") -> Workbench:
        """The checked base, loaded; put patches on it with :meth:`Workbench.put`."""
        from patchkit.actions.workbench import Workbench

        return Workbench.open(self.checkpoint(), device)

    def load(self, revision: str = "HEAD", device: str = "auto") -> tuple[Any, Any]:
        """(model, tokenizer) of transformers with the stack at ``revision`` applied."""
        stack = self.stack(revision)
        bench = self.workbench(device)
        bench.put(self.patches(stack).values())
        return bench.model, bench.tokenizer

    # -- changing --------------------------------------------------------------------------

    def commit(self, facts: Facts, **options: Any) -> Committed:
        """Edit facts in and commit them as a patch; options as in :func:`actions.commit.commit`."""
        from patchkit.actions.given import as_batch, check_gate, checked

        in_force = dict if options.get("replace") else lambda: self.stack().facts_in_force()
        batch = checked(lambda: as_batch(facts), in_force)  # said at once: what follows imports torch
        check_gate(options.get("gate") or {}, batch)
        from patchkit.actions.commit import commit

        return commit(self, batch, **options)

    def revert(self, *words: str, **options: Any) -> Reverted:
        """Take back patches, a commit or facts; options as in :func:`actions.revert.revert`."""
        from patchkit.actions.revert import revert

        return revert(self, words, **options)

    def apply(self, folder: str | Path, **options: Any) -> Applied:
        """Take in a patch folder from elsewhere."""
        from patchkit.actions.apply import apply

        return apply(self, Path(folder), **options)

    # -- trying and shipping ---------------------------------------------------------------

    def ask(self, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """What the base and the stack say to each prompt."""
        from patchkit.actions.ask import ask

        return ask(self, prompts, **options)

    @property
    def build_folder(self) -> Path:
        """Where `build` writes unless told otherwise."""
        return self.store.own / "build"

    def build(self, out: str | Path | None = None, **options: Any) -> Built | None:
        """Write base and stack as a checkpoint folder; None for a dry run."""
        from patchkit.actions.build import build

        return build(self, None if out is None else Path(out), **options)

    # -- looking ---------------------------------------------------------------------------

    def status(self) -> Status:
        """Branch, base, stack, what is half done, and the builds."""
        from patchkit.actions.status import status

        return status(self)

    def history(self, revision: str = "HEAD", limit: int | None = None) -> list[Commit]:
        """The commits that changed patches, newest first."""
        changed = [c for c in self.store.history(revision) if c.added or c.changed or c.removed]
        return changed[:limit]

    def listing(self, revision: str = "HEAD") -> list[Row]:
        """The patches in force, oldest first, each with who added it and when."""
        from patchkit.actions.status import listing

        return listing(self, revision)

    def show(self, word: str | None = None, revision: str = "HEAD") -> Shown:
        """One patch (the newest by default): facts, results, weights."""
        from patchkit.actions.show import show

        return show(self, word, revision)

    def diff(self, old: str | None = None, new: str | None = None) -> Difference:
        """What changes from one commit's stack to another's."""
        from patchkit.actions.diff import diff

        return diff(self, old, new)

    def search(self, text: str, *, everything: bool = False) -> list[dict[str, Any]]:
        """Facts in force (or of the whole history) whose words begin with those of ``text``."""
        tree = self.stack().tree
        if not self.catalogue.current(tree):
            self.catalogue.reindex(self.store, norms=False)
        return self.catalogue.search(text, None if everything else tree)

    # -- keeping ---------------------------------------------------------------------------

    def fsck(self, progress: Callable[[str, int, int], None] | None = None) -> list[Problem]:
        """Hash everything again: Git's objects, patches, the base, builds."""
        from patchkit.actions.fsck import fsck

        return fsck(self, progress=progress)

    def reindex(self) -> Mapping[str, int]:
        """Derive the catalogue again from Git; what cannot be derived is kept."""
        return self.catalogue.reindex(self.store)
