"""Choosing a recipe for a base: trials on some facts, and other facts to say whether it is better.

Each trial edits the base in memory, is scored as `evaluate` scores, and is taken off. Nothing is kept but
the recipe, with its reasons, in patchkit.toml.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from patchkit.actions.locate import known_facts
from patchkit.actions.trials import Climb, Held, Trial, Trials, plain
from patchkit.actions.workbench import Workbench
from patchkit.editing.editor import find_editor
from patchkit.editing.mass import MassEditor
from patchkit.editing.published import recipe_for
from patchkit.editing.recipe import Recipe, positions
from patchkit.errors import BadInput, Busy
from patchkit.evaluation.cases import Case, Cases
from patchkit.evaluation.studies import pool
from patchkit.evaluation.tracing import Tracer, deviation
from patchkit.evaluation.tuning import knobs, merit, peak, shown
from patchkit.gitstore import Changes
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
    """What `tune` did. ``held`` is None where no trial was better than the recipe as it was."""

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

    @property
    def confirmed(self) -> bool:
        """Whether the tuned recipe is better on the facts that were held out."""
        return self.held is not None and merit(self.held.tuned) > merit(self.held.was)

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
    if not dry_run:
        repository.store.ensure_ready()
    settings, was = repository.settings, repository.recipe()
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
    start = recipe_for(bench.model.config, was.method).override(guess=True) if from_scratch else was
    effects, middle, traced = _trace(bench, choosing, len(start.layers), seed, told)
    lab = Trials(repository, bench, editor, batch_size, seed, told)
    choice = Climb(lab, choosing, start, knobs_left=list(knobs(start, len(effects) or lab.depth, middle)))
    choice.climb(begun + 60 * minutes)
    held = None
    if _settings_of(choice.recipe) != _settings_of(was):
        held = lab.confirm(holding, was, choice.recipe)
    done = Tuned(
        source=cases.source,
        chosen_by=len(choosing),
        held_out=len(holding),
        was=was,
        recipe=choice.recipe,
        trials=tuple(choice.trials),
        traced=traced,
        effects=effects,
        middle=middle,
        untried=tuple(choice.untried),
        held=held,
        seconds=0.0,
        minutes=minutes,
        notes=cases.notes,
    )
    if done.confirmed:
        changed, reasons = _written(done, choice, settings)
        done = replace(done, changed=changed, reasons=reasons)
        if not dry_run:
            done = replace(done, commit=_record(repository, settings, done))
    return replace(done, seconds=time.perf_counter() - begun)


def _halves(cases: Cases, sample: int | None, seed: int) -> tuple[list[Case], list[Case]]:
    """The cases that choose and those that are held out; BadInput where they cannot be scored."""
    drawn = pool(cases, seed)[:sample]
    facts = [case.fact for case in drawn]
    probed = [fact for fact in facts if fact.was is not None and fact.paraphrases and fact.neighbors]
    if len(probed) < LEAST:
        raise BadInput(
            f"{cases.source}: {len(probed)} of its facts have was, paraphrases and neighbors, by which a "
            f"recipe is judged; name a file with {LEAST} or more, such as counterfact"
        )
    kept = [case for case in drawn if case.fact in probed]
    half = (len(kept) + 1) // 2
    return kept[:half], kept[half:]


def _trace(
    bench: Workbench, cases: Sequence[Case], window: int, seed: int, told: Progress
) -> tuple[tuple[float, ...], int | None, int]:
    """The mean effect of the MLPs around each layer, its peak, and over how many facts."""
    tracer = Tracer(bench.model)
    longest = positions(bench.model.config)
    known, _ = known_facts(bench, Cases("", tuple(cases)), _TRACED, longest, told)
    # Centres whose windows hold neither layer 0 nor more layers than there are.
    reach = range(tracer.window // 2 + 1, tracer.depth - 1)
    if len(known) < _FEWEST_TRACED or not reach:
        return (), None, len(known)
    scale = _NOISE * deviation(bench.model, known)
    total = np.zeros(tracer.depth)
    for place, prompt in enumerate(known):
        told("tracing", place, len(known))
        total += tracer.recall(prompt, scale=scale, samples=_SAMPLES, seed=seed).numpy()
    told("tracing", len(known), len(known))
    effects = tuple(float(value) for value in total / len(known))
    return effects, peak(effects, reach), len(known)


def _settings_of(recipe: Recipe) -> dict[str, Any]:
    """What tuning may change; a recipe's being a guess is no setting."""
    return {name: value for name, value in recipe.to_dict().items() if name not in ("guess", "templates")}


def _written(done: Tuned, choice: Climb, settings: Settings) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of patchkit.toml that change, and a line for each that says why."""
    old, new = _settings_of(done.was), _settings_of(done.recipe)
    changed = {name: value for name, value in new.items() if value != old.get(name)}
    assert done.held is not None
    reasons = {}
    for name in changed:
        tried = "; ".join(choice.tried(name)) if any(name in t.changes for t in done.trials) else ""
        reasons[name] = f"S and paraphrase argmax, {tried}" if tried else "of the rule of thumb it began with"
    if "layers" in reasons and done.middle is not None:
        reasons["layers"] += f"; the MLPs around {done.middle} bring back most"
    if settings.recipe.get("guess"):
        changed["guess"] = False
        was, now = (100 * scores["S"].value for scores in (done.held.was, done.held.tuned))
        reasons["guess"] = (
            f"tuned on {done.chosen_by} facts; on {done.held_out} others S {was:.1f} became {now:.1f}"
        )
    return changed, reasons


def _record(repository: Repository, settings: Settings, done: Tuned) -> str:
    """Commit patchkit.toml with what changes and why; the commit's id."""
    store = repository.store
    tree = store.tree("HEAD")
    if tree.settings is None or repository.settings != settings:
        raise Busy(f"{FILE} was changed by another commit while the recipe was being tuned; try again")
    new = replace(settings, recipe={**settings.recipe, **done.changed})
    data = dump_settings(new, store.read(tree.settings.oid), done.reasons)
    named = [f"{name} {shown(name, value)}" for name, value in done.changed.items() if name != "guess"]
    return store.record(
        Changes(settings=data), f"Tune the recipe: {', '.join(named)}", expected_head=tree.commit
    )
