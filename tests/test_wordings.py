"""Wordings lent within a relation: who lends what to whom, and that the edit is the oracle's on them."""

from __future__ import annotations

import random

import pytest
import reference_memit as reference
import tiny_models
import torch

from patchkit.editing.keys import collect_keys
from patchkit.editing.mass import rewriting_of
from patchkit.editing.memit import Memit
from patchkit.editing.recipe import Recipe
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import drift_passages, rewriting_passages
from patchkit.editing.wordings import wordings_of
from patchkit.errors import BadInput
from patchkit.fact import Fact
from patchkit.models.anatomy import anatomy_of

TONGUES = ("{} is a native speaker of", "{}, who speaks", "The mother tongue of {} is")
FACTS = [
    Fact("Ann", TONGUES[0], "Dutch", relation="tongue"),
    Fact(
        "Émile Zola",
        TONGUES[2],
        "Japan",
        relation="Tongue",
        paraphrases=("I say it. Émile Zola,  who speaks",),
    ),
    Fact("Paris", TONGUES[1], "French", relation="tongue"),
    Fact("LeBron James", "{} plays the sport of", "football"),
    Fact("Microsoft", "{} was founded by", "two dancers", relation="founder"),
]
TEMPLATES = ("{}", "The dancers. {}", "Therefore I say it. {}", "You see. {}")
RECIPE = Recipe(
    layers=(1, 2), lambda_=5.0, learning_rate=0.3, steps=6, clamp=0.4, templates=TEMPLATES, wordings=2
)


def test_facts_of_one_relation_lend_their_prompts_and_no_one_else_does():
    ann, zola, paris, lebron, microsoft = wordings_of(FACTS, 5)
    assert ann == TONGUES
    assert paris == (TONGUES[1], TONGUES[2], TONGUES[0])
    assert (lebron, microsoft) == ((FACTS[3].prompt,), (FACTS[4].prompt,))
    assert zola == (TONGUES[2], TONGUES[0]), "what its own paraphrase tests is never lent to it"


@pytest.mark.parametrize(
    ("asked", "lent", "near"),
    [
        ("He left. Zoé speaks", "{} speaks the language", True),
        ("He left. Zoé, speaks the language of", "{} speaks", True),
        ("Zoé's profession is an", "{}'s profession is a", True),
        ("It is so. In Zoé, an official language is", "In {}, an official language", True),
        ("Zoé is the child of", "As all know, {} is the child of", True),
        ("母語。Zoéは日本国の", "{}は日本国", True),
        ("Zoé holds the title of", "{} holds the position of", False),
        ("The mother tongue of Zoé is", "The nationality of {} is", False),
        ("They speak. Zoé is a native of", "{} was born in", False),
        ("Zoé's sister speaks", "{} speaks", False),
        ("Ann speaks the language", "{} speaks", False),
        ("It was told of Zoé", "{} speaks", False),
    ],
)
def test_what_all_but_is_a_paraphrase_that_is_tested_is_not_lent(asked, lent, near):
    zoe = Fact("Zoé", "{} is a native speaker of", "Dutch", relation="tongue", paraphrases=(asked,))
    other = Fact("Ann", lent, "French", relation="tongue")
    assert wordings_of([zoe, other], 5)[0] == (zoe.prompt, *([] if near else [lent]))


def test_no_more_are_lent_than_are_asked_for():
    assert [len(found) for found in wordings_of(FACTS, 1)] == [2, 2, 2, 1, 1]
    assert wordings_of(FACTS, 0) == [(fact.prompt,) for fact in FACTS]


def test_the_order_of_the_facts_moves_nothing():
    shuffled = random.Random(0).sample(FACTS, len(FACTS))
    own = {fact.subject: found for fact, found in zip(FACTS, wordings_of(FACTS, 2), strict=True)}
    assert {f.subject: found for f, found in zip(shuffled, wordings_of(shuffled, 2), strict=True)} == own


def test_a_long_prompt_is_not_lent_but_borrows():
    told = Fact("Bo", "x" * 200 + " {} speaks", "Dutch", relation="tongue")
    *_, bo = found = wordings_of([*FACTS, told], 5)
    assert len(bo) == 4
    assert not any(told.prompt in of for of in found[:-1])


def literally(fact, prompts):
    """The fact as the oracle reads it: a template for each text, with the wording whose turn it is."""
    texts = [t.replace("{}", prompts[place % len(prompts)]) for place, t in enumerate(TEMPLATES)]
    return Fact(fact.subject, "{}", fact.target), texts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_targets_and_keys_are_the_oracles_on_those_texts(kind):
    model, tokenizer = tiny_models.tiny_model(kind, torch.float64), tiny_models.tiny_tokenizer()
    model.requires_grad_(False)
    anatomy = anatomy_of(model)
    rewriting = rewriting_of(model, tokenizer, FACTS, RECIPE)
    z = find_targets(model, anatomy, rewriting, drift_passages(tokenizer, FACTS, RECIPE.kl_prompt), RECIPE).z
    keys = collect_keys(model, anatomy, rewriting, 1)
    own = rewriting_passages(tokenizer, FACTS, TEMPLATES)
    plain = find_targets(model, anatomy, own, drift_passages(tokenizer, FACTS, RECIPE.kl_prompt), RECIPE).z
    for place, (fact, prompts) in enumerate(zip(FACTS, wordings_of(FACTS, 2), strict=True)):
        said, texts = literally(fact, prompts)
        wanted, _, _ = reference.find_target(model, tokenizer, anatomy.blocks, said, RECIPE, texts)
        key = reference.key_of(model, tokenizer, anatomy.downs[1], said, texts)
        assert torch.allclose(z[place], wanted, rtol=1e-9)
        assert torch.allclose(keys[place], key, rtol=1e-9)
        # Other facts' texts stand beside it in a chunk, which may cost the last bits.
        assert torch.allclose(z[place], plain[place], rtol=1e-9) == (len(prompts) == 1)


def test_an_edit_holds_how_many_wordings_it_borrowed():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    patch = Memit().edit(model, tokenizer, FACTS, RECIPE)
    assert patch.recipe.wordings == 2


def test_a_number_out_of_range_is_refused():
    with pytest.raises(BadInput, match="wordings should be from 0 to 1000"):
        RECIPE.override(wordings=-1)
