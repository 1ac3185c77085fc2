"""A real model on which recipes are compared: targets once, then edits of any size from them."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import patchkit
from benchmarks.counterfact import Half, counterfact
from benchmarks.references import command_helpers, tiny_models
from benchmarks.report import Effort
from patchkit.algebra.factors import Patch, Solution
from patchkit.algebra.rounding import materialise
from patchkit.canonical import hash_file
from patchkit.checkpoint import Checkpoint
from patchkit.editing.kept import key_of
from patchkit.editing.many import recipe_of_batch
from patchkit.editing.mass import rewriting_of, spread
from patchkit.editing.memit import Memit
from patchkit.editing.published import many_for, recipe_for
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import Passage, drift_passages, write_templates
from patchkit.evaluation.measure import FactChange, FactState, compare, observe
from patchkit.fact import Fact
from patchkit.files import write_durably
from patchkit.models.anatomy import anatomy_of
from patchkit.models.cache import cache_folder
from patchkit.models.loading import load_model, put_weights
from patchkit.models.sources import resolve_base

__all__ = ["Found", "Laboratory", "laboratory"]


@dataclass(frozen=True)
class Found:
    """Targets z [N, d_model] of some facts, and the seconds and loss evaluations a fact they took."""

    z: Tensor
    seconds: float
    steps: float


_SMALL = {
    "contexts": 2,
    "context_tokens": 4,
    "statistics_tokens": 512,
    "statistics_length": 16,
    "steps": 4,
    "nullspace_threshold": 1.0,
    "curvature": 0.5,  # as the default on the real model: it asks more of the statistics
}


@functools.cache
def laboratory(effort: Effort) -> Laboratory:
    """SmolLM2 and CounterFact-R, or for a quick run the tests' tiny model and facts."""
    if effort is not Effort.QUICK:
        return Laboratory(resolve_base("smollm2-135m").folder, cache_folder() / "benchmarks", counterfact)
    return Laboratory(command_helpers.tiny_base(), None, _tiny_facts, _SMALL)


def _tiny_facts(half: Half, count: int) -> list[Fact]:
    known = [tiny_models.FACTS[i % len(tiny_models.FACTS)] for i in range(count)]
    probes = {"was": "chess", "paraphrases": ("Ann said that",), "neighbors": ("Paris plays",)}
    return [replace(fact, subject=f"{fact.subject} {i}", **probes) for i, fact in enumerate(known)]


@functools.cache
def _code() -> str:
    """A digest of the code and the libraries that an edit and its scores come from, but recipes."""
    package = Path(patchkit.__file__).parent
    rooms = ("editing", "models", "evaluation", "algebra", "builds")
    edited = [path for room in rooms for path in package.glob(f"{room}/*.py") if path.name != "published.py"]
    actions = [package / "actions" / f"{name}.py" for name in ("edit", "harm", "workbench")]
    files = [*edited, *actions, Path(__file__).with_name("quality.py")]
    return key_of([torch.__version__, transformers.__version__, *(hash_file(path) for path in sorted(files))])


