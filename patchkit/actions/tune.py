"""Choosing a recipe for a base: trials on some facts, and other facts to say whether it is better.

Each trial edits the base in memory, is scored as `evaluate` scores, and is taken off. Nothing is kept but
the recipe, with its reasons, in patchkit.toml.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from patchkit.actions.init import RESOLVED
from patchkit.actions.locate import known_facts
from patchkit.actions.trials import Climb, Held, Trial, Trials, plain
from patchkit.actions.workbench import Workbench
from patchkit.editing.batching import FAILURES, reason_of
from patchkit.editing.editor import find_editor
from patchkit.editing.mass import MassEditor
from patchkit.editing.published import recipe_for
from patchkit.editing.recipe import CONTEXTS, Recipe, positions
from patchkit.errors import BadInput, Busy, PatchkitError
from patchkit.evaluation.cases import Case, Cases
from patchkit.evaluation.studies import pool
from patchkit.evaluation.tracing import Tracer, deviation
from patchkit.evaluation.tuning import better, peak, shown
from patchkit.git.recording import refuse_uncommitted
from patchkit.git.store import Changes
from patchkit.settings import FILE, Settings, dump_settings

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Tuned", "tune"]

Progress = Callable[[str, int, int], None]
LEAST = 8
"""Facts: fewer tell nothing apart."""
_TRACED, _SAMPLES, _NOISE = 16, 3, 3.0  # facts, samples of the noise, its σ: a first guess is wanted
_FEWEST_TRACED = 4


@dataclass(frozen=True)
class Tuned:
    """What `tune` did. ``held`` is None where no trial was better than the recipe as it was, and where the
    recipes could not be held against each other: for ``failed``."""

    source: str
    chosen_by: int
    held_out: int
    was: Recipe
    recipe: Recipe
    trials: tuple[Trial, ...]
    traced: int
    effects: tuple[float, ...]
    """Of each layer the mean indirect effect of the MLPs around it; empty where nothing could be traced."""
    middle: int | None
    """The layer around which that was highest."""
    untried: tuple[str, ...]
    """Settings for which there was no time."""
    held: Held | None
    seconds: float
    minutes: float
    changed: Mapping[str, Any] = field(default_factory=dict)
    """The fields of patchkit.toml that change, as they will be."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why, by field."""
    commit: str | None = None
    notes: tuple[str, ...] = ()
    failed: str | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the tuned recipe is better on the facts that were held out."""
        return self.held is not None and better(self.held.tuned, self.held.was)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "chosen_by": self.chosen_by,
            "held_out": self.held_out,
            "was": self.was.to_dict(),
            "recipe": self.recipe.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "traced": {"facts": self.traced, "effects": list(self.effects), "middle": self.middle},
            "untried": list(self.untried),
            "held": None if self.held is None else self.held.to_dict(),
            "confirmed": self.confirmed,
            "changed": {name: plain(value) for name, value in self.changed.items()},
            "reasons": dict(self.reasons),
            "seconds": self.seconds,
            "minutes": self.minutes,
            "commit": self.commit,
            "notes": list(self.notes),
            "failed": self.failed,
        }


def tune(
    repository: Repository,
    cases: Cases,
    *,
    minutes: float = 30.0,
    sample: int | None = 96,
    seed: int = 0,
    from_scratch: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Tuned:
    """Tune the recipe in patchkit.toml to the base, and commit it there if held-out facts confirm it.

    Of ``sample`` facts (all where None, or where there are fewer) half choose, half confirm; they are drawn
    with ``seed``. It begins with the recipe as it is, or ``from_scratch`` with the rule of thumb for a model
    of this shape; what it ends with is held against the recipe as it is. No trial begins that would not end
    within ``minutes``, the confirmation included. BadInput, Busy.
    """
    begun = time.perf_counter()
    told = progress or (lambda phase, done, total: None)
    _check(minutes, sample, seed)
    if not dry_run:
        repository.store.ensure_ready()
        refuse_uncommitted(repository.store, (FILE,))  # now, not when all is measured
    began_on, settings, was = repository.store.standing(), repository.settings, repository.recipe()
    editor = find_editor(was.method)
    if not isinstance(editor, MassEditor):
        raise BadInput(
            f"{FILE}: the method is {was.method}; tune chooses for memit and its kin, which search targets: "
            "set method to one of memit, emmet, alphaedit, encore"
        )
    choosing, holding = _halves(cases, sample, seed)
    told("loading", 0, 1)
    bench = repository.workbench(device)
    told("loading", 1, 1)
    lab = Trials(repository, bench, editor, batch_size, seed, told)
    start = lab.prepare(was, choosing, holding)  # from scratch too: it is edited with in the end
    if from_scratch:
        start = lab.prepare(_thumb(bench, was), choosing, holding)
    trace = _Trace(bench, choosing, seed, told, 60 * minutes / 5)
    choice = Climb(lab, choosing, start, trace.middle, begun + 60 * minutes)
    choice.climb()
    table = _table(settings, was, choice.recipe)
    held, failed = None, None
    if table != settings.recipe:
        try:
            held = lab.confirm(holding, was, choice.recipe)
        except FAILURES as error:  # what was tried is told all the same
            failed = reason_of(error)
    done = Tuned(
        source=cases.source,
        chosen_by=len(choosing),
        held_out=len(holding),
        was=was,
        recipe=Recipe.from_dict(table),
        trials=tuple(choice.trials),
        traced=trace.facts,
        effects=trace.effects,
        middle=trace.found,
        untried=tuple(choice.untried),
        held=held,
        seconds=0.0,
        minutes=minutes,
        notes=(*cases.notes, *_many(repository, was, len(choosing))),
        failed=failed,
    )
    if done.confirmed:
        changed = {name: value for name, value in table.items() if value != settings.recipe.get(name)}
        done = replace(done, changed=changed, reasons=_reasons(done, choice, changed))
        if not dry_run:
            done = replace(done, commit=_record(repository, began_on, settings, table, done))
    return replace(done, seconds=time.perf_counter() - begun)


def _many(repository: Repository, was: Recipe, facts: int) -> Iterator[str]:
    """A note where a batch of so many facts is edited by another recipe than the one that is tuned."""
    many = repository.recipe(facts=facts).to_dict()
    if other := sorted(name for name, value in was.to_dict().items() if many.get(name) != value):
        yield (
            f"a batch of {facts} facts takes {', '.join(other)} from [recipe.many], which is not tuned: "
            "this is the recipe of smaller ones; --sample sets how many choose it"
        )


def _check(minutes: float, sample: int | None, seed: int) -> None:
    if not (math.isfinite(minutes) and minutes > 0):
        raise BadInput(f"{minutes} minutes: choose a number above 0")
    if sample is not None and sample < LEAST:
        raise BadInput(f"a sample of {sample} facts: choose {LEAST} or more")
    if not 0 <= seed < 2**63:
        raise BadInput(f"the seed {seed}: choose one from 0, of 63 bits at most")


def _thumb(bench: Workbench, was: Recipe) -> Recipe:
    """The rule of thumb for the model, with the statistics, the contexts' making and the drift of ``was``."""
    kept = ("statistics", "context_", "kl_", "norm_anchor")
    table = {name: value for name, value in was.to_dict().items() if name != "context_weight"}
    same = {name: value for name, value in table.items() if name.startswith(kept)}
    return recipe_for(bench.model.config, was.method, guess=True).override(**same)


