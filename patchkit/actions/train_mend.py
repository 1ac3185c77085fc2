"""Training the hypernetwork of mend on a repository's base, and keeping it where commits look for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.canonical import hash_bytes
from patchkit.editing.course import Course, Settings
from patchkit.editing.hypernetwork import network_name
from patchkit.editing.lessons import Lesson, Page, lessons_of, pages_of
from patchkit.editing.recipe import positions
from patchkit.editing.training import Report, train
from patchkit.errors import BadInput
from patchkit.files import write_durably, writing
from patchkit.models.names import StoredNames

if TYPE_CHECKING:
    from patchkit.actions.workbench import Workbench
    from patchkit.evaluation.cases import Cases
    from patchkit.repository import Repository

__all__ = ["Settings", "Training", "train_mend"]


@dataclass(frozen=True)
class Training:
    """What was trained, or would be: ``digest`` and ``report`` are None for a dry run."""

    path: Path
    weights: tuple[str, ...]
    lessons: int
    held_out: int
    settings: Settings
    digest: str | None = None
    report: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "digest": self.digest,
            "weights": list(self.weights),
            "lessons": self.lessons,
            "held_out": self.held_out,
            **asdict(self.settings),
            "training": None if self.report is None else asdict(self.report),
        }


def train_mend(
    repository: Repository,
    cases: Cases,
    *,
    layers: str | None = None,
    text: str | None = None,
    steps: int = 1000,
    minutes: float | None = None,
    settings: Settings | None = None,
    dry_run: bool = False,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Training:
    """Train on the facts of ``cases``: prompts, paraphrases and neighbours; ``text`` is to stay too.

    The base is edited with nothing on it. The network takes the place of an older one for the same layers.
    BadInput says which record, layer or setting cannot be used, before anything is trained.
    """
    settings = settings or Settings()
    told = progress or (lambda phase, done, total: None)
    overrides = {"method": "mend"} if layers is None else {"method": "mend", "layers": layers}
    recipe = repository.recipe(overrides)
    told("loading", 0, 1)
    bench = repository.workbench(device)
    told("loading", 1, 1)
    base = bench.checkpoint.as_read()
    path = repository.store.private / "statistics" / network_name(base, recipe.layers)
    lessons, pages = _read(bench, cases, text)
    course = Course.of(bench.model, lessons, pages, recipe.layers, settings)
    names = StoredNames(bench.model, bench.checkpoint)
    weights = tuple(names.of(name) for name in course.modules)  # refuses what a patch could not name
    counts = (len(course.lessons), len(course.held))
    if dry_run:
        return Training(path, weights, *counts, settings)
    network, report = train(
        bench.model,
        course,
        steps=steps,
        minutes=minutes,
        unfinished=repository.store.private / "unfinished",
        base=base,
        progress=progress,
    )
    data = network.to_bytes()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    return Training(path, weights, *counts, settings, hash_bytes(data), report)


def _read(bench: Workbench, cases: Cases, text: str | None) -> tuple[list[Lesson], list[Page]]:
    facts = [case.fact for case in cases.cases]
    answers = [[each[0] if each else "" for each in case.answers] for case in cases.cases]
    if not facts:
        raise BadInput(f"{cases.source}: holds no facts to train on; name a file with some")
    lessons = lessons_of(bench.tokenizer, facts, answers, positions(bench.model.config))
    return lessons, pages_of(bench.tokenizer, text) if text is not None else []
