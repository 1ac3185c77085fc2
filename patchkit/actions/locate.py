"""Where a model holds facts: causal tracing of those that it says, fact by fact and on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchkit.editing.recipe import positions
from patchkit.errors import BadInput
from patchkit.evaluation.cases import Cases, sampled
from patchkit.evaluation.figures import HeatMap, draw_heat_maps
from patchkit.evaluation.intervals import Interval, intervals
from patchkit.evaluation.likelihood import score_targets
from patchkit.evaluation.tracing import CLASSES, KINDS, Prompt, Traced, Tracer, deviation, prompt_of
from patchkit.facts import Fact
from patchkit.models.trial import try_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchkit.actions.workbench import Workbench
    from patchkit.repository import Repository

__all__ = ["Located", "draw", "known_facts", "locate"]

BASE = "base"
MOST_NOISE = 1000.0
_AT_ONCE = 64  # facts asked
_COLOURS = dict(zip(KINDS, ("Purples", "Greens", "Reds"), strict=True))


@dataclass(frozen=True)
class Located:
    """What ``patchkit locate`` says. Probabilities and effects are shares, means over the traced facts."""

    source: str
    model: str
    """The base's name."""
    revision: str
    commit: str | None
    """Of the stack that was on it; None for the base."""
    sigma: float
    """σ of the subjects' embeddings; the noise has ``noise`` times it."""
    noise: float
    samples: int
    window: int
    seed: int
    traced: tuple[Traced, ...]
    words: tuple[tuple[str, ...], ...]
    """Of each traced fact its tokens as text, from the subject's first on."""
    left_out: tuple[str, ...]
    """Facts of which the model says neither the target nor what it `was`."""
    means: dict[str, Interval]
    """P(object) "clean" and "corrupted", and the "total" effect."""
    effects: dict[str, dict[str, tuple[Interval, ...]]]
    """The average indirect effect: kind → class → layer. NaN where no fact has such a token."""
    notes: tuple[str, ...]

    @property
    def depth(self) -> int:
        return len(self.effects["hidden"][CLASSES[0]])

    def highest(self, kind: str, place: str) -> tuple[int, Interval] | None:
        """The layer with the highest average effect for a class of tokens, and that effect."""
        known = [(layer, e) for layer, e in enumerate(self.effects[kind][place]) if not math.isnan(e.value)]
        return max(known, key=lambda pair: pair[1].value, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model": self.model,
            "revision": self.revision,
            "commit": self.commit,
            "sigma": self.sigma,
            "noise": self.noise,
            "samples": self.samples,
            "window": self.window,
            "seed": self.seed,
            "layers": self.depth,
            "means": {name: _plain(mean) for name, mean in self.means.items()},
            "effects": {
                kind: {place: [_plain(effect) for effect in row] for place, row in table.items()}
                for kind, table in self.effects.items()
            },
            "facts": [
                {
                    "prompt": each.prompt.fact.text,
                    "object": each.prompt.said,
                    "tokens": list(words),
                    "subject_tokens": len(each.prompt.subject),
                    "clean": each.clean,
                    "corrupted": each.corrupted,
                    "effects": {kind: each.indirect(kind).tolist() for kind in KINDS},
                }
                for each, words in zip(self.traced, self.words, strict=True)
            ],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def _plain(interval: Interval) -> dict[str, float | None]:
    """JSON knows no NaN: null."""
    parts = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: None if math.isnan(value) else value for name, value in parts.items()}


