"""Solving patches again for the targets that they hold: on the stack as it is now, or on another base.

Nothing is optimised, so it costs a share of a commit. The patches to refit are taken off together and
solved one after another, oldest first, each on all that is in force by then: one patch alone on all
others, all patches as if each were committed anew on those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import MOVED_ON, large_files, record, refittable, remembered, solved_on_top
from patchkit.actions.clock import Clock
from patchkit.actions.edit import as_patch, below
from patchkit.actions.environment import environment, measured_trailers
from patchkit.actions.new_base import NewBase, commit_move, new_base
from patchkit.actions.workbench import Workbench
from patchkit.algebra.factors import Patch
from patchkit.algebra.parts import joined, parts_of, scale_of, scaled
from patchkit.editing.corpus import corpus_name
from patchkit.editing.editor import Refitter, find_editor
from patchkit.editing.kept import key_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.errors import BadInput, Busy, NotFound
from patchkit.evaluation.measure import FactChange, FactState, Summary, compare, observe, summarise
from patchkit.facts import Fact
from patchkit.git.store import Changes
from patchkit.patch import SCALE, solving_recipe
from patchkit.stack import Stack, StoredPatch, find_patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchkit.repository import Repository

__all__ = ["Refit", "Refitted", "refit"]


@dataclass(frozen=True)
class Refit:
    """One patch, before and after; ``changes`` are those of its facts."""

    name: str
    old: str
    """The id that it had."""
    patch: Patch
    changes: tuple[FactChange, ...]
    retried: tuple[Fact, ...]
    """Facts whose targets were optimised again."""
    timings: dict[str, float]

    @property
    def lost(self) -> tuple[Fact, ...]:
        """Facts that do not take."""
        return tuple(change.fact for change in self.changes if not change.took)


@dataclass(frozen=True)
class Refitted:
    """What a refit did; ``commit`` is None for a dry run, and where every patch is as it was."""

    patches: tuple[Refit, ...]
    summary: Summary
    above: tuple[str, ...]
    """Patches left as they are that were solved on top of versions that left."""
    refittable: tuple[str, ...]
    """Those of ``above`` that can be refitted too."""
    base: NewBase | None
    timings: dict[str, float]
    message: str
    commit: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> list[FactChange]:
        """Every fact of the refitted patches, before and after."""
        return [change for one in self.patches for change in one.changes]

    @property
    def unchanged(self) -> bool:
        """Whether every patch came out with the bits that it had."""
        return self.base is None and all(one.old == one.patch.id for one in self.patches)

    def to_dict(self) -> dict[str, Any]:
        return {
            "patches": [
                {
                    "patch": one.name,
                    "id": one.patch.id,
                    "was": one.old,
                    "facts": [change.to_dict() for change in one.changes],
                    "lost": [fact.text for fact in one.lost],
                    "retried": [fact.text for fact in one.retried],
                }
                for one in self.patches
            ],
            "summary": self.summary.to_dict(),
            "solved_on_top": list(self.above),
            "refittable": list(self.refittable),
            "base": None if self.base is None else self.base.to_dict(),
            "seconds": self.timings,
            "message": self.message,
            "commit": self.commit,
            "notes": list(self.notes),
        }


def refit(
    repository: Repository,
    words: Sequence[str] = (),
    *,
    base: str | None = None,
    retry: bool = False,
    corpus: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Refitted:
    """Solve the patches that ``words`` name (none: all) again for their targets, and commit them at once.

    With ``base`` every patch moves onto that one, of the same shapes, and so does patchkit.toml. ``retry``:
    facts that do not take afterwards are optimised again. ``corpus`` stands in for the text of each patch's
    statistics. BadInput names a patch whose targets or keys are not there, or what does not fit.
    """
    if not dry_run:
        repository.store.ensure_ready(for_patches=True)
    if base is not None and words:
        raise BadInput("a new base is for every patch: leave the patches' names out")
    began_on, stack = repository.store.standing(), repository.stack()
    chosen = _chosen(repository, stack, words)
    patches = repository.patches(stack)
    solved = {stored.name: _parts(stored.name, patches[stored.id]) for stored in chosen}
    clock = Clock()
    tell = progress or (lambda phase, done, total: None)
    tell("loading", 0, 1)
    moved = None if base is None else new_base(repository, base, patches)
    bench = repository.workbench(device) if moved is None else Workbench.open(moved.checkpoint, device)
    tell("loading", 1, 1)
    clock.lap("loading")
    solver = _Solver(repository, bench, corpus, retry, progress)
    for part in (part for parts in solved.values() for part in parts):
        solver.statistics(part)  # of the base with nothing on it, so before anything is put on it
    clock.lap("statistics")

    bench.put(patches.values() if moved is None else ())
    before = _observe(bench, chosen, "measuring before", tell)
    clock.lap("measuring")
    in_force = [patches[stored.id] for stored in stack.patches if stored not in chosen]
    again = []
    for number, stored in enumerate(chosen):
        tell("solving", number, len(chosen))
        again.append(solver.solve(solved[stored.name], in_force))
        in_force.append(again[-1].patch)
        clock.add(again[-1].timings)
    tell("solving", len(chosen), len(chosen))
    bench.put(in_force)
    after = _observe(bench, chosen, "measuring after", tell)
    clock.lap("measuring")

    refits = tuple(
        Refit(
            stored.name,
            stored.id,
            one.patch,
            tuple(compare(stored.facts, old, new)),
            one.retried,
            one.timings,
        )
        for stored, one, old, new in zip(chosen, again, before, after, strict=True)
    )
    above = solved_on_top(stack, chosen)
    done = Refitted(
        refits,
        summarise([change for one in refits for change in one.changes]),
        above,
        refittable(stack, above),
        moved,
        clock.seconds,
        message or _message(refits, moved),
        notes=tuple(dict.fromkeys(note for one in refits for note in large_files(repository, one.patch))),
    )
    if dry_run or done.unchanged:
        return done
    return _record(repository, began_on, stack, done, str(bench.model.device))


def _chosen(repository: Repository, stack: Stack, words: Sequence[str]) -> list[StoredPatch]:
    """The patches that are named, or all, oldest first."""
    named = {find_patch(stack, word).name for word in words}
    dated = [stored for stored, _ in stack.by_date(repository.store.history())]
    if not dated:
        raise NotFound("no patch is in force: there is nothing to refit")
    return [stored for stored in dated if not words or stored.name in named]


def _parts(name: str, patch: Patch) -> list[Patch]:
    """What is solved together; BadInput where there is nothing to solve it from."""
    if patch.solution is None:
        why = "its keys.safetensors was not shipped" if patch.left_out else f"{patch.method} keeps no targets"
        raise BadInput(
            f"{name}: {why}, so it cannot be refitted; commit its facts anew, patchkit commit --replace"
        )
    for part in (parts := parts_of(patch)):
        if not isinstance(find_editor(part.method), Refitter):
            raise BadInput(
                f"{name}: {part.method} cannot refit; commit its facts anew, patchkit commit --replace"
            )
    return parts


def _observe(
    bench: Workbench, chosen: Sequence[StoredPatch], phase: str, tell: Callable[[str, int, int], None]
) -> list[list[FactState]]:
    states = []
    for number, stored in enumerate(chosen):
        tell(phase, number, len(chosen))
        states.append(observe(bench.model, bench.tokenizer, stored.facts))
    tell(phase, len(chosen), len(chosen))
    return states


@dataclass(frozen=True)
class _Again:
    """A patch that was solved again."""

    patch: Patch
    retried: tuple[Fact, ...]
    timings: dict[str, float]


class _Solver:
    """Solves patches again on one base; statistics are read or collected once for each text and layer."""

    def __init__(
        self,
        repository: Repository,
        bench: Workbench,
        corpus: str | None,
        retry: bool,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._repository, self._bench, self._corpus = repository, bench, corpus
        self._retry, self._progress = retry, progress
        self._found: dict[str, Statistics] = {}

    def statistics(self, part: Patch) -> Statistics | None:
        """C for a patch's recipe, if it reads any; the first call for it is made with the base bare."""
        recipe = self._recipe(part)
        if not recipe.reads("statistics_text"):
            return None
        key = key_of([value for name, value in recipe.to_dict().items() if _is_of_text(name)])
        if key not in self._found:
            self._found[key] = statistics_for(
                self._bench.model,
                self._bench.tokenizer,
                recipe,
                folder=self._repository.store.private / "statistics",
                base=self._bench.checkpoint.as_read(),
                progress=self._progress,
            )
        return self._found[key]

    def solve(self, parts: Sequence[Patch], under: Sequence[Patch]) -> _Again:
        """The patch of ``parts``, each solved on ``under`` and the parts before it."""
        done: list[Patch] = []
        retried: list[Fact] = []
        clock = Clock()
        for part in parts:
            lower = [*under, *done]
            patch = self._solve(part, lower, (), clock)
            retry = self._retry and getattr(find_editor(part.method), "searches", True)
            if retry and (missed := self._missed(patch, lower)):
                retried += [part.facts[place] for place in missed]
                patch = self._solve(part, lower, missed, clock)
            done.append(patch)
        return _Again(done[0] if len(done) == 1 else joined(done), tuple(retried), clock.seconds)

    def _solve(self, part: Patch, lower: Sequence[Patch], anew: Sequence[int], clock: Clock) -> Patch:
        editor = find_editor(part.method)
        assert isinstance(editor, Refitter)
        assert part.solution is not None
        self._bench.put(lower)
        edited = editor.refit(
            self._bench.model,
            self._bench.tokenizer,
            part.facts,
            part.solution.targets,
            self._recipe(part),
            self.statistics(part),
            below=below(lower, self._bench.model, self._bench.checkpoint),
            anew=anew,
            progress=self._progress if anew else None,
        )
        clock.add(edited.timings)
        patch = as_patch(edited, part.facts, self._bench.model, self._bench.checkpoint, lower)
        return patch if SCALE not in part.recipe else scaled(patch, scale_of(part.recipe, part.name))

    def _missed(self, patch: Patch, lower: Sequence[Patch]) -> list[int]:
        """The places of facts that do not take with ``patch`` on ``lower``."""
        self._bench.put([*lower, patch])
        bare = [replace(fact, paraphrases=(), neighbors=()) for fact in patch.facts]
        states = observe(self._bench.model, self._bench.tokenizer, bare)
        return [place for place, state in enumerate(states) if not state.rewrite.prefers]

    def _recipe(self, part: Patch) -> Recipe:
        """The recipe that the patch was solved by; the path of its text, which no patch holds, from here."""
        recipe = Recipe.from_dict(solving_recipe(part.recipe), f"{part.name}: recipe")
        if not recipe.reads("statistics_text"):
            return recipe
        here = self._corpus or self._repository.recipe().statistics_text
        if self._corpus or corpus_name(here) == recipe.statistics_text:
            return recipe.override(statistics_text=here)
        return recipe


