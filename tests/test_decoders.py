"""Every dense decoder that transformers builds: the edit takes, ΔW is the oracle's, builds are exact.

The replayed tail of each is held to the whole model in ``test_replay.py``. ``docs/models.md`` is
written from this file's list.
"""

from __future__ import annotations

import functools
import hashlib

import pytest
import reference_memit as reference
import tiny_models
import torch
from command_helpers import save_checkpoint

from patchkit.algebra.factors import Patch
from patchkit.builds.build import build
from patchkit.checkpoint import Checkpoint
from patchkit.editing.memit import Memit
from patchkit.editing.published import recipe_for
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import statistics_for
from patchkit.evaluation.likelihood import score_targets
from patchkit.fact import Fact
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import load_model
from patchkit.models.names import StoredNames

KINDS = tuple(tiny_models.CONFIGS)
# Their prompts end with the subject, so a random model's next token depends on the edited state directly.
FACTS = (Fact("Paris", "The city of {}", "Japan"), Fact("Ann", "Who is {}", "pope"))
RECIPE = Recipe(
    layers=(1, 2),
    lambda_=0.05,
    optimiser="momentum",
    learning_rate=0.3,
    clamp=4.0,
    steps=15,
    contexts=1,
    statistics_tokens=1200,
    statistics_length=16,
)

# What stands between the edited projection and the stream, read off each model's own weights.
POST_NORMS = {
    "exaone4": lambda block: block.post_feedforward_layernorm.weight,
    "gemma2": lambda block: 1 + block.post_feedforward_layernorm.weight,
    "gemma3": lambda block: 1 + block.post_feedforward_layernorm.weight,
    "gemma3_text": lambda block: 1 + block.post_feedforward_layernorm.weight,
    "gemma4": lambda block: block.post_feedforward_layernorm.weight,
    "gemma4_text": lambda block: block.post_feedforward_layernorm.weight,
    "gemma4_unified": lambda block: block.post_feedforward_layernorm.weight,
    "glm4": lambda block: block.post_mlp_layernorm.weight,
    "glm4v": lambda block: block.post_mlp_layernorm.weight,
    "hyperclovax": lambda block: block.post_norm2.weight,
    "olmo2": lambda block: block.post_feedforward_layernorm.weight,
    "olmo3": lambda block: block.post_feedforward_layernorm.weight,
}
MULTIPLIED = {"granite": 0.4, "granite_hybrid": 0.4, "minicpm3": 0.7}


def aim(kind):
    """What the oracle adds to an output so that the stream moves by a residual, written out by model."""
    if kind in MULTIPLIED:
        return lambda block, output, residual: residual / MULTIPLIED[kind]
    if kind not in POST_NORMS:
        return None

    def turn(block, output, residual):
        rows = []
        gain = POST_NORMS[kind](block)
        for y, r in zip(output, residual, strict=True):
            said = gain * y / (y @ y / len(y)) ** 0.5
            wanted = (said + r) / gain
            rows.append(wanted * (y @ y / (wanted @ wanted)) ** 0.5 - y)
        return torch.stack(rows)

    return turn


# Their own code overflows or rounds to float32 where the weights are float64.
FLOAT32 = (
    "bloom",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "granite_swa",
    "mpt",
    "vaultgemma",
    "xglm",
)
NORMS_IN_FLOAT32 = ("exaone4", "glm4", "glm4v", "hyperclovax", "olmo2", "olmo3")


