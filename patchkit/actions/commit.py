"""From facts to a committed patch: check, edit, measure on the model that was made, record."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import (
    MOVED_ON,
    GateRefused,
    OtherBase,
    Taken,
    apply_command,
    keep_aside,
    kept_line,
    large_files,
    record,
    refuse_clashes,
    remembered,
    staying,
    superseded,
)
from patchkit.actions.clock import Clock
from patchkit.actions.earlier import Earlier, earlier_facts
from patchkit.actions.edit import as_patch, below
from patchkit.actions.environment import environment, measured_trailers
from patchkit.actions.gates import failed
from patchkit.actions.given import as_batch
from patchkit.actions.harm import asking_of, moved
from patchkit.actions.notes import many_facts, short_text, unread_settings, why_unsaid
from patchkit.actions.workbench import Workbench
from patchkit.algebra.factors import Patch
from patchkit.editing.editor import Editor, ready_editor
from patchkit.editing.kept import key_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.editing.task import EditorBase
from patchkit.editing.written import contexts_for, contexts_name
from patchkit.errors import BadInput, Busy, PatchkitError
from patchkit.evaluation.harm import Harm
from patchkit.evaluation.measure import FactChange, FactState, Summary, compare, observe, summarise
from patchkit.facts import Batch, Fact, with_reverses
from patchkit.git.messages import is_trailer
from patchkit.git.recording import NothingToCommit
from patchkit.git.store import Changes
from patchkit.models.anatomy import anatomy_of
from patchkit.models.names import edited_weights
from patchkit.models.trial import try_words
from patchkit.stack import Stack

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Committed", "commit", "record_committed", "text_and_statistics"]

Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Committed:
    """What a commit did; ``commit`` is None for a dry run, and where it is ``unchanged``: the patch that it
    would replace is that very patch."""

    patch: Patch
    commit: str | None
    message: str
    changes: list[FactChange]
    summary: Summary
    known: tuple[Fact, ...]
    """Facts that the model said before; ``skipped_known`` tells whether they were left out."""
    skipped_known: bool
    replaced: list[Taken]
    timings: dict[str, float]
    """Seconds by phase."""
    norms: dict[str, float]
    """‖ΔW‖ (Frobenius) by weight."""
    base_norms: dict[str, float]
    """‖W‖ of the base by weight."""
    harm: tuple[Harm, Harm]
    """What the stack does to the rest, without this edit and with it."""
    earlier: Earlier
    """What became of the facts that were in force before."""
    size: int
    """Bytes of the patch's files."""
    notes: tuple[str, ...] = ()
    """What a person should know of this edit, a line each."""
    unchanged: bool = False

    @property
    def norm(self) -> tuple[float, float]:
        """‖ΔW‖ over all weights together, and its share of the base's ‖W‖ over the same weights."""
        delta, base = math.hypot(*self.norms.values()), math.hypot(*self.base_norms.values())
        return delta, delta / base if base else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.patch.name,
            "id": self.patch.id,
            "commit": self.commit,
            "message": self.message,
            "summary": self.summary.to_dict(),
            "harm": {"before": self.harm[0].to_dict(), "after": self.harm[1].to_dict()},
            "earlier": self.earlier.to_dict(),
            "facts": [change.to_dict() for change in self.changes],
            "known": [fact.text for fact in self.known],
            "skipped_known": self.skipped_known,
            "replaced": [{"patch": t.patch, "facts": [f.text for f in t.facts]} for t in self.replaced],
            "seconds": self.timings,
            "norm": self.norm[0],
            "norm_share": self.norm[1],
            "size": self.size,
            "notes": list(self.notes),
            "unchanged": self.unchanged,
        }


