"""From patches in force to an adapter folder for another program: chosen, factored, written, asked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.actions.card import card_of, check_licence, chosen_from
from patchkit.algebra.factors import Patch
from patchkit.builds.build import stacked
from patchkit.canonical import hash_bytes
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput
from patchkit.facts import Fact, dump_facts, with_own_ids
from patchkit.files import write_durably
from patchkit.patch import FACTS
from patchkit.settings import FOLDER, Settings
from patchkit.shipping.card import CARD, Card, WeightRow, markdown
from patchkit.shipping.folder import new_folder, refuse_existing
from patchkit.shipping.gguf_adapter import GGUF, adapter_file, read_back
from patchkit.shipping.hub import check_hub, push_folder
from patchkit.shipping.lowrank import Factors, factorise, one_rank
from patchkit.shipping.modules import Modules
from patchkit.shipping.origin import ORIGIN, Origin
from patchkit.shipping.peft_adapter import adapted, adapter_files
from patchkit.shipping.probe import Probed, Verdict, check, verdict
from patchkit.shipping.vllm import check_vllm, rank_for_vllm
from patchkit.stack import Stack, StoredPatch, Updates

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Exported", "Selection", "Shipped", "export", "select"]

Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Selection:
    """Patches in force at a revision, and the base that they stand on."""

    revision: str
    everything: Stack
    """All that is in force."""
    stack: Stack
    """The chosen patches alone."""
    settings: Settings
    checkpoint: Checkpoint
    updates: Mapping[str, Patch]

    @cached_property
    def patches(self) -> dict[str, Patch]:
        """By id, read and checked."""
        return dict(self.updates)

    @property
    def stored(self) -> tuple[StoredPatch, ...]:
        return self.stack.patches

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(fact for stored in self.stored for fact in stored.facts)

    @property
    def source(self) -> str:
        """How the base is named for others: without a path of this machine."""
        return self.settings.base_source.removeprefix(FOLDER)

    @property
    def origin(self) -> Origin:
        """What an export of them says of itself."""
        return Origin(
            self.checkpoint.fingerprint(),
            self.source,
            self.settings.base_revision,
            self.stack.commit,
            {stored.name: stored.id for stored in self.stored},
        )


@dataclass(frozen=True)
class Shipped:
    """One weight in an export: its module, its terms, ‖Σ ΔW‖, and the relative error of the factors."""

    weight: str
    module: str
    rank: int
    norm: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weight", "module", "rank", "norm", "error")}


@dataclass(frozen=True)
class Exported:
    """What was written; ``folder`` is None for a dry run. ``probed`` is None where nothing was measured."""

    folder: Path | None
    patches: tuple[str, ...]
    facts: int
    rank: int
    """Of every module, after padding."""
    weights: tuple[Shipped, ...]
    sizes: Mapping[str, int]
    """Bytes by file."""
    probed: tuple[Probed, ...] | None
    notes: tuple[str, ...] = ()
    pushed: str | None = None
    """The address of the hub's commit, where it was uploaded."""

    @property
    def verdict(self) -> Verdict | None:
        return None if self.probed is None else verdict(self.probed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": None if self.folder is None else str(self.folder),
            "patches": list(self.patches),
            "facts": self.facts,
            "rank": self.rank,
            "weights": [weight.to_dict() for weight in self.weights],
            "files": dict(self.sizes),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "probed": None if self.probed is None else [one.to_dict() for one in self.probed],
            "notes": list(self.notes),
            "pushed": self.pushed,
        }


def select(repository: Repository, words: Sequence[str] = (), revision: str = "HEAD") -> Selection:
    """The patches that ``words`` name (all of them where none is named), on the checked base.

    NotFound where a word names none or nothing is in force, BadInput where they stand on another base than
    the one at HEAD.
    """
    everything = repository.stack(revision)
    part = chosen_from(everything, words)
    checkpoint = repository.checkpoint()
    for stored in part.patches:
        if stored.header.base != checkpoint.fingerprint():
            raise BadInput(f"{stored.name}: stands on another base than HEAD; switch to {revision} first")
    settings = repository.store.settings(revision)
    updates = Updates(repository.store, part)
    return Selection(revision, everything, part, settings, checkpoint, updates)


def export(
    repository: Repository,
    words: Sequence[str],
    out: Path,
    *,
    form: str = "peft",
    revision: str = "HEAD",
    max_rank: int | None = None,
    runtime: str | None = None,
    probe: bool = False,
    licence: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    progress: Progress = None,
) -> Exported:
    """Write patches in force as a LoRA adapter, for PEFT or in GGUF (``form``), to the new folder ``out``.

    ``max_rank``: the most terms a module may have; what that costs is told of each weight, and measured on
    each fact. ``runtime`` "vllm": of a rank that vLLM takes, and only where it would not ignore it.
    ``probe``: load the adapter with PEFT and raise CheckFailed, nothing written, unless it does what the
    build does. ``push_to_hub``: upload it to the hub's repository of that name, after it was written.
    BadInput names a weight that cannot be shipped so; WouldOverwrite where ``out`` is there.
    """
    refuse_existing(out)
    check_licence(licence)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    chosen = select(repository, words, revision)
    factors, modules = _factored(chosen, max_rank, runtime)
    files = _files(form, factors, modules, chosen)
    files[FACTS] = dump_facts(with_own_ids(chosen.facts))
    files[ORIGIN] = chosen.origin.to_bytes()
    weights = tuple(
        Shipped(weight, path, factors[path].rank, factors[path].norm, factors[path].error)
        for weight, path in modules.of_weights(stacked(chosen.patches.values())).items()
    )
    done = Exported(
        folder=None,
        patches=tuple(stored.name for stored in chosen.stored),
        facts=len(chosen.facts),
        rank=next(iter(factors.values())).B.shape[1],
        weights=weights,
        sizes={name: len(data) for name, data in files.items()},
        probed=None,
        notes=_notes(chosen, probe),
    )
    if dry_run:
        return done
    with new_folder(out) as place:
        for name, data in files.items():
            write_durably(place / name, data)
        if probe or any(weight.error for weight in weights):
            with _for_peft(form, place, modules, chosen) as adapter:
                done = replace(done, probed=_ask(repository, chosen, adapter, device, progress))
        if probe and done.probed is not None:
            check(done.probed, out.name)
        card = markdown(_card(repository, chosen, form, licence, done, files)).encode()
        write_durably(place / CARD, card)
    done = replace(done, folder=out, sizes={**done.sizes, CARD: len(card)})
    if push_to_hub is None:
        return done
    named = ", ".join(done.patches[:3]) + (" …" if len(done.patches) > 3 else "")
    pushed = push_folder(out, push_to_hub, f"Export {named} as {form}", private=private)
    return replace(done, pushed=pushed)