def locate(
    repository: Repository,
    cases: Cases,
    *,
    revision: str = BASE,
    sample: int | None = None,
    samples: int = 10,
    noise: float = 3.0,
    window: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Located:
    """Trace the facts of ``cases`` on the base, or on the base with the stack at ``revision``.

    Of each fact the object is traced that the model says: the target, or what it `was`. A fact of which it
    says neither is left out. ``sample``: how many to trace, drawn at random with ``seed``, which seeds the
    noise too. ``samples`` of the noise, ``noise`` times σ of the subjects' embeddings. BadInput, NotFound.
    """
    told = progress or (lambda phase, done, total: None)
    _check(samples, noise, seed)
    stack = None if revision == BASE else repository.stack(revision)
    told("loading", 0, 1)
    bench = repository.workbench(device)
    if stack is not None:
        bench.put(repository.patches(stack).values())
    told("loading", 1, 1)
    tracer = Tracer(bench.model, window)
    longest = positions(bench.model.config)
    first, faults = _prompts(bench, [(case.fact, case.fact.target) for case in cases.cases], longest)
    if not first:
        raise faults[0]
    sigma = deviation(bench.model, first)
    drawn = cases if sample is None else sampled(cases, len(cases.cases), seed)
    chosen, left_out = known_facts(bench, drawn, sample, longest, told)
    if not chosen:
        raise BadInput(
            f"{cases.source}: {revision} says the object of no fact ({len(left_out)} asked), so there is "
            "nothing to trace; name facts that it says"
        )
    try_out(bench.model, tracer.anatomy, (tracer.depth // 2,), chosen[0].tokens)
    passes = [0, len(chosen) * len(KINDS) * tracer.depth]

    def done() -> None:
        passes[0] += 1
        told("tracing", *passes)

    traced = [
        tracer.trace(prompt, scale=noise * sigma, samples=samples, seed=seed, done=done) for prompt in chosen
    ]
    few = sample is not None and len(chosen) < sample
    notes = [*cases.notes, *([f"only {len(chosen)} of the facts are said"] if few else [])]
    if faults:
        notes.append(f"{len(faults)} of the targets cannot be traced; the first: {faults[0]}")
    return Located(
        source=cases.source,
        model=repository.settings.base_source.removeprefix("folder:"),
        revision=revision,
        commit=None if stack is None else stack.commit,
        sigma=sigma,
        noise=noise,
        samples=samples,
        window=tracer.window,
        seed=seed,
        traced=tuple(traced),
        words=tuple(_words(bench, prompt) for prompt in chosen),
        left_out=tuple(left_out),
        means=_means(traced, seed),
        effects={kind: _effects(traced, kind, seed) for kind in KINDS},
        notes=tuple(notes),
    )


def _check(samples: int, noise: float, seed: int) -> None:
    if not 1 <= samples <= 100:
        raise BadInput(f"{samples} samples of the noise: choose from 1 to 100")
    if not 0 <= noise <= MOST_NOISE:
        raise BadInput(f"noise of {noise} σ: choose a number from 0 to {MOST_NOISE:g}")
    if seed < 0:
        raise BadInput(f"the seed {seed} is negative; choose one from 0")


def known_facts(
    bench: Workbench,
    cases: Cases,
    wanted: int | None,
    longest: int | None,
    told: Callable[[str, int, int], None],
) -> tuple[list[Prompt], list[str]]:
    """The first ``wanted`` facts whose object, the target or the old one, begins with the most probable next
    token, and the facts before them of which that is not so. All where ``wanted`` is None."""
    facts = [case.fact for case in cases.cases]
    known: list[Prompt] = []
    others: list[str] = []
    for start in range(0, len(facts), _AT_ONCE):
        told("asking", start, len(facts))
        asked = facts[start : start + _AT_ONCE]
        objects = [(fact, said) for fact in asked for said in (fact.target, fact.was) if said is not None]
        prompts, _ = _prompts(bench, objects, longest)
        scores = score_targets(bench.model, bench.tokenizer, [(p.fact.text, p.said) for p in prompts])
        said = {
            id(prompt.fact): prompt
            for prompt, score in reversed(list(zip(prompts, scores, strict=True)))  # the target comes first
            if score.next_token == prompt.object
        }
        for fact in asked:
            if len(known) == wanted:
                break
            if id(fact) in said:
                known.append(said[id(fact)])
            else:
                others.append(fact.text)
        if len(known) == wanted:
            break
    told("asking", len(facts), len(facts))
    return known, others


def _prompts(
    bench: Workbench, objects: Sequence[tuple[Fact, str]], longest: int | None
) -> tuple[list[Prompt], list[BadInput]]:
    """The facts' prompts with these objects behind them, and what is wrong with those that have none."""
    found: list[Prompt] = []
    faults: list[BadInput] = []
    for fact, said in objects:
        try:
            found.append(prompt_of(bench.tokenizer, fact, said, longest))
        except BadInput as error:
            faults.append(error)
    return found, faults


def _words(bench: Workbench, prompt: Prompt) -> tuple[str, ...]:
    return tuple(bench.tokenizer.decode([prompt.tokens[place]]) for place in prompt.places)


def _means(traced: Sequence[Traced], seed: int) -> dict[str, Interval]:
    values = np.array([[each.clean, each.corrupted, each.total] for each in traced])
    return intervals(np.stack([values, np.ones_like(values)], -1), ("clean", "corrupted", "total"), seed)


def _effects(traced: Sequence[Traced], kind: str, seed: int) -> dict[str, tuple[Interval, ...]]:
    """Class → layer → the mean over the facts that have such tokens."""
    values = np.stack([each.by_class(kind).numpy() for each in traced])  # [facts, classes, layers]
    there = ~np.isnan(values)
    tally = np.stack([np.where(there, values, 0.0), there.astype(float)], -1)
    depth = values.shape[-1]
    names = [f"{place} {layer}" for place in CLASSES for layer in range(depth)]
    found = intervals(tally.reshape(len(traced), -1, 2), names, seed)
    return {place: tuple(found[f"{place} {layer}"] for layer in range(depth)) for place in CLASSES}


def draw(located: Located) -> Any:
    """Heat maps of the average indirect effects by class of tokens; of one fact alone, by its tokens."""
    window = f"{located.window} layer{'' if located.window == 1 else 's'}"
    titles = ("hidden state of a layer", f"MLPs of {window}", f"attentions of {window}")
    axes = ("restored layer", *(["centre of the restored layers"] * 2))
    if len(located.traced) == 1:
        (one,), (words,) = located.traced, located.words
        rows = [f"{word}*" if n < len(one.prompt.subject) else word for n, word in enumerate(words)]
        values = {kind: one.indirect(kind).tolist() for kind in KINDS}
        change = f"{one.clean:.3f} → {one.corrupted:.3f}"
        heading, scale = f"{one.prompt.fact.text} → {one.prompt.said}: P {change} (* corrupted)", "IE"
    else:
        rows = [f"{place}*" if "subject" in place else place for place in CLASSES]
        values = {
            kind: [[effect.value for effect in table[place]] for place in CLASSES]
            for kind, table in located.effects.items()
        }
        heading = f"{located.model}: average indirect effect over {len(located.traced)} facts (* corrupted)"
        scale = "AIE"
    maps = [
        HeatMap(title, axis, values[kind], _COLOURS[kind])
        for kind, title, axis in zip(KINDS, titles, axes, strict=True)
    ]
    return draw_heat_maps(heading, rows, maps, scale)