def commit(
    repository: Repository,
    batch: Batch,
    *,
    message: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
    skip_known: bool = False,
    with_reverse: bool = False,
    gate: Mapping[str, float] | None = None,
    dry_run: bool = False,
    device: str = "auto",
    batch_size: int | str = "auto",
    progress: Progress = None,
) -> Committed:
    """Edit ``batch`` into the model at HEAD and record it as one patch, in one commit.

    ``with_reverse``: each fact's reverse too, as a fact of its own that is not said already
    (`facts.with_reverses`).

    Raises FactsError (nothing loaded) on facts that clash with the stack unless ``replace``,
    and GateRefused when ``gate`` is not met: the patch is then kept aside and the line says where.
    """
    if not dry_run:
        repository.store.ensure_ready(for_patches=True)
    began_on, stack = repository.store.standing(), repository.stack()
    if with_reverse:
        batch = with_reverses(batch, stack.facts_in_force())
    editor, recipe, large = _ready(repository, overrides, len(batch.facts))
    if not replace:
        refuse_clashes(batch, stack)
    patches = repository.patches(stack)
    clock = Clock()
    tell = progress or (lambda phase, done, total: None)
    tell("loading", 0, 1)
    bench = repository.workbench(device)
    tell("loading", 1, 1)
    _refuse_weights(bench, editor, recipe)
    clock.lap("loading")
    recipe, statistics = text_and_statistics(repository, bench, recipe, progress)
    clock.lap("statistics")

    standing = bench.weights(patches.values())
    bench.use(standing)
    tell("measuring before", 0, 1)
    facts, before, known = _observe_before(bench, batch.facts, skip_known)
    if large and len(facts) < len(batch.facts):  # those that are left may be few
        editor, recipe, large = _ready(repository, overrides, len(facts))
        _refuse_weights(bench, editor, recipe)
        bench.use({})
        recipe, statistics = text_and_statistics(repository, bench, recipe, progress)
    replaced = superseded(stack, facts, lambda stored: patches[stored.id])
    under = staying(stack, patches, replaced)
    bench.put(under)
    tell("measuring before", 1, 1)
    clock.lap("measuring")

    unfinished = _unfinished(repository, bench, under, facts)
    edited = editor.edit(
        bench.model,
        bench.tokenizer,
        facts,
        recipe,
        statistics,
        below=below(under, bench.model, bench.checkpoint),
        batch_size=batch_size,
        unfinished=unfinished,
        progress=progress,
    )
    clock.add(edited.timings)
    patch = as_patch(edited, facts, bench.model, bench.checkpoint, under)
    tell("measuring after", 0, 1)
    made = bench.weights([*under, patch])
    bench.use(made)
    changes = compare(facts, before, observe(bench.model, bench.tokenizer, facts))
    after = [each.id for each in (*under, patch)]
    asking, stacks = asking_of(repository, bench), ((list(patches), standing), (after, made))
    harm = moved(repository, asking, *stacks)
    earlier = earlier_facts(asking, stack, under, patch, *stacks)
    tell("measuring after", 1, 1)
    clock.lap("measuring")

    done = Committed(
        patch=patch,
        commit=None,
        message=message or _message(facts, replaced),
        changes=changes,
        summary=summarise(changes),
        known=known,
        skipped_known=skip_known,
        replaced=replaced,
        timings=clock.seconds,
        norms=patch.norms(),
        base_norms={name: float(bench.checkpoint.read(name).double().norm()) for name in patch.deltas},
        harm=harm,
        earlier=earlier,
        size=sum(len(data) for data in patch.files().values()),
        notes=(
            *unread_settings(repository),
            *(many_facts(repository, len(facts), overrides or {}) if large else ()),
            *short_text(recipe, statistics),
            *why_unsaid(bench, changes, edited.recipe),
            *harm[1].warnings(),
            *large_files(repository, patch),
        ),
    )
    _check_gate(None if dry_run else repository, done, gate or {}, bench)
    if dry_run:
        return done  # what was found stays, so that the commit itself need not look for it again
    done = record_committed(repository, began_on, stack, done, bench)
    shutil.rmtree(unfinished, ignore_errors=True)
    with suppress(OSError):  # what others keep beside it stays
        unfinished.parent.rmdir()
    return done