@functools.cache
def made(kind):
    dtype = torch.float32 if kind in FLOAT32 else torch.float64
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    statistics = statistics_for(model, tokenizer, RECIPE)
    return model, tokenizer, statistics, Memit().edit(model, tokenizer, FACTS, RECIPE, statistics)


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_oracles(kind):
    model, tokenizer, statistics, edited = made(kind)
    z, recipe = edited.solution.targets.double(), edited.recipe
    wanted = reference.spread(
        model,
        tokenizer,
        anatomy_of(model),
        FACTS,
        z,
        recipe,
        recipe.templates,
        statistics.layers,
        aim(kind),
    )
    tolerance = 1e-4 if kind in FLOAT32 else 1e-5 if kind in NORMS_IN_FLOAT32 else 1e-6
    for name, delta in edited.deltas.items():
        found = delta.B.double() @ delta.A.double()
        assert (found - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_edit_takes_and_goes_through_a_saved_checkpoint(kind, tmp_path):
    """Measured on the build, loaded again by transformers; and a build without patches is the base."""
    model, tokenizer, _, edited = made(kind)
    base = save_checkpoint(tiny_models.tiny_model(kind), tmp_path / "base")
    checkpoint = Checkpoint.open(base)
    names = StoredNames(model, checkpoint)
    deltas = {names.of(name): delta for name, delta in edited.deltas.items()}
    patch = Patch(FACTS, deltas, checkpoint.fingerprint(), "memit", {}, (), None)
    before = hashes(base)
    build(checkpoint, {patch.id: patch}, tmp_path / "out")
    asked = [(fact.text, fact.target) for fact in FACTS]
    old, new = (
        score_targets(load_model(folder, "cpu")[0], tokenizer, asked) for folder in (base, tmp_path / "out")
    )
    assert sum(said.nll - after.nll for said, after in zip(old, new, strict=True)) > 0.5, (old, new)

    build(checkpoint, {}, tmp_path / "out")
    after = hashes(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_brings_the_stream_to_its_target(kind):
    """With next to no λ the solve is exact: the stream at the subject is z, or as near as a norm allows."""
    model, tokenizer, statistics, edited = made(kind)
    anatomy = anatomy_of(model)
    recipe = edited.recipe.override(layers=(2,), lambda_=1e-9, templates=("{}",), statistics_digest="")
    alone = Memit().edit(model, tokenizer, FACTS, recipe, statistics)
    z = alone.solution.targets.to(model.dtype)
    block, down = anatomy.blocks[2], anatomy.downs[2]

    def states(module):
        return torch.stack(
            [reference.read(model, tokenizer, module, f, ["{}"], inputs=False)[0] for f in FACTS]
        )

    before, output = states(block), states(down)
    (delta,) = alone.deltas.values()
    change = (delta.B.double() @ delta.A.double()).to(model.dtype)
    weight = anatomy.weight(2)
    kept = weight.clone()
    weight += change.T if anatomy.transposed else change
    after = states(block)
    weight.copy_(kept)
    if kind not in POST_NORMS:
        torch.testing.assert_close(after, z, rtol=1e-4, atol=1e-4)
        return
    gain = POST_NORMS[kind](block)
    said = gain * output / output.square().mean(1, keepdim=True).sqrt()
    direction = torch.nn.functional.normalize((said + z - before) / gain, dim=1)
    found = torch.nn.functional.normalize((said + after - before) / gain, dim=1)
    torch.testing.assert_close(found, direction, rtol=1e-4, atol=1e-4)
    assert ((z - after).norm(dim=1) < (z - before).norm(dim=1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_guessed_recipe_takes(kind):
    """The rule of thumb for models without a measured recipe, on one fact."""
    model, tokenizer, _, _ = made(kind)
    fact = FACTS[1]
    small = {"contexts": 1, "statistics_tokens": 1200, "statistics_length": 16}
    recipe = recipe_for(model.config)
    assert recipe.guess
    edited = Memit().edit(model, tokenizer, [fact], recipe.override(**small))
    places = {name: anatomy_of(model).weights.index(name) for name in edited.deltas}

    def surprise():
        (score,) = score_targets(model, tokenizer, [(fact.text, fact.target)])
        return score.nll

    before, kept = surprise(), {}
    for name, layer in places.items():
        weight = anatomy_of(model).weight(layer)
        delta = edited.deltas[name]
        change = (delta.B.double() @ delta.A.double()).to(weight.dtype)
        kept[layer] = weight.clone()
        weight += change.T if delta.transposed else change
    after = surprise()
    for layer, weight in kept.items():
        anatomy_of(model).weight(layer).copy_(weight)
    assert after < before - 0.1