class Laboratory:
    """Edits are put on the model as a build holds them, rounded to the base's own dtype, and taken off."""

    def __init__(
        self,
        base: Path,
        cache: Path | None,
        facts: Callable[[Half, int], list[Fact]],
        settings: Mapping[str, float] | None = None,
    ) -> None:
        self.checkpoint = Checkpoint.open(base)
        self.model, self.tokenizer = load_model(base, device="cpu")
        self.anatomy = anatomy_of(self.model)
        self.facts = facts
        self.cache = cache
        self._settings = dict(settings or {})
        self._seen: dict[tuple[Fact, ...], list[FactState]] = {}
        self.default = self.recipe("memit")

    def default_of(self, facts: int) -> Recipe:
        """The default for a batch of so many facts."""
        return recipe_of_batch(self.default, many_for(self.model.config), facts)

    def recipe(self, method: str) -> Recipe:
        """A method's own recipe for the model."""
        return self.small(recipe_for(self.model.config, method))

    def small(self, recipe: Recipe) -> Recipe:
        """The recipe, or for a quick run one that costs next to nothing."""
        read = {name: value for name, value in self._settings.items() if recipe.reads(name)}
        return recipe.override(**read)

    def resolve(self, recipe: Recipe) -> Recipe:
        """The recipe with its context templates written."""
        return recipe.override(templates=write_templates(self.model, self.tokenizer, recipe))

    def statistics(self, recipe: Recipe) -> Statistics:
        """The recipe's, from the benchmarks' own cache where they are there."""
        base = self.checkpoint.fingerprint()
        return statistics_for(self.model, self.tokenizer, recipe, folder=self.cache, base=base)

    def targets(
        self, facts: Sequence[Fact], recipe: Recipe, *, size: int | None = None, again: bool = True
    ) -> Found:
        """Optimise each fact's z, with what `commit` spends on it from the facts' text on.

        Wordings are lent among ``size`` facts at a time, as they are when those are edited together.
        Unless ``again``, targets that were found before are looked up, so that seconds say nothing.
        """
        walk = None
        if recipe.curvature:
            walk = self.statistics(recipe).walk(recipe.layers[-1], recipe.curvature)
        begun = time.perf_counter()
        folder = None if again else self.unfinished
        each = size or len(facts)
        batches = [facts[first : first + each] for first in range(0, len(facts), each)]
        rewriting, drift = (
            list(chain.from_iterable(parts))
            for parts in zip(*(self._passages(batch, recipe) for batch in batches), strict=True)
        )
        found = find_targets(self.model, self.anatomy, rewriting, drift, recipe, walk=walk, unfinished=folder)
        seconds = time.perf_counter() - begun
        return Found(found.z, seconds / len(facts), sum(found.steps) / len(facts))

    @property
    def unfinished(self) -> Path | None:
        """Where targets that are sought on the base are kept, for the code as it is."""
        return self.cache and self.cache / "targets" / _code()

    def kept(self, of: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, in JSON's types; looked up where the same code computed the same before.

        A long section that was stopped goes on where it was. ``of`` names all that the result depends on
        beside code, base and threads; no time belongs in it.
        """
        if self.cache is None:
            return compute()
        on = {"base": self.checkpoint.as_read(), "threads": torch.get_num_threads()}
        path = self.cache / "results" / _code() / f"{key_of({**of, **on})}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(compute()).encode())
        return json.loads(path.read_text(encoding="utf-8"))

    def edits(
        self,
        facts: Sequence[Fact],
        before: Sequence[FactState],
        z: Tensor,
        recipe: Recipe,
        statistics: Statistics,
        size: int,
    ) -> tuple[list[FactChange], float]:
        """Edit ``size`` facts at a time and observe each edit: the changes, and seconds a fact to solve."""
        changes: list[FactChange] = []
        seconds = 0.0
        solve = Memit().solver(recipe, statistics)
        for first in range(0, len(facts), size):
            part = slice(first, first + size)
            rewriting, _ = self._passages(facts[part], recipe)
            begun = time.perf_counter()
            deltas, _ = spread(self.model, self.anatomy, rewriting, z[part], recipe, solve)
            seconds += time.perf_counter() - begun
            stored = {name: self.checkpoint.read(name) for name in deltas}
            edited = {name: materialise(stored[name], [delta], name) for name, delta in deltas.items()}
            put_weights(self.model, edited, self.checkpoint)
            after = observe(self.model, self.tokenizer, facts[part], batch_size=64)
            put_weights(self.model, stored, self.checkpoint)
            changes += compare(facts[part], before[part], after)
        return changes, seconds / len(facts)

    def patch(self, facts: Sequence[Fact], z: Tensor, recipe: Recipe, statistics: Statistics) -> Patch:
        """The facts edited on the base as one batch, as a commit would hold it."""
        rewriting, _ = self._passages(facts, recipe)
        solve = Memit().solver(recipe, statistics)
        deltas, keys = spread(self.model, self.anatomy, rewriting, z, recipe, solve)
        resolved = recipe.override(statistics_digest=statistics.digest(recipe.layers)).to_dict()
        base = self.checkpoint.fingerprint()
        return Patch(tuple(facts), deltas, base, recipe.method, resolved, (), Solution(z, keys))

    def observe_with(self, facts: Sequence[Fact], patches: Sequence[Patch]) -> list[FactState]:
        """The facts on the base with patches on it, as a build holds them; then they are taken off."""
        names = sorted({name for patch in patches for name in patch.deltas})
        stored = {name: self.checkpoint.read(name) for name in names}
        deltas = {name: [p.deltas[name] for p in patches if name in p.deltas] for name in names}
        edited = {name: materialise(stored[name], deltas[name], name) for name in names}
        put_weights(self.model, edited, self.checkpoint)
        try:
            return observe(self.model, self.tokenizer, facts, batch_size=64)
        finally:
            put_weights(self.model, stored, self.checkpoint)

    def observe(self, facts: Sequence[Fact]) -> list[FactState]:
        """The facts on the base as it is, which the model must hold; asked once, whoever compares with it."""
        if tuple(facts) not in self._seen:
            self._seen[tuple(facts)] = observe(self.model, self.tokenizer, facts, batch_size=64)
        return self._seen[tuple(facts)]

    def _passages(self, facts: Sequence[Fact], recipe: Recipe) -> tuple[list[list[Passage]], list[Passage]]:
        rewriting = rewriting_of(self.model, self.tokenizer, facts, recipe)
        return rewriting, drift_passages(self.tokenizer, facts, recipe.kl_prompt)
