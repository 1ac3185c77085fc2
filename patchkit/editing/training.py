"""Training MEND's hypernetwork: Adam down a `Course`, the best parameters on what is held out, checkpoints.

A run that was killed goes on from its last checkpoint to the bytes that it would have given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.editing.course import Course, Score
from patchkit.editing.hypernetwork import Hypernetwork
from patchkit.editing.kept import read_kept, write_kept
from patchkit.editing.task import tell
from patchkit.errors import BadInput
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import float32_compute, frozen
from patchkit.models.trial import try_out

__all__ = ["Report", "train"]

Progress = Callable[[str, int, int], None]

_RATE_OF_RATES = 0.02  # of log α: a fiftieth of α a step at most
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch names them
_PATIENCE = 10  # validations without a better one
_KEEP_EVERY = 20.0  # seconds between two checkpoints


@dataclass(frozen=True)
class Report:
    """How a training went: ``best`` is the step whose parameters are kept; ``why`` it ended, in words."""

    steps: int
    best: int
    seconds: float
    why: str
    before: Score
    after: Score


def train(
    model: PreTrainedModel,
    course: Course,
    *,
    steps: int,
    minutes: float | None = None,
    unfinished: Path | None = None,
    base: str = "",
    progress: Progress | None = None,
    keep_every: float = _KEEP_EVERY,
) -> tuple[Hypernetwork, Report]:
    """Train for ``steps`` or ``minutes`` in all, whichever ends first, or until it gets no better.

    A run that was killed goes on from what it kept in the folder ``unfinished``, at most ``keep_every``
    seconds old; ``base`` names the model (`Checkpoint.as_read`). The model's weights are untouched.
    BadInput where the model cannot be edited, or the loss is not a number.
    """
    with float32_compute(model), frozen(model):
        try_out(model, anatomy_of(model), [course.layers[0] - 1], course.lessons[0].edit.tokens)
        kept = time.monotonic()
        run = _Run.begin(course, unfinished and unfinished / course.name(base), steps, progress)
        while not (why := run.over(steps, minutes)):
            run.advance()
            tell(progress, "training", run.step, steps)
            if time.monotonic() - kept >= keep_every:
                run.keep()
                kept = time.monotonic()
        if run.step % course.validate_every:
            run.validate()
    tell(progress, "training", steps, steps)
    run.forget()
    return run.result(), Report(run.step, run.best_step, run.seconds, why, run.before, run.after)


class _Run:
    """Parameters on their way, Adam's moments, and the best parameters so far."""

    def __init__(self, course: Course, start: Hypernetwork, path: Path | None) -> None:
        self.course, self.path = course, path
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.tensors.items()}
        self.network = replace(start, tensors=leaves)
        own = {name for name in leaves if name.endswith(".log_rate")}
        rate = course.settings.learning_rate
        network = {"params": [leaves[name] for name in leaves if name not in own], "lr": rate}
        rates = {"params": [leaves[name] for name in leaves if name in own], "lr": _RATE_OF_RATES}
        self.adam = torch.optim.Adam([network, rates])
        self.step, self.best_step, self.stale, self.seconds = 0, 0, 0, 0.0
        self.before = self.after = Score(0.0, 0.0, 0.0, 0.0)
        self.best = self._copied()

    @classmethod
    def begin(cls, course: Course, path: Path | None, steps: int, progress: Progress | None) -> _Run:
        """Where the checkpoint at ``path`` stands; from the identity where there is none, or it is past
        the ``steps`` that are asked for."""
        begun = time.monotonic()
        blank = course.identity({})
        kept = read_kept(path, _shapes(blank))
        if kept is not None:
            norms = {name: kept[f"norms.{name}"].to(tensor) for name, tensor in blank.norms.items()}
            run = cls(course, replace(blank, norms=norms), path)
            run._take(kept)
            if run.step <= steps:
                return run
        run = cls(course, course.untrained(progress), path)
        run.before = run.after = course.validate(run.network)
        run.seconds = time.monotonic() - begun
        return run

    def over(self, steps: int, minutes: float | None) -> str:
        """Why the training ends here; "" where it goes on."""
        if self.step >= steps:
            return f"{steps} steps"
        if minutes is not None and self.seconds >= 60 * minutes:
            return f"{minutes:g} minutes"
        if self.stale >= _PATIENCE:
            return f"no better for {self.stale * self.course.validate_every} steps"
        return ""

    def advance(self) -> None:
        """One step down, and a validation where one is due."""
        begun = time.monotonic()
        loss = self.course.loss(self.network, self.step)
        self.adam.zero_grad()
        loss.backward()
        if not bool(loss.isfinite()):
            raise BadInput(f"step {self.step + 1}: the loss is not a number; lower --learning-rate")
        self.adam.step()
        self.step += 1
        if self.step % self.course.validate_every == 0:
            self.validate()
        self.seconds += time.monotonic() - begun

    def validate(self) -> None:
        score = self.course.validate(self.network)
        if score.loss < self.after.loss:
            self.after, self.best_step, self.best, self.stale = score, self.step, self._copied(), 0
        else:
            self.stale += 1

    def result(self) -> Hypernetwork:
        """The best network, and how it came about."""
        course = self.course
        settings = {**asdict(course.settings), "step": self.best_step}
        about = {**settings, "lessons": len(course.lessons), "held_out": len(course.held)}
        return replace(self.network, tensors=self.best, about=about)

    def keep(self) -> None:
        """Durably, all that the rest of the run depends on."""
        if self.path is not None:
            write_kept(self.path, self._state())

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _copied(self) -> dict[str, Tensor]:
        return {name: leaf.detach().clone() for name, leaf in self.network.tensors.items()}

    def _moments(self) -> dict[str, Tensor]:
        """By name, where Adam has begun."""
        return {
            f"{name}.{part}": self.adam.state[leaf][part]
            for name, leaf in self.network.tensors.items()
            for part in _MOMENTS
        }

    def _state(self) -> dict[str, Tensor]:
        numbers = [self.step, self.best_step, self.stale, self.seconds]
        scores = [*astuple(self.before), *astuple(self.after)]
        return {
            "numbers": torch.tensor([*numbers, *scores], dtype=torch.float64),
            **{f"norms.{name}": tensor for name, tensor in self.network.norms.items()},
            **{f"now.{name}": leaf.detach() for name, leaf in self.network.tensors.items()},
            **{f"best.{name}": tensor for name, tensor in self.best.items()},
            **{f"adam.{name}": tensor for name, tensor in self._moments().items()},
        }

    def _take(self, kept: Mapping[str, Tensor]) -> None:
        numbers = kept["numbers"].tolist()
        self.step, self.best_step, self.stale = map(int, numbers[:3])
        self.seconds, self.before, self.after = numbers[3], Score(*numbers[4:8]), Score(*numbers[8:])
        for name, leaf in self.network.tensors.items():
            with torch.no_grad():
                leaf.copy_(kept[f"now.{name}"])
            self.best[name] = kept[f"best.{name}"].to(leaf)
            moments = {part: kept[f"adam.{name}.{part}"].to(leaf) for part in _MOMENTS}
            self.adam.state[leaf] = {"step": torch.tensor(float(self.step)), **moments}


def _shapes(network: Hypernetwork) -> dict[str, list[int]]:
    """Of every tensor in a checkpoint."""
    found = {"numbers": [12], **{f"norms.{name}": list(t.shape) for name, t in network.norms.items()}}
    for name, tensor in network.tensors.items():
        parts = (f"now.{name}", f"best.{name}", *(f"adam.{name}.{part}" for part in _MOMENTS))
        found |= {part: list(tensor.shape) for part in parts}
    return found
