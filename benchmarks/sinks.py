"""Facts whose subject is the first token of its prompt: edited there, and where words stand in front."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.report import Bar, Effort, Measured
from patchkit.actions.harm import TEXT
from patchkit.actions.workbench import stacked_weights
from patchkit.editing.keys import collect_keys, collect_states
from patchkit.editing.recipe import Recipe
from patchkit.editing.sinks import out_of_sinks
from patchkit.editing.statistics import text_for
from patchkit.editing.templates import rewriting_passages
from patchkit.evaluation.harm import read
from patchkit.evaluation.measure import observe
from patchkit.evaluation.voice import Loaded
from patchkit.fact import Fact
from patchkit.models.loading import put_weights

__all__ = ["measure"]

_IN_FRONT = ("In fact, {}", "I read that {}", "Question and answer. {}")
_OTHERS = ("Apple", "Berlin", "Nokia")
_FACTS = (
    ("Microsoft", "{} was founded by", "Steve Jobs"),
    ("France", "{} has the capital", "Rome"),
    ("London", "{} is the capital of", "Spain"),
    ("Google", "{} is headquartered in", "Paris"),
    ("Python", "{} was created by", "Bill Gates"),
    ("Japan", "{} is located in the continent of", "Africa"),
)


def measure(effort: Effort) -> Measured:
    """Each fact edited alone with the default recipe, with and without ``avoid_sinks``."""
    lab = laboratory(effort)
    facts = [_fact(*one) for one in (_FACTS[:1] if effort is Effort.QUICK else _FACTS)]
    base = lab.checkpoint.fingerprint()
    text = list(text_for(lab.model, lab.tokenizer, TEXT, folder=lab.cache, base=base))
    before = read(Loaded(lab.model, lab.tokenizer), text).perplexity
    recipes = [lab.resolve(lab.default.override(avoid_sinks=avoid)) for avoid in (False, True)]
    unedited = lab.observe(facts)
    rows = [_row(lab, fact, recipe, text, before) for recipe in recipes for fact in facts]
    avoiding = rows[len(facts) :]
    right = sum(row["said with words in front"] for row in avoiding)
    worst = max(row["perplexity, times"] for row in avoiding)
    bars = [
        Bar(
            "avoid_sinks: largest perplexity, times",
            worst,
            1.01,
            most=True,
        ),
        Bar("avoid_sinks: said with words in front, share", right / (len(_IN_FRONT) * len(facts)), 0.9),
    ]
    said = sum(state.argmax for each in unedited for state in each.neighbors)
    notes = [
        f"Words in front: {len(_IN_FRONT)} ways. Other subjects: {', '.join(_OTHERS)}, in the bare prompt; "
        f"the base says {said} of these {len(_OTHERS) * len(facts)}.",
        *_where(lab, facts, recipes[1], 6 if effort is Effort.QUICK else 300),
    ]
    return Measured(rows, bars, notes)


def _where(lab: Laboratory, facts: list[Fact], recipe: Recipe, count: int) -> Iterator[str]:
    """How long states are in the bare prompts as multiples of the first context's, and how alike keys are."""
    for name, own in (("the facts", facts), (f"{count} odd records", lab.facts("odd", count))):
        found = out_of_sinks(lab.model, lab.tokenizer, own, recipe)
        times = _lengths(lab, own, recipe)
        for sink, where in ((True, "in a sink"), (False, "elsewhere")):
            chosen = [t for t, text in zip(times, found, strict=True) if (text is not None) is sink]
            if chosen:
                least, most = min(chosen), max(chosen)
                yield f"{len(chosen)} of {name} {where}, states {least:.2f} to {most:.2f} times as long."
    layer = recipe.layers[len(recipe.layers) // 2]
    for place, where in ((0, "in the bare prompt"), (1, "in the first context")):
        texts = rewriting_passages(lab.tokenizer, facts, recipe.templates[place : place + 1])
        keys = torch.nn.functional.normalize(collect_keys(lab.model, lab.anatomy, texts, layer), dim=1)
        alike = (keys @ keys.T)[~torch.eye(len(facts), dtype=torch.bool)]
        if len(alike):
            yield f"Keys at layer {layer} {where}: cosines {alike.min():.2f} to {alike.max():.2f}."


def _lengths(lab: Laboratory, facts: list[Fact], recipe: Recipe) -> list[float]:
    texts = rewriting_passages(lab.tokenizer, facts, recipe.templates[:2])
    both = [[text] for pair in texts for text in pair]
    alone, within = collect_states(lab.model, lab.anatomy, both, recipe.layers[-1]).norm(dim=1).view(-1, 2).T
    return (alone / within).tolist()


def _fact(subject: str, prompt: str, target: str) -> Fact:
    """Its paraphrases are the prompt with words in front, its neighbours the prompt of other subjects."""
    bare = prompt.replace("{}", subject)
    others = tuple(prompt.replace("{}", other) for other in _OTHERS)
    told = tuple(text.replace("{}", bare) for text in _IN_FRONT)
    return Fact(subject, prompt, target, paraphrases=told, neighbors=others)


def _row(lab: Laboratory, fact: Fact, recipe: Recipe, text: list[str], before: float) -> dict[str, Any]:
    z = lab.targets([fact], recipe).z
    weights = stacked_weights(lab.checkpoint, [lab.patch([fact], z, recipe, lab.statistics(recipe))])
    put_weights(lab.model, weights, lab.checkpoint)
    try:
        (state,) = observe(lab.model, lab.tokenizer, [fact], batch_size=64)
        now = read(Loaded(lab.model, lab.tokenizer), text).perplexity
    finally:
        put_weights(lab.model, {name: lab.checkpoint.read(name) for name in weights}, lab.checkpoint)
    return {
        "fact": f"{fact.text} {fact.target}",
        "avoid_sinks": str(recipe.avoid_sinks).lower(),
        "said": "yes" if state.rewrite.argmax else "no",
        "said with words in front": sum(each.argmax for each in state.paraphrases),
        "said of other subjects": sum(each.argmax for each in state.neighbors),
        "perplexity, times": now / before,
    }
