"""The front door for Python: a repository of knowledge patches on a base.

Everything the commands do is a method here. Nothing that multiplies is imported before a method
needs it, so that opening a repository and reading its history costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.catalogue import Catalogue
from patchkit.errors import BadInput, Misconfigured, NotFound
from patchkit.facts import Batch, Fact, read_facts
from patchkit.gitstore import GitStore
from patchkit.settings import Settings
from patchkit.stack import Problem, Stack, StoredPatch, find_patch, problems, read_patch, read_stack

if TYPE_CHECKING:
    from patchkit.actions.apply import Applied
    from patchkit.actions.ask import Answer
    from patchkit.actions.build import Built
    from patchkit.actions.commit import Committed
    from patchkit.actions.revert import Reverted
    from patchkit.actions.workbench import Workbench
    from patchkit.checkpoint import Checkpoint
    from patchkit.factors import Patch

__all__ = ["Repository"]

BASE_KEY = "patchkit.base"


class Repository:
    """An ordinary Git repository (or a subfolder of one) that holds patches on one base.

    >>> repository = Repository.open("knowledge")            # doctest: +SKIP
    >>> done = repository.commit("facts.jsonl")              # doctest: +SKIP
    >>> model, tokenizer = repository.load()                 # doctest: +SKIP
    >>> repository.revert(done.patch.name)                   # doctest: +SKIP
    """

    def __init__(self, store: GitStore) -> None:
        self.store = store
        self.catalogue = Catalogue(store.private)

    @classmethod
    def open(cls, folder: str | Path = ".") -> Repository:
        """The repository that ``folder`` lies in; NotFound says how to make one."""
        return cls(GitStore.find(Path(folder)))

    @classmethod
    def init(cls, base: str | Path, folder: str | Path = ".", *, revision: str | None = None) -> Repository:
        """Make (or complete) a repository on ``base``; see ``patchkit init``."""
        from patchkit.actions.init import init

        return init(cls, str(base), Path(folder), revision=revision)

    # -- what is in force ------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """patchkit.toml as it is committed at HEAD."""
        return self.store.settings()

    def stack(self, revision: str = "HEAD") -> Stack:
        """The patches in force at a commit; BadInput lists the tree's problems if it has any."""
        return read_stack(self.store, revision)

    def problems(self, revision: str = "HEAD") -> list[Problem]:
        """Everything that keeps the tree at ``revision`` from being believed."""
        return problems(self.store, revision)

    def patch(self, word: str | StoredPatch, revision: str = "HEAD") -> Patch:
        """One patch in force, by folder name or slug, read and checked."""
        stored = word if isinstance(word, StoredPatch) else find_patch(self.stack(revision), word)
        return read_patch(self.store, stored)

    def patches(self, stack: Stack | None = None) -> dict[str, Patch]:
        """The patches of a stack by id, read and checked."""
        chosen = stack if stack is not None else self.stack()
        return {stored.id: self.patch(stored) for stored in chosen.patches}

    # -- the base --------------------------------------------------------------------------

    @property
    def base_folder(self) -> Path:
        """Where the base lies on this machine."""
        from patchkit.models.sources import resolve_base

        place = self.store.config_get(BASE_KEY)
        if place:
            if not Path(place).is_dir():
                raise NotFound(f"the base is not at {place} any more; say where it is: patchkit base PATH")
            return Path(place)
        source = self.settings.base_source
        if source.startswith("folder:"):
            raise Misconfigured(
                f"where the base {source.removeprefix('folder:')!r} lies on this machine is not known; "
                "say it: patchkit base PATH"
            )
        return resolve_base(source, self.settings.base_revision).folder

    def checkpoint(self) -> Checkpoint:
        """The base, its fingerprint compared with the one that patchkit.toml names."""
        from patchkit.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(self.base_folder)
        found = self.fingerprint(checkpoint)
        if found != self.settings.base_fingerprint:
            raise BadInput(
                f"{checkpoint.folder}: not this repository's base: its tensors' fingerprint is {found[:19]}…, "
                f"patchkit.toml says {self.settings.base_fingerprint[:19]}…; say where the right one is: "
                "patchkit base PATH"
            )
        return checkpoint

    def fingerprint(
        self, checkpoint: Checkpoint, progress: Callable[[int, int, str], None] | None = None
    ) -> str:
        """A checkpoint's fingerprint, hashed again only when a file's size or times changed."""
        known = self.catalogue.known_fingerprint(checkpoint.folder)
        if known is not None:
            return known
        fingerprint = checkpoint.fingerprint(progress)
        self.catalogue.remember_fingerprint(checkpoint.folder, fingerprint)
        return fingerprint

    def workbench(self, device: str = "auto") -> Workbench:
        """The checked base, loaded; put patches on it with :meth:`Workbench.put`."""
        from patchkit.actions.workbench import Workbench

        return Workbench.open(self.checkpoint().folder, device)

    def load(self, revision: str = "HEAD", device: str = "auto") -> tuple[Any, Any]:
        """(model, tokenizer) of transformers with the stack at ``revision`` applied."""
        stack = self.stack(revision)
        bench = self.workbench(device)
        bench.put(self.patches(stack).values())
        return bench.model, bench.tokenizer

    # -- changing --------------------------------------------------------------------------

    def commit(self, facts: Batch | str | Path | Sequence[Fact], **options: Any) -> Committed:
        """Edit facts in and commit them as a patch; options as in :func:`actions.commit.commit`."""
        from patchkit.actions.commit import commit

        if isinstance(facts, (str, Path)):
            facts = read_facts(facts)
        elif not isinstance(facts, Batch):
            facts = Batch("facts", tuple(facts), tuple(range(1, len(facts) + 1)))
        return commit(self, facts, **options)

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

    def build(self, out: str | Path | None = None, **options: Any) -> Built:
        """Write base and stack as a checkpoint folder."""
        from patchkit.actions.build import build

        return build(self, None if out is None else Path(out), **options)

    def fsck(self, progress: Callable[[str, int, int], None] | None = None) -> list[Problem]:
        """Hash everything again: Git's objects, patches, the base, builds."""
        from patchkit.actions.fsck import fsck

        return fsck(self, progress)

    def reindex(self) -> Mapping[str, int]:
        """Derive the catalogue again from Git; what cannot be derived is kept."""
        return self.catalogue.reindex(self.store)
