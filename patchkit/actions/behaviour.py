"""Two stacks compared by what their models say: facts, neighbours, prompts, and KL on text.

One model is loaded; the weights that differ are exchanged in place. Everything is computed in float32 on the
weights that the two builds hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from patchkit.algebra.factors import Patch
from patchkit.errors import BadInput
from patchkit.evaluation.generation import continue_greedily
from patchkit.evaluation.measure import FactState, observe
from patchkit.evaluation.texts import Divergence, compare_on, read_bytes, text_of, window_of, windows
from patchkit.facts import Fact, parse_facts
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.actions.diff import Difference
    from patchkit.actions.workbench import Workbench
    from patchkit.repository import Repository

__all__ = [
    "Behaviour",
    "FactSaid",
    "Probes",
    "PromptSaid",
    "compare_models",
    "read_probes",
]

Progress = Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class Probes:
    """What is asked besides the facts that differ: prompts, and facts with targets of their own."""

    prompts: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class FactSaid:
    """One fact on both models: P(target), P(the target before) where there is one, and what is said."""

    kind: str
    """ "added", "removed", "changed", "superseded" or "probe"."""
    prompt: str
    target: str
    was: str | None
    target_old: float
    target_new: float
    was_old: float | None
    was_new: float | None
    says_old: str
    says_new: str


@dataclass(frozen=True)
class PromptSaid:
    """One prompt on both models; ``kind`` is "neighbor" (of a fact that differs) or "probe"."""

    kind: str
    prompt: str
    old: str
    new: str

    @property
    def same(self) -> bool:
        return self.old == self.new


@dataclass(frozen=True)
class Behaviour:
    """What the two models say."""

    facts: tuple[FactSaid, ...]
    prompts: tuple[PromptSaid, ...]
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        prompts = [{**asdict(prompt), "same": prompt.same} for prompt in self.prompts]
        return {**asdict(self), "prompts": prompts}


_FACTS = re.compile(rb"(\xef\xbb\xbf)?\s*(\{|\[\s*\{)")


def read_probes(path: str) -> Probes:
    """Probes from a file: facts where it begins as a file of them does, else one prompt a line."""
    data = read_bytes(path)
    if _FACTS.match(data):
        return Probes(facts=parse_facts(data, path).facts)
    prompts = tuple(line.strip() for line in text_of(data, path).splitlines() if line.strip())
    if not prompts:
        raise BadInput(f"{one_line(path)}: holds no prompt; write one a line, or facts as JSON lines")
    return Probes(prompts=prompts)


def compare_models(
    repository: Repository,
    old: Mapping[str, Patch],
    new: Mapping[str, Patch],
    difference: Difference,
    *,
    probes: Probes | None = None,
    text: tuple[str, str] | None = None,
    device: str = "auto",
    progress: Progress = None,
) -> Behaviour:
    """Ask the models of two stacks (patches by id) about what ``difference`` says of their facts.

    ``text``: (name, text) to compute KL on; without it, the prompts that are asked serve as text.
    """
    told = progress or (lambda phase, done, total: None)
    told("loading", 0, 1)
    asked, prompts = _facts(difference, probes), _prompts(difference, probes)
    bench = repository.workbench(device)
    sides = [bench.weights(patches.values()) for patches in (old, new)]
    told("loading", 1, 1)
    states, said = [], []
    for number, weights in enumerate(sides):
        told("asking", number, 2)
        bench.use(weights)
        states.append(observe(bench.model, bench.tokenizer, [fact for _, fact in asked]) if asked else [])
        said.append(continue_greedily(bench.model, bench.tokenizer, [prompt for _, prompt in prompts]))
    told("asking", 2, 2)
    name, rows = _rows(bench, text, [fact.text for _, fact in asked] + [p for _, p in prompts])
    return Behaviour(
        facts=tuple(_fact_said(*row) for row in zip(asked, *states, strict=True)),
        prompts=tuple(
            PromptSaid(kind, prompt, a, b) for (kind, prompt), a, b in zip(prompts, *said, strict=True)
        ),
        divergence=compare_on(bench, sides, name, rows, partial(told, "text")) if rows else None,
    )


def _facts(difference: Difference, probes: Probes | None) -> list[tuple[str, Fact]]:
    """(kind, fact); ``was`` of a fact that took another's place is what that one said."""
    pairs = [(old, new, "changed") for old, new, _ in difference.changed]
    pairs += [(item.before, item.after, "superseded") for item in difference.superseded]
    return [
        *(("added", fact) for fact, _ in difference.added),
        *(("removed", fact) for fact, _ in difference.removed),
        *((k, replace(b, was=a.target if a.target != b.target else b.was)) for a, b, k in pairs),
        *(("probe", fact) for fact in (probes.facts if probes else ())),
    ]


def _prompts(difference: Difference, probes: Probes | None) -> list[tuple[str, str]]:
    """(kind, prompt), each prompt once."""
    neighbors = (prompt for _, fact in _facts(difference, probes) for prompt in fact.neighbors)
    kinds = dict.fromkeys(neighbors, "neighbor") | dict.fromkeys(probes.prompts if probes else (), "probe")
    return [(kind, prompt) for prompt, kind in kinds.items()]


def _fact_said(asked: tuple[str, Fact], old: FactState, new: FactState) -> FactSaid:
    kind, fact = asked
    before, after = old.rewrite, new.rewrite
    return FactSaid(
        kind=kind,
        prompt=fact.text,
        target=fact.target,
        was=fact.was,
        target_old=before.target,
        target_new=after.target,
        was_old=before.was,
        was_new=after.was,
        says_old=before.text or "",
        says_new=after.text or "",
    )


def _rows(
    bench: Workbench, text: tuple[str, str] | None, prompts: Sequence[str]
) -> tuple[str, list[list[int]]]:
    """What KL is computed on, in words, and its rows of as many tokens as are read at once."""
    length = window_of(bench.model.config)
    if text is None:
        texts = list(dict.fromkeys(prompts))
        rows = [bench.tokenizer(prompt)["input_ids"][:length] for prompt in texts]
        return f"the {len(texts)} prompts asked", [row for row in rows if row]
    return windows(bench.tokenizer, *text, length)
