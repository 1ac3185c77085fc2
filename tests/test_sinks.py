"""Attention sinks: which facts are edited in a context instead, and that the edit is the oracle's there."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import reference_memit as reference
import tiny_models
import torch
from command_helpers import Cli, cli, facts_file, git_environment, home, save_checkpoint, set_recipe

from patchkit.editing.keys import collect_keys, collect_states
from patchkit.editing.mass import add, restored, rewriting_of
from patchkit.editing.memit import Memit
from patchkit.editing.recipe import Recipe
from patchkit.editing.sinks import out_of_sinks
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import drift_passages, rewriting_passages
from patchkit.fact import Fact
from patchkit.models.anatomy import anatomy_of

__all__ = ["cli", "git_environment", "home"]

FIRST = Fact("A", "{} plays the sport of", "football")
FACTS = [FIRST, Fact("LeBron James", "{} plays the sport of", "basketball"), Fact("A", "The {} is", "chess")]
TEMPLATES = ("{}", "The dancers. {}", "Therefore I say it. {}")
RECIPE = Recipe(
    layers=(1, 2),
    lambda_=5.0,
    learning_rate=0.3,
    steps=6,
    clamp=0.4,
    templates=TEMPLATES,
    avoid_sinks=True,
)
WEAK = """
[recipe]
layers = [1]
lambda = 1e6
steps = 2
contexts = 2
context_tokens = 4
statistics_tokens = 400
avoid_sinks = true
"""


@pytest.fixture
def model():
    """One whose states at a text's first token are ten times as long as they are elsewhere."""
    model = tiny_models.tiny_model("gpt2", torch.float64)
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= 100
    return model.requires_grad_(False)


@pytest.fixture
def tokenizer():
    return tiny_models.tiny_tokenizer()


def test_only_a_subject_that_ends_in_a_sink_is_edited_elsewhere(model, tokenizer):
    bare = rewriting_passages(tokenizer, FACTS, TEMPLATES[:1])
    assert [passage.subject == 0 for (passage,) in bare] == [True, False, False]
    norms = collect_states(model, anatomy_of(model), bare, 2).norm(dim=1)
    assert norms[0] > 3 * norms[1:].max()
    within = rewriting_passages(tokenizer, FACTS[:1], TEMPLATES[1:2])[0][0]
    assert out_of_sinks(model, tokenizer, FACTS, RECIPE) == [within, None, None]


@pytest.mark.parametrize("changes", [{"avoid_sinks": False}, {"templates": ("{}",)}])
def test_published_recipes_edit_the_bare_prompt_whatever_it_is(model, tokenizer, changes):
    recipe = RECIPE.override(**changes)
    assert out_of_sinks(model, tokenizer, FACTS, recipe) == [None] * 3
    plain = rewriting_passages(tokenizer, FACTS, recipe.templates)
    assert rewriting_of(model, tokenizer, FACTS, recipe) == plain


def test_targets_and_keys_are_the_oracles_where_words_stand_in_front(model, tokenizer):
    anatomy = anatomy_of(model)
    rewriting = rewriting_of(model, tokenizer, FACTS, RECIPE)
    drift = drift_passages(tokenizer, FACTS, RECIPE.kl_prompt)
    z = find_targets(model, anatomy, rewriting, drift, RECIPE).z
    keys = collect_keys(model, anatomy, rewriting, 1)
    for place, fact in enumerate(FACTS):
        texts = (TEMPLATES[1], *TEMPLATES[1:]) if fact == FIRST else TEMPLATES
        wanted, _, _ = reference.find_target(model, tokenizer, anatomy.blocks, fact, RECIPE, texts)
        key = reference.key_of(model, tokenizer, anatomy.downs[1], fact, texts)
        assert torch.allclose(z[place], wanted, rtol=1e-9)
        assert torch.allclose(keys[place], key, rtol=1e-9)


def test_texts_that_begin_with_another_token_are_spared(model, tokenizer):
    """The state of an unedited subject at a text's start: an edit in the sink moves it along."""
    anatomy = anatomy_of(model)
    other = rewriting_passages(tokenizer, [Fact("B", "{} plays the", "game")], ("{}",))
    before, moved = collect_states(model, anatomy, other, 2), {}
    for avoid in (False, True):
        edited = Memit().edit(model, tokenizer, [FIRST], RECIPE.override(avoid_sinks=avoid, lambda_=0.01))
        weights = [anatomy.weight(layer) for layer in RECIPE.layers]
        with restored(weights):
            for weight, layer in zip(weights, RECIPE.layers, strict=True):
                add(weight, edited.deltas[anatomy.weights[layer]])
            moved[avoid] = float((collect_states(model, anatomy, other, 2) - before).norm())
    assert moved[True] < moved[False] / 3


@pytest.fixture
def sink(cli: Cli, home: Path, model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository on that model whose edits change next to nothing; we stand in it."""
    cli.ok("init", save_checkpoint(model.float(), home / "base"), "knowledge")
    monkeypatch.chdir(home / "knowledge")
    set_recipe(Path.cwd(), WEAK)


@pytest.mark.parametrize("avoided", [True, False])
def test_commit_says_why_a_fact_in_a_sink_did_not_take(
    sink: None, cli: Cli, home: Path, avoided: bool
) -> None:
    facts = [{"subject": fact.subject, "prompt": fact.prompt, "target": fact.target} for fact in FACTS[:2]]
    sinks = f"avoid_sinks={str(avoided).lower()}"
    done = cli.ok("commit", facts_file(home, *facts), "--dry-run", "--set", sinks, "--json").json
    assert [fact["took"] for fact in done["facts"]] == [False, False]
    (note,) = done["notes"]
    assert note.startswith(f"“{FIRST.text}” did not take")
    assert ("as it stands, where the text begins" in note) == avoided


def test_commit_says_of_a_fact_that_is_preferred_why_it_is_not_said(sink: None, cli: Cli, home: Path) -> None:
    """With ``was`` a fact takes where it is the likelier of two, however unlikely both are."""
    one = {"subject": FIRST.subject, "prompt": FIRST.prompt}
    both = [{**one, "target": target, "was": was} for target, was in permutations(("football", "chess"))]
    notes = [cli.ok("commit", facts_file(home, fact), "--dry-run", "--json").json["notes"] for fact in both]
    said = f"“{one['subject']} plays the sport of"
    assert sorted(note.split("”")[1].split(" as it stands")[0] for (note,) in notes) == [
        " did not take",
        " is not said",
    ]
    assert all(note.startswith(said) for (note,) in notes)
