"""A PEFT adapter from elsewhere becomes a patch: read, measured beside the stack, recorded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.actions.changes import large_files, refuse_clashes, staying, superseded
from patchkit.actions.clock import Clock
from patchkit.actions.commit import Committed, record_committed
from patchkit.actions.earlier import earlier_facts
from patchkit.actions.given import Facts, as_batch
from patchkit.actions.harm import asking_of, moved
from patchkit.algebra.factors import Patch
from patchkit.errors import BadInput
from patchkit.evaluation.measure import compare, observe, summarise
from patchkit.facts import MAX_FILE, Batch, parse_facts
from patchkit.files import reading
from patchkit.patch import FACTS
from patchkit.shipping.modules import Modules
from patchkit.shipping.peft_reader import read_adapter

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["METHOD", "take_in"]

METHOD = "peft"

Progress = Callable[[str, int, int], None] | None


def take_in(
    repository: Repository,
    folder: Path,
    facts: Facts | None = None,
    *,
    message: str | None = None,
    replace: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    progress: Progress = None,
) -> Committed:
    """Commit the LoRA in ``folder`` as a patch of ``facts`` (by default those of its own facts.jsonl).

    The facts say what the adapter is for; they are measured before and after, as those of an edit are.
    BadInput for an adapter that is no low-rank update of this base or that says nothing of its facts,
    FactsError for facts that are in force; ``replace`` takes those out of their patches.
    """
    if not dry_run:
        repository.store.ensure_ready(for_patches=True)
    batch = _facts(folder, facts)
    began_on, stack = repository.store.standing(), repository.stack()
    if not replace:
        refuse_clashes(batch, stack)
    clock = Clock()
    tell = progress or (lambda phase, done, total: None)
    checkpoint = repository.checkpoint()
    adapter = read_adapter(folder, Modules.of(checkpoint))
    patch = Patch(batch.facts, adapter.deltas, checkpoint.fingerprint(), METHOD, adapter.recipe)
    clock.lap("reading")

    tell("loading", 0, 1)
    patches = repository.patches(stack)
    replaced = superseded(stack, batch.facts, lambda stored: patches[stored.id])
    under = staying(stack, patches, replaced)
    bench = repository.workbench(device)
    tell("loading", 1, 1)
    clock.lap("loading")
    standing = bench.weights(patches.values())
    bench.use(standing)
    before = observe(bench.model, bench.tokenizer, batch.facts)
    tell("measuring", 1, 2)
    made = bench.weights([*under, patch])
    bench.use(made)
    changes = compare(batch.facts, before, observe(bench.model, bench.tokenizer, batch.facts))
    asking, after = asking_of(repository, bench), [each.id for each in (*under, patch)]
    stacks = ((list(patches), standing), (after, made))
    harm = moved(repository, asking, *stacks)
    earlier = earlier_facts(asking, stack, under, patch, *stacks)
    tell("measuring", 2, 2)
    clock.lap("measuring")
    done = Committed(
        patch=patch,
        commit=None,
        message=message or f"Take in the adapter {folder.resolve().name}",
        changes=changes,
        summary=summarise(changes),
        known=(),
        skipped_known=False,
        replaced=replaced,
        timings=clock.seconds,
        norms=patch.norms(),
        base_norms={name: float(checkpoint.read(name).double().norm()) for name in patch.deltas},
        harm=harm,
        earlier=earlier,
        size=sum(len(data) for data in patch.files().values()),
        notes=(*harm[1].warnings(), *large_files(repository, patch)),
    )
    return done if dry_run else record_committed(repository, began_on, stack, done, bench)


def _facts(folder: Path, facts: Facts | None) -> Batch:
    if facts is not None:
        return as_batch(facts)
    if folder.is_dir() and not os.path.lexists(folder / FACTS):
        raise BadInput(
            f"{folder}: does not say which facts it is of (no {FACTS} in it), and a patch needs one; "
            "give them: a file with --facts, or --fact 'SUBJECT | PROMPT | TARGET'"
        )
    with reading(folder / FACTS, follow=False) as file:
        return parse_facts(file.read(MAX_FILE + 1), str(folder / FACTS))