def _ready(
    repository: Repository, overrides: Mapping[str, Any] | None, count: int
) -> tuple[Editor, Recipe, bool]:
    """The editor and recipe of so many facts, and whether the recipe is another than that of few."""
    recipe = repository.recipe(overrides, facts=count)
    home = repository.store.private / "statistics"
    editor, ready = ready_editor(recipe, home, lambda: repository.checkpoint().as_read())
    return editor, ready, recipe != repository.recipe(overrides)


def _refuse_weights(bench: Workbench, editor: Editor, recipe: Recipe) -> None:
    """What cannot be edited; what another package's editor edits is its own affair."""
    if isinstance(editor, EditorBase):
        edited_weights(bench.model, anatomy_of(bench.model), bench.checkpoint, recipe.layers)


def text_and_statistics(
    repository: Repository, bench: Workbench, recipe: Recipe, progress: Progress
) -> tuple[Recipe, Statistics | None]:
    """Context templates and second moments of the base with nothing on it, where the method reads them."""
    if not recipe.reads("statistics_text"):
        return recipe, None
    tell = progress or (lambda phase, done, total: None)
    model, tokenizer, base = bench.model, bench.tokenizer, bench.checkpoint.as_read()
    folder = repository.store.private / "statistics"
    tell("contexts", 0, 1)
    if not (folder / contexts_name(recipe, base)).exists():
        try_words(model, tokenizer, recipe.layers)  # before minutes of work for what may not be edited
    templates = contexts_for(model, tokenizer, recipe, folder=folder, base=base)
    tell("contexts", 1, 1)
    statistics = statistics_for(model, tokenizer, recipe, folder=folder, base=base, progress=progress)
    return recipe.override(templates=templates), statistics


def _unfinished(
    repository: Repository, bench: Workbench, under: Sequence[Patch], facts: Sequence[Fact]
) -> Path:
    """Where an edit of the base with these patches keeps what it need not do again if it is killed: another
    batch's is elsewhere, so that of two that run at once the first does not take the other's away."""
    weights = {"base": bench.checkpoint.as_read(), "under": sorted(patch.id for patch in under)}
    asked = [[*fact.key, fact.target] for fact in facts]
    return repository.store.private / "unfinished" / key_of({**weights, "facts": asked})


def record_committed(
    repository: Repository, began_on: str, stack: Stack, done: Committed, bench: Workbench
) -> Committed:
    """Commit the patch and what it replaces; then tell the catalogue what was measured.

    Busy, with the patch kept aside, where something else is checked out by then.
    """
    gone = {taken.patch for taken in done.replaced if taken.remaining is None} - {done.patch.name}
    solved = {t.patch: t.remaining.files() for t in done.replaced if t.remaining is not None}
    changes = Changes(patches={**solved, done.patch.name: done.patch.files()}, removed=gone)

    other: list[Stack] = []

    def still_right(now: Stack) -> None:
        other.append(now)
        for taken in done.replaced:
            if stack.get(taken.patch) != now.get(taken.patch):
                raise Busy(f"{taken.patch}: was changed by another commit while its fact was being replaced")
        refuse_clashes(as_batch(done.patch.facts), now, {taken.patch for taken in done.replaced})

    try:
        trailers = _trailers(done, bench)
        commit_id = record(repository, stack, changes, done.message, trailers, still_right, began_on=began_on)
    except NothingToCommit:
        return replace_fields(done, unchanged=True)
    except OtherBase:  # it fits this stack no more, wherever it is kept
        raise
    except PatchkitError as error:
        raise kept_line(error, keep_aside(repository, done.patch), bool(done.replaced)) from error
    notes = (*done.notes, MOVED_ON) if other else done.notes
    done = replace_fields(done, commit=commit_id, notes=notes)
    try:
        _catalogue(repository, done, environment(str(bench.model.device)))
    except PatchkitError as error:  # the commit is made; what was measured also stands in its message
        return replace_fields(done, notes=(*done.notes, f"the catalogue has not got the results: {error}"))
    return done


