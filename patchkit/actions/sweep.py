"""A study of several edits, none of which is kept: each made from the base in memory, scored, taken off.

What is measured is what `evaluate` measures. A row is durable before the next trial begins, so that a sweep
that was killed goes on with what is missing, to the same bytes, and one that asks for more makes only that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchkit.actions.asking import Asking
from patchkit.actions.commit import text_and_statistics
from patchkit.actions.edit import as_patch
from patchkit.actions.harm import own_text
from patchkit.actions.sweep_rows import Rows
from patchkit.actions.workbench import stacked_weights
from patchkit.canonical import hash_file
from patchkit.editing.batching import FAILURES, reason_of
from patchkit.editing.editor import Edited, Editor, ready_editor
from patchkit.editing.recipe import Recipe
from patchkit.errors import BadInput, PatchkitError
from patchkit.evaluation.answers import FOLDER
from patchkit.evaluation.cases import Case, Cases
from patchkit.evaluation.curves import draw
from patchkit.evaluation.figures import figure_class
from patchkit.evaluation.harm import Harm, growths, read
from patchkit.evaluation.intervals import (
    COMPARED,
    WHOLE,
    Tally,
    intervals,
    names_with_whole,
    share_of_ceiling,
)
from patchkit.evaluation.metrics import METRICS, Seen, look, tally
from patchkit.evaluation.reading import Reading
from patchkit.evaluation.references import References
from patchkit.evaluation.studies import (
    OF_CEILING,
    UNEDITED,
    ZSRE,
    Asked,
    Trial,
    as_in_table_1,
    digest_of,
    plan,
    pool,
)
from patchkit.evaluation.tables import csv_table, json_table, markdown_table
from patchkit.evaluation.voice import Loaded, Voice
from patchkit.files import write_durably

if TYPE_CHECKING:
    from patchkit.editing.statistics import Statistics
    from patchkit.repository import Repository

__all__ = ["Swept", "sweep"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Swept:
    """A finished sweep: its settings, its rows in the order of the study, and the files that show them."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    files: list[Path]
    notes: tuple[str, ...]
    failed: tuple[str, ...] = ()
    """A line for each edit that failed; there is no row of it."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "rows": self.rows,
            "files": [str(path) for path in self.files],
            "notes": list(self.notes),
            "failed": list(self.failed),
        }


def sweep(
    repository: Repository,
    asked: Asked,
    cases: Cases,
    out: Path,
    *,
    sample: int | None = None,
    seed: int = 0,
    texts: bool = False,
    references: References | None = None,
    device: str = "auto",
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Swept:
    """Make the trials of a study that ``out`` does not hold yet, and write tables and figures of all.

    ``sample``: score so many facts of each trial, the first ones. ``texts``: let the models write, for GE;
    ``references``: hold that against these texts, for RS. The stack plays no part: every edit is of the base.
    Targets are kept in ``out`` until the end, for a run that goes on and for editors that search alike.
    An edit that fails is told in what is returned; BadInput where nothing can be shown without it.
    BadInput, WouldOverwrite, Busy, Unavailable.
    """
    figure_class()  # said before anything is computed for it
    told = progress or (lambda phase, done, total: None)
    if asked.study == "zsre":
        cases = as_in_table_1(cases)
    chosen = pool(cases, seed)
    if not chosen:
        raise BadInput(f"{cases.source}: holds no facts")
    if texts and not any(case.texts for case in chosen):
        raise BadInput(f"{cases.source}: has no beginnings of texts (generation_prompts); leave out --texts")
    trials = plan(asked, chosen, cases.source)
    recipes = {method: _ready(repository, method, 1)[1] for method in asked.methods}
    for method, recipe in recipes.items():
        if asked.study == "tradeoff" and not recipe.reads("lambda"):
            raise BadInput(f"{method}: reads no λ, so it has no trade-off over it; leave it out of --methods")
    sizes = {(trial.method, trial.count) for trial in trials if trial.method != UNEDITED}
    by_size = {(method, count): _ready(repository, method, count) for method, count in sorted(sizes)}
    asking = Asking(repository.checkpoint(), device, repository.store.private / FOLDER, told)
    settings: dict[str, Any] = {
        "study": asked.study,
        "methods": list(asked.methods),
        "counts": sorted({trial.count for trial in trials}),
        "groups": list(dict.fromkeys(trial.group for trial in trials)),
        "lambdas": sorted({trial.lambda_ for trial in trials if trial.lambda_ is not None}),
        "records": digest_of(cases),
        "sample": sample,
        "seed": seed,
        "texts": texts,
        "references": None if references is None else references.digest,
        "batch_size": batch_size,
        "base": asking.checkpoint.as_read(),
        "recipes": {method: _told(recipe) for method, recipe in recipes.items()},
        "computed_with": asking.computed_with,
    }
    large = [[*size] for size, (_, recipe) in by_size.items() if recipe != recipes[size[0]]]
    if large:
        settings |= {"many": repository.settings.many, "large": large}
    failed: list[str] = []
    asked_of = sorted({place for trial in trials for place in trial.cases[:sample]})
    unreferenced = () if references is None else references.notes([chosen[place] for place in asked_of])
    with Rows.open(out, settings) as kept:
        options = (sample, seed, texts, references, batch_size)
        targets = out / "targets"
        bench = _Bench(repository, asking, chosen, by_size, options, targets, told)
        weight = [1 + trial.count for trial in trials]  # loading and measuring grow with the facts
        for place, trial in enumerate(trials):
            told("sweep", sum(weight[:place]), sum(weight))
            if trial.key not in kept.by_key:
                try:
                    kept.add({"study": asked.study, **bench.row(trial, trials)})
                except FAILURES as error:  # of this edit; the others are made all the same
                    failed.append(_failure(trial, error))
        told("sweep", 1, 1)
        rows = [kept.by_key[trial.key] for trial in trials if trial.key in kept.by_key]
        if failed and (asked.study == "mixtures" or len(rows) < 2):  # which compares what is missing
            raise BadInput("\n".join(failed))
        files = _show(out, asked.study, rows)
        if not failed and kept.whole:  # or they may be another command's, which was stopped
            shutil.rmtree(targets, ignore_errors=True)
        return Swept(settings, rows, files, (*cases.notes, *unreferenced), tuple(failed))


def _ready(repository: Repository, method: str, facts: int) -> tuple[Editor, Recipe]:
    """The editor and the recipe that a commit of so many facts would have."""
    recipe = repository.recipe({"method": method}, facts=facts)
    home = repository.store.private / "statistics"
    return ready_editor(recipe, home, lambda: repository.checkpoint().as_read())


def _told(recipe: Recipe) -> dict[str, Any]:
    """The recipe, and the hash of the file of texts that it names: under one name another may come to lie."""
    corpus = Path(recipe.statistics_text)
    read = recipe.reads("statistics_text") and corpus.is_file()
    return {**recipe.to_dict(), **({"statistics_text_sha256": hash_file(corpus)} if read else {})}


def _failure(trial: Trial, error: Exception) -> str:
    """An edit that failed, in one line."""
    varied = "" if trial.lambda_ is None else f", λ {trial.lambda_:g}"
    facts = "1 fact" if trial.count == 1 else f"{trial.count} facts"
    return f"{trial.method}, {facts} of {trial.group}{varied}: {'; '.join(reason_of(error).splitlines())}"


def _show(out: Path, study: str, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    contents = {
        "table.md": markdown_table(rows),
        "table.csv": csv_table(rows),
        "table.json": json_table(rows),
    }
    for name, data in contents.items():
        write_durably(out / name, data)
    figures = {f"figure.{kind}": data for kind, data in draw(study, rows).items()}
    for name, data in figures.items():
        write_durably(out / name, data)
    return [out / name for name in (*contents, *figures)]


class _Bench:
    """Makes trials on one loaded base, which has its own weights before and after each."""

    def __init__(
        self,
        repository: Repository,
        asking: Asking,
        cases: Sequence[Case],
        editors: Mapping[tuple[str, int], tuple[Editor, Recipe]],
        options: tuple[int | None, int, bool, References | None, int | str],
        targets: Path,
        told: Progress,
    ) -> None:
        self.repository, self.asking, self.cases = repository, asking, cases
        self.editors = editors
        self.sample, self.seed, self.texts, self.references, self.batch_size = options
        self.targets, self.told = targets, told
        self.base: dict[int, Seen] = {}
        self.prepared: dict[Recipe, tuple[Recipe, Statistics | None]] = {}

    def row(self, trial: Trial, trials: Sequence[Trial]) -> dict[str, Any]:
        """One trial's, in JSON's types; scores are shares with their 95 % intervals."""
        self._ask_base(trials)
        places = trial.cases[: self.sample]
        reference = [self.base[place] for place in places]
        if trial.method == UNEDITED:
            base = self._text[1]
            harm, seen = Harm(base, base, 1.0), reference
        else:
            harm, seen = self._edited(trial, places)
        moved = harm.to_dict()
        return {
            "method": trial.method,
            "group": trial.group,
            "count": trial.count,
            "lambda": trial.lambda_,
            "asked": len(places),
            "perplexity": moved["rise"],
            "perplexity_low": moved["rise_low"],
            "perplexity_high": moved["rise_high"],
            "growth": moved["growth"],
            "scores": _scores(tally(seen, reference), tally(reference, reference), self.seed),
        }

    def _ask_base(self, trials: Sequence[Trial]) -> None:
        """What the base says to all that any trial asks, in one run, whatever was done before."""
        if self.base:
            return
        places = sorted({place for trial in trials for place in trial.cases[: self.sample]})
        voice = self.asking.voice((), {})
        part = partial(self.told, "asking the base")
        seen = self._look(voice, places, part)
        self.base = dict(zip(places, seen, strict=True))
        try:
            voice.answers.keep()
        except PatchkitError:
            return  # they are kept to save time alone

    def _look(self, voice: Voice, places: Sequence[int], part: Any = None) -> list[Seen]:
        cases = [self.cases[place] for place in places]
        return look(voice, cases, texts=self.texts, references=self.references, progress=part)

    @cached_property
    def _text(self) -> tuple[Sequence[str], Reading]:
        """What the base wrote for `evaluation.harm`, and how it reads that."""
        documents = own_text(self.asking, self.repository.store.private / "statistics")
        self.asking.bench.use({})
        return documents, read(self._loaded, documents)

    @cached_property
    def _loaded(self) -> Loaded:
        return Loaded(self.asking.bench.model, self.asking.bench.tokenizer)

    def _edited(self, trial: Trial, places: Sequence[int]) -> tuple[Harm, list[Seen]]:
        bench = self.asking.bench
        documents, before = self._text
        facts = [self.cases[place].fact for place in trial.cases]
        bench.use({})
        patch = as_patch(self._edit(trial, facts), facts, bench.model, bench.checkpoint, ())
        weights = stacked_weights(bench.checkpoint, [patch])
        bench.use(weights)
        try:
            seen = self._look(self._loaded, places)
            after = read(self._loaded, documents)
        finally:
            bench.use({})
        (growth,) = growths(bench.checkpoint.read, [weights])
        return Harm(after, before, growth), seen

    def _edit(self, trial: Trial, facts: Sequence[Any]) -> Edited:
        bench = self.asking.bench
        editor, recipe = self.editors[trial.method, trial.count]
        recipe, statistics = self._prepared(recipe)
        if trial.lambda_ is not None:
            recipe = recipe.override(lambda_=trial.lambda_)
        return editor.edit(
            bench.model,
            bench.tokenizer,
            facts,
            recipe,
            statistics,
            batch_size=self.batch_size,
            unfinished=self.targets,
        )

    def _prepared(self, recipe: Recipe) -> tuple[Recipe, Statistics | None]:
        """The recipe with its context templates, and the statistics that it reads; found once."""
        if recipe not in self.prepared:
            found = text_and_statistics(self.repository, self.asking.bench, recipe, self.told)
            self.prepared[recipe] = found
        return self.prepared[recipe]


def _scores(counts: Tally, unedited: Tally, seed: int) -> dict[str, list[float | None]]:
    """[value, low, high] of each score that was asked for, with S's share of its ceiling and zsRE's own mean
    of three behind them."""
    asked = counts[..., 1].sum(0) > 0
    names = [name for name, there in zip(METRICS, asked, strict=True) if there]
    told = dict(zip(METRICS, counts[..., 1].sum(0), strict=True))
    if told["NS"] < told[ZSRE[-1]]:  # zsRE's, but for the odd neighbour whose right answer is the old object
        names = [name for name in names if name != "NS"]
        asked &= np.array([name != "NS" for name in METRICS])
    by_name = intervals(counts[:, asked], names, seed)
    shown = {name: by_name[name].to_list() for name in names_with_whole(names)}
    if set(COMPARED) <= set(names):
        found = share_of_ceiling(counts[:, asked], unedited[:, asked], names, seed)
        shown[OF_CEILING] = found.to_list()
    whole, *parts = ZSRE
    if set(parts) <= set(names):
        three = counts[:, [list(METRICS).index(name) for name in parts]]
        shown[whole] = intervals(three, COMPARED, seed)[WHOLE].to_list()
    return shown
