"""Facts whose subject is the first token of its prompt: edited there, and where words stand in front."""

from __future__ import annotations

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.report import Bar, Cell, Effort, Measured
from patchkit.actions.harm import TEXT
from patchkit.actions.workbench import stacked_weights
from patchkit.editing.recipe import Recipe
from patchkit.editing.sinks import out_of_sinks
from patchkit.editing.statistics import text_for
from patchkit.evaluation.harm import perplexity
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
    before = perplexity(Loaded(lab.model, lab.tokenizer), text)
    rows: list[dict[str, Cell]] = []
    for avoid in (False, True):
        recipe = lab.resolve(lab.default.override(avoid_sinks=avoid))
        rows += [_row(lab, fact, recipe, text, before) for fact in facts]
    in_sinks = sum(text is not None for text in out_of_sinks(lab.model, lab.tokenizer, facts, recipe))
    worst = max(float(row["perplexity, times"] or 0) for row in rows[len(facts) :])
    said = [str(row["said with words in front"]) for row in rows[len(facts) :]]
    right = sum(int(each.partition(" ")[0]) for each in said) / (len(_IN_FRONT) * len(facts))
    bars = [
        Bar("avoid_sinks: largest perplexity, times", worst, 1.01, most=True),
        Bar("avoid_sinks: said with words in front, share", right, 0.9),
    ]
    return Measured(rows, bars, [f"{in_sinks} of the {len(facts)} facts end their subject in a sink."])


def _fact(subject: str, prompt: str, target: str) -> Fact:
    """Its paraphrases are the prompt with words in front, its neighbours the prompt of other subjects."""
    bare = prompt.replace("{}", subject)
    others = tuple(prompt.replace("{}", other) for other in _OTHERS)
    told = tuple(text.replace("{}", bare) for text in _IN_FRONT)
    return Fact(subject, prompt, target, paraphrases=told, neighbors=others)


def _row(lab: Laboratory, fact: Fact, recipe: Recipe, text: list[str], before: float) -> dict[str, Cell]:
    z = lab.targets([fact], recipe).z
    weights = stacked_weights(lab.checkpoint, [lab.patch([fact], z, recipe, lab.statistics(recipe))])
    put_weights(lab.model, weights, lab.checkpoint)
    try:
        (state,) = observe(lab.model, lab.tokenizer, [fact], batch_size=64)
        now = perplexity(Loaded(lab.model, lab.tokenizer), text)
    finally:
        put_weights(lab.model, {name: lab.checkpoint.read(name) for name in weights}, lab.checkpoint)
    others = sum(each.argmax for each in state.neighbors)
    return {
        "fact": f"{fact.text} {fact.target}",
        "avoid_sinks": str(recipe.avoid_sinks).lower(),
        "said": "yes" if state.rewrite.argmax else "no",
        "said with words in front": f"{sum(each.argmax for each in state.paraphrases)} of {len(_IN_FRONT)}",
        "said of other subjects": f"{others} of {len(_OTHERS)}",
        "perplexity, times": now / before,
    }