def _catalogue(repository: Repository, done: Committed, computed_with: Mapping[str, Any]) -> None:
    repository.catalogue.record_results(
        done.patch.id,
        results=[change.to_dict() for change in done.changes],
        summary=done.summary.to_dict(),
        timings=done.timings,
        environment=computed_with,
    )
    repository.stack()  # believed, so that the catalogue has the patch and its facts too
    repository.catalogue.record_norms(done.patch.id, done.norms, done.patch.base, done.base_norms)


def _trailers(done: Committed, bench: Workbench) -> list[tuple[str, str]]:
    """What is not part of the id: measured results, time, versions."""
    measured = measured_trailers(done.summary, done.timings, str(bench.model.device))
    return [("Patchkit-Patch", done.patch.name), ("Patchkit-Id", done.patch.id), *measured]


def _observe_before(
    bench: Workbench, facts: tuple[Fact, ...], skip_known: bool
) -> tuple[tuple[Fact, ...], list[FactState], tuple[Fact, ...]]:
    states = observe(bench.model, bench.tokenizer, facts)
    is_known = [state.rewrite.argmax and bool(state.rewrite.says) for state in states]
    known = tuple(fact for fact, flag in zip(facts, is_known, strict=True) if flag)
    if not skip_known or not known:
        return facts, states, known
    if len(known) == len(facts):
        what = "this fact" if len(facts) == 1 else f"all {len(facts)} facts"
        raise BadInput(f"the model already says {what}; leave --skip-known out to edit in what it says")
    kept = [(fact, state) for fact, state, flag in zip(facts, states, is_known, strict=True) if not flag]
    return tuple(fact for fact, _ in kept), [state for _, state in kept], known


def _check_gate(
    repository: Repository | None, done: Committed, gate: Mapping[str, float], bench: Workbench
) -> None:
    """GateRefused where a gate fails; patch and results are kept aside in the repository, if one is given."""
    missed = _failed(done, gate)
    if not missed:
        return
    refused = f"the gate refused the edit ({'; '.join(missed)})"
    if repository is None:
        raise GateRefused(refused, done)
    kept = keep_aside(repository, done.patch)
    command = apply_command(kept, bool(done.replaced))
    with remembered("the patch is kept"):
        _catalogue(repository, done, environment(str(bench.model.device)))
    raise GateRefused(f"{refused}; it is kept in {kept}, commit it all the same with: {command}", done)


def _failed(done: Committed, gate: Mapping[str, float]) -> list[str]:
    """See `gates.failed`. Where no fact was in force and said, none can be lost."""
    kept = 1.0 if done.earlier.kept is None else done.earlier.kept
    harm = done.harm[1]
    multiples = {"perplexity": harm.rise, "growth": harm.growth}
    return failed(gate, {**done.summary.to_dict(), "kept": kept}, multiples)


def _message(facts: Sequence[Fact], taken: Sequence[Taken]) -> str:
    count = "1 fact" if len(facts) == 1 else f"{len(facts)} facts"
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    named = ", ".join(subjects[:3]) + (f" and {len(subjects) - 3} more" if len(subjects) > 3 else "")
    verb = "Replace" if taken else "Edit"
    told = [f"{fact.text} → {fact.target}" for fact in facts[:20]]
    if all(map(is_trailer, told)):  # Git would take them for trailers, and the real ones join them
        told = [f"- {line}" for line in told]
    lines = [f"{verb} {count}: {named}", "", *told]
    if len(facts) > 20:
        lines.append(f"… and {len(facts) - 20} more")
    return "\n".join(lines)
