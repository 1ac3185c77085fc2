"""The front door for Python: a repository of knowledge patches on a base.

Everything the commands do is a method here. Nothing that multiplies is imported before a method
needs it, so that opening a repository and reading its history costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.catalogue import Catalogue
from patchkit.git.store import Commit, GitStore
from patchkit.settings import FILE as SETTINGS
from patchkit.settings import Settings
from patchkit.stack import Problem, Stack, StoredPatch, find_patch, problems, read_patch, read_stack

if TYPE_CHECKING:
    from patchkit.actions.apply import Applied
    from patchkit.actions.ask import Answer
    from patchkit.actions.bisect import Bisected
    from patchkit.actions.blame import Blamed, Responsible
    from patchkit.actions.build import Built
    from patchkit.actions.commit import Committed
    from patchkit.actions.diff import Difference
    from patchkit.actions.evaluate import Evaluation
    from patchkit.actions.export import Exported
    from patchkit.actions.gc import Collected
    from patchkit.actions.given import Facts
    from patchkit.actions.locate import Located
    from patchkit.actions.log import History
    from patchkit.actions.mergereport import Merged
    from patchkit.actions.pull import Pulled
    from patchkit.actions.refit import Refitted
    from patchkit.actions.repair import Repair
    from patchkit.actions.report import Report
    from patchkit.actions.revert import Reverted
    from patchkit.actions.review import Review
    from patchkit.actions.show import Shown
    from patchkit.actions.squash import Squashed
    from patchkit.actions.status import Row, Status
    from patchkit.actions.switch import Switched
    from patchkit.actions.tune import Tuned
    from patchkit.actions.undo import Undone
    from patchkit.actions.verify import Verified
    from patchkit.actions.workbench import Workbench
    from patchkit.algebra.factors import Patch
    from patchkit.checkpoint import Checkpoint
    from patchkit.database.questions import Answer as Rows
    from patchkit.editing.recipe import Recipe
    from patchkit.evaluation.cases import Cases
    from patchkit.git.moving import Step

__all__ = ["Repository"]

Progress = Callable[[str, int, int], None] | None


class Repository:
    """An ordinary Git repository (or a subfolder of one) that holds patches on one base.

    >>> repository = Repository.open("knowledge")            # doctest: +SKIP
    >>> done = repository.commit("facts.jsonl")              # doctest: +SKIP
    >>> model, tokenizer = repository.load()                 # doctest: +SKIP
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
        cls, base: str | Path, folder: str | Path = ".", *, revision: str | None = None, convert: bool = False
    ) -> Repository:
        """Make a repository on ``base`` in ``folder`` (or open the one there); see ``patchkit init``."""
        from patchkit.actions.init import init

        return cls.open(init(str(base), Path(folder), revision=revision, convert=convert).folder)

    @classmethod
    def clone(cls, url: str, folder: str | Path | None = None, *, base: str | None = None) -> Repository:
        """Clone ``url``, checked before it is checked out; see ``patchkit clone``."""
        from patchkit.actions.clone import clone

        return cls.open(clone(url, None if folder is None else str(folder), base=base).folder)

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
        return {stored.id: self.patch(stored) for stored in (stack or self.stack()).patches}

    def recipe(self, overrides: Mapping[str, Any] | None = None, *, facts: int = 1) -> Recipe:
        """patchkit.toml's recipe for so many facts, with some fields changed; BadInput names a wrong one."""
        from patchkit.editing.published import read_recipe

        return read_recipe(self.settings, SETTINGS, overrides, lambda: self.base_folder, facts=facts)

    # -- the base --------------------------------------------------------------------------

    @property
    def base_folder(self) -> Path:
        """Where the base lies on this machine; a short name or hub id is fetched where it is not here."""
        from patchkit.actions.base import base_folder

        return base_folder(self)

    def set_base(self, place: str, **options: Any) -> Path:
        """Say where the base lies on this machine; options as in :func:`actions.base.set_base`."""
        from patchkit.actions.base import set_base

        return set_base(self, place, **options)

    def checkpoint(self) -> Checkpoint:
        """The base, its fingerprint compared with the one that patchkit.toml names."""
        from patchkit.actions.base import checkpoint

        return checkpoint(self)

    def workbench(self, device: str = "auto") -> Workbench:
        """The checked base, loaded; put patches on it with :meth:`Workbench.put`."""
        from patchkit.actions.workbench import Workbench

        return Workbench.open(self.checkpoint(), device)

    def load(self, revision: str = "HEAD", device: str = "auto") -> tuple[Any, Any]:
        """(model, tokenizer) of transformers with the stack at ``revision`` applied."""
        from patchkit.actions.workbench import load_stack

        return load_stack(self, revision, device)

    # -- changing --------------------------------------------------------------------------

    def commit(self, facts: Facts, **options: Any) -> Committed:
        """Edit facts in and commit them as a patch; options as in :func:`actions.commit.commit`."""
        from patchkit.actions.gates import check_gate
        from patchkit.actions.given import as_batch, checked

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

    def merge(self, branch: str, **options: Any) -> Merged:
        """Merge another branch's facts; options as in :func:`actions.merge.merge`."""
        from patchkit.actions.merge import merge

        return merge(self, branch, **options)

    def merge_continue(self, **options: Any) -> Merged:
        """Finish a merge that stopped for choices; options as in :func:`actions.merge.go_on`."""
        from patchkit.actions.merge import go_on

        return go_on(self, **options)

    def merge_abort(self, *, dry_run: bool = False) -> None:
        """End a merge under way without effect."""
        from patchkit.actions.merge import abort

        abort(self, dry_run=dry_run)

    def refit(self, *words: str, **options: Any) -> Refitted:
        """Solve patches again for the targets that they hold; options as in :func:`actions.refit.refit`."""
        from patchkit.actions.refit import refit

        return refit(self, words, **options)

    def squash(self, *words: str, **options: Any) -> Squashed:
        """Join patches into one; options as in :func:`actions.squash.squash`."""
        from patchkit.actions.squash import squash

        return squash(self, words, **options)

    def undo(self, steps: int = 1, **options: Any) -> Undone:
        """Take back the last commands of patchkit on this branch; options as in :func:`actions.undo.undo`."""
        from patchkit.actions.undo import undo

        return undo(self, steps, **options)

    def undoable(self) -> list[Step]:
        """What :meth:`undo` can take back, newest first."""
        from patchkit.actions.undo import undoable

        return undoable(self)

    def switch(self, branch: str, **options: Any) -> Switched:
        """Go to a branch and bring the build in line; options as in :func:`actions.switch.switch`."""
        from patchkit.actions.switch import switch

        return switch(self, branch, **options)

    def pull(self, **options: Any) -> Pulled:
        """Fetch, check what came, go forward to it; options as in :func:`actions.pull.pull`."""
        from patchkit.actions.pull import pull

        return pull(self, **options)

    # -- trying and shipping ---------------------------------------------------------------

    def ask(self, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """What the base and the stack say to each prompt."""
        from patchkit.actions.ask import ask

        return ask(self, prompts, **options)

    def evaluate(self, cases: Cases | None = None, **options: Any) -> Evaluation:
        """Score a stack beside the base or another one; options as in :func:`actions.evaluate.evaluate`."""
        from patchkit.actions.evaluate import evaluate

        return evaluate(self, cases, **options)

    def locate(self, cases: Cases, **options: Any) -> Located:
        """Trace where a model holds the facts that it says; options as in :func:`actions.locate.locate`."""
        from patchkit.actions.locate import locate

        return locate(self, cases, **options)

    def tune(self, cases: Cases, **options: Any) -> Tuned:
        """Choose the recipe for the base by trials; options as in :func:`actions.tune.tune`."""
        from patchkit.actions.tune import tune

        return tune(self, cases, **options)

    @property
    def build_folder(self) -> Path:
        """Where `build` writes unless told otherwise."""
        return self.store.own / "build"

    def build(self, out: str | Path | None = None, **options: Any) -> Built | None:
        """Write base and stack as a checkpoint folder; None for a dry run."""
        from patchkit.actions.build import build

        return build(self, None if out is None else Path(out), **options)

    def export(self, words: Sequence[str], out: str | Path, **options: Any) -> Exported:
        """Write patches as an adapter for another program; options as in :func:`actions.export.export`."""
        from patchkit.actions.export import export

        return export(self, words, Path(out), **options)

    def take_in(self, folder: str | Path, facts: Facts | None = None, **options: Any) -> Committed:
        """Commit a PEFT adapter as a patch; options as in :func:`actions.take_in.take_in`."""
        from patchkit.actions.take_in import take_in

        return take_in(self, Path(folder), facts, **options)

    def card(self, words: Sequence[str] = (), **options: Any) -> str:
        """The model card of patches as Markdown; options as in :func:`actions.card.card`."""
        from patchkit.actions.card import card

        return card(self, words, **options)

    # -- looking ---------------------------------------------------------------------------

    def status(self) -> Status:
        """Branch, base, stack, what is half done, and the builds."""
        from patchkit.actions.status import status

        return status(self)

    def history(self, revision: str = "HEAD", limit: int | None = None) -> list[Commit]:
        """The commits that changed patches, newest first."""
        changed = [c for c in self.store.history(revision) if c.added or c.changed or c.removed or c.cut]
        return changed[:limit]

    def log(self, revision: str = "HEAD", limit: int | None = None, **options: Any) -> History:
        """The same with what each did to facts, searched, or drawn; options as in :func:`actions.log.log`."""
        from patchkit.actions.log import log

        return log(self, revision, limit, **options)

    def listing(self, revision: str = "HEAD", *, interference: bool = False) -> list[Row]:
        """The patches in force, oldest first, each with who added it, when, and how large it is."""
        from patchkit.actions.status import listing

        return listing(self, revision, interference=interference)

    def show(self, word: str | None = None, revision: str = "HEAD") -> Shown:
        """One patch (the newest by default): facts, results, weights."""
        from patchkit.actions.show import show

        return show(self, word, revision)

    def diff(self, old: str | None = None, new: str | None = None, **options: Any) -> Difference:
        """What changes from one commit's stack to another's; options as in :func:`actions.diff.diff`."""
        from patchkit.actions.diff import diff

        return diff(self, old, new, **options)

    def blame(self, text: str, revision: str = "HEAD") -> list[Responsible]:
        """The facts in force that ``text`` means, each with the commit that brought it; loads no model."""
        from patchkit.actions.blame import matching

        return matching(self, text, revision)

    def measure_blame(self, prompt: str, **options: Any) -> Blamed:
        """What each patch does to an answer; options as in :func:`actions.blame.measure`."""
        from patchkit.actions.blame import measure

        return measure(self, prompt, **options)

    def bisect(self, prompt: str, expect: str, **options: Any) -> Bisected:
        """The commit that made or broke an answer; options as in :func:`actions.bisect.bisect`."""
        from patchkit.actions.bisect import bisect

        return bisect(self, prompt, expect, **options)

    def report(self, revision: str = "HEAD") -> Report:
        """Everything about the stack, for people who do not have it; see ``patchkit report``."""
        from patchkit.actions.report import report

        return report(self, revision)

    def search(self, text: str, *, everything: bool = False) -> list[dict[str, Any]]:
        """Facts in force (or of the whole history) whose words begin with those of ``text``."""
        from patchkit.actions.query import search

        return search(self, text, everything=everything)

    def sql(self, query: str) -> Rows:
        """What the catalogue answers to one SQL select; BadInput where it is none or would write."""
        from patchkit.actions.query import sql

        return sql(self, query)

    # -- keeping ---------------------------------------------------------------------------

    def fsck(self, progress: Progress = None, *, full: bool = False) -> list[Problem]:
        """Hash everything again: Git's objects, patches, the base, builds; ``full``: derive again too."""
        from patchkit.actions.fsck import fsck

        return fsck(self, full=full, progress=progress)

    def verify(self, revision: str = "HEAD", **options: Any) -> Verified:
        """Hash everything again and read who signed it; options as in :func:`actions.verify.verify`."""
        from patchkit.actions.verify import verify

        return verify(self, revision, **options)

    def repair(self, progress: Progress = None, *, full: bool = False) -> list[Repair]:
        """The same, mending what can be mended without losing anything; see ``patchkit fsck --repair``."""
        from patchkit.actions.repair import repair

        return repair(self, full=full, progress=progress)

    def review(self, commits: str) -> Review:
        """Check every commit of a range (``"main..HEAD"``); see ``patchkit fsck --ci``."""
        from patchkit.actions.review import review

        return review(self, commits)

    def gc(self, **options: Any) -> Collected:
        """Remove what this machine keeps and nothing refers to; options as in :func:`actions.gc.gc`."""
        from patchkit.actions.gc import gc

        return gc(self, **options)

    def reindex(self) -> Mapping[str, int]:
        """Derive the catalogue again from Git; what cannot be derived is kept."""
        return self.catalogue.reindex(self.store)