def _is_of_text(name: str) -> bool:
    return name in ("layers", "curvature") or (name.startswith("statistics_") and name != "statistics_digest")


def _record(repository: Repository, began_on: str, stack: Stack, done: Refitted, device: str) -> Refitted:
    """One commit; then the base's place, and what was measured."""
    files = {one.name: one.patch.files() for one in done.patches}
    trailers = [
        pair for one in done.patches for pair in (("Patchkit-Patch", one.name), ("Patchkit-Id", one.patch.id))
    ]
    trailers += measured_trailers(done.summary, done.timings, device)
    other: list[Stack] = []
    if done.base is not None:
        commit = commit_move(repository, began_on, stack, done.base, files, done.message, trailers)
    else:

        def still_right(now: Stack) -> None:
            other.append(now)
            for one in done.patches:
                if stack.get(one.name) != now.get(one.name):
                    raise Busy(f"{one.name}: was changed by another commit while it was being refitted")

        changes = Changes(patches=files)
        commit = record(repository, stack, changes, done.message, trailers, still_right, began_on=began_on)
    with remembered("the refit is committed"):
        _catalogue(repository, done, environment(device))
    return replace(done, commit=commit, notes=(*done.notes, MOVED_ON) if other else done.notes)


def _catalogue(repository: Repository, done: Refitted, computed_with: Mapping[str, Any]) -> None:
    for one in done.patches:
        repository.catalogue.record_results(
            one.patch.id,
            results=[change.to_dict() for change in one.changes],
            summary=summarise(one.changes).to_dict(),
            timings=one.timings,
            environment=computed_with,
        )
    repository.stack()  # believed, so that the catalogue has the patches and their facts too
    for one in done.patches:
        repository.catalogue.record_norms(one.patch.id, one.patch.norms(), one.patch.base, {})


def _message(refits: Sequence[Refit], moved: NewBase | None) -> str:
    names = ", ".join(one.name for one in refits[:3])
    more = f" and {len(refits) - 3} more" if len(refits) > 3 else ""
    return f"Refit {names}{more}" + (f" onto {moved.settings.base_source}" if moved is not None else "")