def _card(
    repository: Repository,
    chosen: Selection,
    form: str,
    licence: str | None,
    done: Exported,
    files: Mapping[str, bytes],
) -> Card:
    """The card of what was written: where the artefact was asked, with what it said."""
    card = card_of(repository, chosen.stack, chosen.revision, kind=form, licence=licence)
    weights = [WeightRow(w.weight, w.rank, w.norm, w.error) for w in done.weights]
    card = replace(card, weights=weights, files={name: hash_bytes(data) for name, data in files.items()})
    if done.probed is None or done.verdict is None:
        return card
    told = done.verdict
    asked = (
        "this adapter, loaded by PEFT"
        if form == "peft"
        else "the factors that this adapter reads back as, put on by PEFT; llama.cpp was not asked"
    )
    rows = [
        replace(
            row,
            before=one.base.rewrite.target,
            after=one.shipped.rewrite.target,
            says=one.shipped.rewrite.text,
        )
        for row, one in zip(card.facts, done.probed, strict=True)
    ]
    lines = [
        f"Measured on the base with {asked}: it takes effect on {told.effective} of {told.facts} facts.",
        f"The target is preferred: {told.took} of {told.facts}; in the exact build {told.took_in_build}.",
    ]
    if told.neighbors:
        lines.append(
            f"Neighbours kept: {told.kept} of {told.neighbors}; in the exact build {told.kept_in_build}."
        )
    return replace(card, facts=rows, measured=lines)


def _files(
    form: str, factors: Mapping[str, Factors], modules: Modules, chosen: Selection
) -> dict[str, bytes]:
    """The adapter's files, by name."""
    if form == "gguf":
        return {GGUF: adapter_file(factors, modules)}
    settings = chosen.settings
    base = (chosen.source, settings.base_revision) if settings.base_on_hub else (None, None)
    return adapter_files(factors, modules, source=base[0], revision=base[1])


@contextmanager
def _for_peft(form: str, place: Path, modules: Modules, chosen: Selection) -> Iterator[Path]:
    """A folder that PEFT loads with what was written in ``place``: for a GGUF, what it reads back as."""
    if form == "peft":
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="patchkit-") as folder:
        for name, data in _files("peft", read_back(place / GGUF, modules), modules, chosen).items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def _factored(
    chosen: Selection, max_rank: int | None, runtime: str | None
) -> tuple[dict[str, Factors], Modules]:
    """The factors of each edited module by its path, all of one rank."""
    deltas = stacked(chosen.patches.values())
    modules = Modules.of(chosen.checkpoint)
    paths = modules.of_weights(deltas)
    if runtime == "vllm":
        check_vllm(modules.architecture, paths)
    factors = factorise(deltas, max_rank)
    rank = max(pair.rank for pair in factors.values())
    if runtime == "vllm":
        rank = rank_for_vllm(rank)
    return {paths[weight]: pair for weight, pair in one_rank(factors, rank).items()}, modules


def _notes(chosen: Selection, probe: bool) -> tuple[str, ...]:
    notes = []
    ids = {stored.id for stored in chosen.stored}
    for stored in chosen.stored:
        under = [
            other.name
            for other in chosen.everything.patches
            if other.id not in ids and other.header.versions(other.id) & set(stored.header.solved_on)
        ]
        if under:
            notes.append(
                f"{stored.name} was solved on top of {', '.join(under)}, which is not shipped with it"
            )
    if probe and not any(fact.neighbors for fact in chosen.facts):
        notes.append("no fact lists neighbours, so nothing is known of what else the adapter moves")
    return tuple(notes)


def _ask(
    repository: Repository, chosen: Selection, place: Path, device: str, progress: Progress
) -> tuple[Probed, ...]:
    """Each fact on the base, on the build, and on the base with the adapter put on by PEFT."""
    from patchkit.evaluation.measure import observe

    tell = progress or (lambda phase, done, total: None)
    tell("loading", 0, 1)
    bench = repository.workbench(device)
    tell("loading", 1, 1)
    facts = chosen.facts

    def asked(number: int) -> Any:
        found = observe(bench.model, bench.tokenizer, facts)
        tell("measuring", number, 3)
        return found

    base = asked(1)
    bench.put(chosen.patches.values())
    build = asked(2)
    bench.put([])
    with adapted(bench.model, place):
        shipped = asked(3)
    return tuple(map(Probed, facts, base, build, shipped))