def _halves(cases: Cases, sample: int | None, seed: int) -> tuple[list[Case], list[Case]]:
    """The cases that choose and those that are held out; BadInput where they cannot be scored."""
    probed = [case for case in pool(cases, seed) if _is_probed(case)]
    if len(probed) < LEAST:
        raise BadInput(
            f"{cases.source}: {len(probed)} of its {len(cases.cases)} facts have was, paraphrases and "
            f"neighbors of which was is true, by which a recipe is judged; name a file with {LEAST} or more, "
            "such as counterfact"
        )
    kept = probed[:sample]
    half = (len(kept) + 1) // 2
    return kept[:half], kept[half:]


def _is_probed(case: Case) -> bool:
    """Whether the case has all that S is made of."""
    fact = case.fact
    answers = case.answers or ((),)
    spared = bool(fact.neighbors) and any(not each or fact.was in each for each in answers)
    return fact.was is not None and bool(fact.paraphrases) and spared


@dataclass
class _Trace:
    """Which layers' MLPs matter at the subject's last token, by facts whose object the base says."""

    bench: Workbench
    cases: Sequence[Case]
    seed: int
    told: Progress
    seconds: float
    facts: int = 0
    effects: tuple[float, ...] = ()
    """Of each layer the mean indirect effect of the MLPs around it; empty where nothing was traced."""
    found: int | None = None

    def middle(self) -> int | None:
        """The layer around which the effect is highest; None for too few facts that are said, or layers."""
        tracer, longest = Tracer(self.bench.model), positions(self.bench.model.config)
        known, _ = known_facts(self.bench, Cases("", tuple(self.cases)), _TRACED, longest, self.told)
        width, depth = tracer.window, tracer.depth
        # Centres of windows in which neither layer 0 nor the last block is.
        reach = range(width // 2 + 1, depth - width + width // 2)
        if len(known) < _FEWEST_TRACED or not reach:
            return None
        scale, begun = _NOISE * deviation(self.bench.model, known), time.perf_counter()
        rows: list[Any] = []
        for place, prompt in enumerate(known):
            if place >= _FEWEST_TRACED and time.perf_counter() - begun > self.seconds:
                break
            self.told("tracing", place, len(known))
            rows.append(tracer.recall(prompt, scale=scale, samples=_SAMPLES, seed=self.seed).numpy())
        self.told("tracing", len(known), len(known))
        self.facts, self.effects = len(rows), tuple(np.mean(rows, axis=0).tolist())
        self.found = peak(self.effects, reach)
        return self.found


def _table(settings: Settings, was: Recipe, tuned: Recipe) -> dict[str, Any]:
    """[recipe] of patchkit.toml with what tuning changed, and nothing in it that an old value gave."""
    old, new = (
        {name: value for name, value in recipe.to_dict().items() if name not in (*RESOLVED, "guess")}
        for recipe in (was, tuned)
    )
    changed = {name: value for name, value in new.items() if value != old[name]}
    if not changed:
        return dict(settings.recipe)
    stale = set() if changed.keys().isdisjoint(CONTEXTS) else {"templates"}
    table = {name: value for name, value in settings.recipe.items() if name not in stale}
    return {**table, **changed, **({"guess": False} if table.get("guess") else {})}


def _reasons(done: Tuned, choice: Climb, changed: Iterable[str]) -> dict[str, str]:
    """A line for each field of patchkit.toml that changes."""
    assert done.held is not None
    reasons = {}
    for name in changed:
        tried = "; ".join(choice.tried(name))
        reasons[name] = f"S/paraphrases {tried}" if tried else "the rule of thumb for such a model"
    if "layers" in reasons and done.middle is not None:
        reasons["layers"] += f"; traced: the MLPs around {done.middle}"
    if "guess" in reasons:
        was, now = (100 * scores["S"].value for scores in (done.held.was, done.held.tuned))
        held = f"S {was:.1f} became {now:.1f} on {done.held_out} others"
        reasons["guess"] = f"chosen by {done.chosen_by} facts; {held}"
    return reasons


def _record(
    repository: Repository, began_on: str, settings: Settings, table: dict[str, Any], done: Tuned
) -> str:
    """Commit patchkit.toml with what changes and why; the commit's id. An error says what was found."""
    store = repository.store
    named = ", ".join(f"{name} {shown(name, v)}" for name, v in done.changed.items() if name != "guess")
    try:
        tree = store.tree("HEAD")
        if tree.settings is None or repository.settings != settings:
            raise Busy(f"{FILE} was changed by another commit while the recipe was being tuned")
        data = dump_settings(replace(settings, recipe=table), store.read(tree.settings.oid), done.reasons)
        return store.record(
            Changes(settings=data),
            f"Tune the recipe: {named}",
            expected_head=tree.commit,
            began_on=began_on,
        )
    except PatchkitError as error:
        raise error.retold(f"{error}; what was found is {named}: set it in {FILE} by hand") from error
