"""From facts to a committed patch: check, edit, measure on the model that was made, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import Taken, take_out
from patchkit.actions.workbench import Workbench
from patchkit.editing.editor import Edited, find_editor
from patchkit.editing.recipe import Recipe
from patchkit.errors import BadInput, Refused
from patchkit.evaluation.measure import FactChange, FactState, Summary, compare, observe, summarise
from patchkit.factors import Patch
from patchkit.facts import Batch, Fact, FactsError, clashes
from patchkit.stack import Stack

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Committed", "commit", "parse_gate"]

Progress = Callable[[str, int, int], None] | None
GATES = ("efficacy", "argmax", "generation", "paraphrases", "neighbors")


@dataclass(frozen=True)
class Committed:
    """What a commit did; ``commit`` is None for a dry run."""

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
    norm: tuple[float, float]
    """Frobenius norm of ΔW over all weights, and its share of the edited base weights' norm."""
    size: int
    """Bytes of the patch's files."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.patch.name,
            "id": self.patch.id,
            "commit": self.commit,
            "message": self.message,
            "summary": self.summary.to_dict(),
            "facts": [change.to_dict() for change in self.changes],
            "known": [fact.text for fact in self.known],
            "skipped_known": self.skipped_known,
            "replaced": [{"patch": t.patch, "facts": [f.text for f in t.facts]} for t in self.replaced],
            "seconds": self.timings,
            "norm": self.norm[0],
            "norm_share": self.norm[1],
            "size": self.size,
        }


def commit(
    repository: Repository,
    batch: Batch,
    *,
    message: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
    skip_known: bool = False,
    gate: Mapping[str, float] | None = None,
    dry_run: bool = False,
    device: str = "auto",
    batch_size: int | str = "auto",
    progress: Progress = None,
) -> Committed:
    """Edit ``batch`` into the model at HEAD and record it as one patch, in one commit.

    Raises FactsError (nothing loaded) on facts that clash with the stack unless ``replace``,
    and Refused when ``gate`` is not met: the patch is then kept aside and the line says where.
    """
    if not dry_run:
        repository.store.ensure_ready()
    stack = repository.stack()
    replaced = _superseded(repository, stack, batch, replace)
    recipe = repository.recipe(overrides)
    clock = _Clock()
    bench = repository.workbench(device)
    patches = repository.patches(stack)
    bench.put(patches.values())
    clock.lap("loading")

    facts, before, known = _observe_before(bench, batch.facts, skip_known)
    clock.lap("measuring")
    gone = {taken.patch for taken in replaced}
    remaining = [patches[stored.id] for stored in stack.patches if stored.name not in gone]
    remaining += [taken.remaining for taken in replaced if taken.remaining is not None]
    bench.put(remaining)

    editor = find_editor(recipe.method)
    edited = editor.edit(
        bench.model,
        bench.tokenizer,
        facts,
        recipe,
        repository.statistics(bench),
        batch_size=batch_size,
        progress=progress,
    )
    clock.add(edited.timings)
    patch = as_patch(edited, facts, repository.settings.base_fingerprint, bench, remaining)
    bench.put([*remaining, patch])
    changes = compare(facts, before, observe(bench.model, bench.tokenizer, facts))
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
        norm=_norm(bench, patch),
        size=sum(len(data) for data in patch.files().values()),
    )
    _check_gate(repository, done, gate or {})
    return done if dry_run else record(repository, stack, done)


def as_patch(
    edited: Edited, facts: Sequence[Fact], base: str, bench: Workbench, under: Sequence[Patch]
) -> Patch:
    """An editor's factors as a patch: tensors under their stored names, with their whole recipe."""
    stored = bench.checkpoint.stored_name
    return Patch(
        facts=tuple(facts),
        deltas={stored(name): delta for name, delta in edited.deltas.items()},
        base=base,
        method=edited.recipe.method,
        recipe=edited.recipe.to_dict(),
        solved_on=tuple(sorted(patch.id for patch in under)),
        solution=None if edited.solution is None else edited.solution.renamed(stored),
    )


