"""Attention sinks: places at the start of a text where the model has one state for every subject.

Attention that has nowhere to go falls on a text's first token, and now and then on the second or third (Xiao
et al. 2023, arXiv 2309.17453). The state there grows to several times the others' length and hardly tells
what the token is (Sun et al. 2024, arXiv 2402.17762). What is written there is written for every text that
begins so: such edits made ROME collapse (Yang et al. 2024, arXiv 2406.11263). A tokenizer that puts a start
token in front keeps subjects out of that place; where none does, the fact is edited where words stand in
front of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.editing.keys import collect_states
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.templates import Passage, rewriting_passages
from patchkit.facts import Fact
from patchkit.models.anatomy import anatomy_of

__all__ = ["out_of_sinks"]

_LONGER = 2.0
"""docs/recipes.md has the lengths that SmolLM2's states have in sinks and elsewhere."""


def out_of_sinks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], recipe: Recipe
) -> list[Passage | None]:
    """For each fact whose bare prompt ends its subject in a sink, its prompt in the first written context.

    A sink is where the state after block L is more than twice as long as in that context. None for the other
    facts, and for all where the recipe does not ask or has no contexts.
    """
    bare_and_first = recipe.templates[:2]
    if not (facts and recipe.avoid_sinks and len(bare_and_first) == 2):
        return [None] * len(facts)
    texts = rewriting_passages(tokenizer, facts, bare_and_first, positions(model.config))
    both = [[text] for pair in texts for text in pair]
    states = collect_states(model, anatomy_of(model), both, recipe.layers[-1])
    alone, within = states.norm(dim=1).view(-1, 2).T
    return [text if sink else None for (_, text), sink in zip(texts, alone > _LONGER * within, strict=True)]