def parse_gate(text: str) -> dict[str, float]:
    """"efficacy=0.9,neighbors=0.95" as shares; BadInput names the part that is wrong."""
    gates: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if name not in GATES or not 0 <= share <= 1:
            raise BadInput(
                f"--gate {part.strip()!r}: write NAME=SHARE with a share from 0 to 1 and a name of {', '.join(GATES)}"
            )
        gates[name] = share
    return gates


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def add(self, timings: Mapping[str, float]) -> None:
        self.seconds.update(timings)
        self._last = time.perf_counter()


def _superseded(repository: Repository, stack: Stack, batch: Batch, replace: bool) -> list[Taken]:
    in_force = stack.facts_in_force()
    faults = clashes(batch, in_force)
    if faults and not replace:
        raise FactsError(faults)
    leaving: dict[str, set[tuple[str, str]]] = {}
    for fact in batch.facts:
        if fact.key in in_force:
            leaving.setdefault(in_force[fact.key][0], set()).add(fact.key)
    taken = []
    for name, keys in sorted(leaving.items()):
        patch = repository.patch(name)
        taken.append(take_out(patch, [i for i, f in enumerate(patch.facts) if f.key in keys], name))
    return taken


def _observe_before(
    bench: Workbench, facts: tuple[Fact, ...], skip_known: bool
) -> tuple[tuple[Fact, ...], list[FactState], tuple[Fact, ...]]:
    states = observe(bench.model, bench.tokenizer, facts)
    is_known = [state.rewrite.argmax and bool(state.rewrite.says) for state in states]
    known = tuple(fact for fact, flag in zip(facts, is_known, strict=True) if flag)
    if not skip_known or not known:
        return facts, states, known
    if len(known) == len(facts):
        raise BadInput(f"the model already says all {len(facts)} facts; leave --skip-known out to edit them in")
    kept = [(fact, state) for fact, state, flag in zip(facts, states, is_known, strict=True) if not flag]
    return tuple(fact for fact, _ in kept), [state for _, state in kept], known


def _norm(bench: Workbench, patch: Patch) -> tuple[float, float]:
    delta = sum(delta.norm() ** 2 for delta in patch.deltas.values()) ** 0.5
    base = sum(float(bench.checkpoint.read(name).double().norm()) ** 2 for name in patch.deltas) ** 0.5
    return delta, delta / base if base else 0.0


def _check_gate(repository: Repository, done: Committed, gate: Mapping[str, float]) -> None:
    measured = done.summary.to_dict()
    low = [
        f"{name} {measured[name]:.3g} < {share:g}"
        for name, share in gate.items()
        if measured[name] is not None and measured[name] < share
    ]
    if low:
        kept = keep_aside(repository, done.patch)
        raise Refused(
            f"the gate refused the edit ({'; '.join(low)}); it is kept in {kept}, "
            f"commit it all the same with: patchkit apply {kept}"
        )


def keep_aside(repository: Repository, patch: Patch) -> Path:
    """Save a patch that was not committed where ``patchkit apply`` finds it."""
    folder = repository.store.private / "kept" / patch.name
    patch.save(folder)
    return folder


def _message(facts: Sequence[Fact], taken: Sequence[Taken]) -> str:
    count = "1 fact" if len(facts) == 1 else f"{len(facts)} facts"
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    named = ", ".join(subjects[:3]) + (f" and {len(subjects) - 3} more" if len(subjects) > 3 else "")
    verb = "Replace" if taken else "Edit"
    lines = [f"{verb} {count}: {named}", ""]
    lines += [f"{fact.text} → {fact.target}" for fact in facts[:20]]
    if len(facts) > 20:
        lines.append(f"… and {len(facts) - 20} more")
    return "\n".join(lines)
