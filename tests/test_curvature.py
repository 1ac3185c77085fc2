"""The curvature of the answers, held against gradients of one text at a time; what the search makes of it."""

from __future__ import annotations

import math

import pytest
import reference_memit
import tiny_models
import torch
from test_editors import FACTS, RECIPES
from torch.nn.functional import log_softmax

from patchkit.editing import curvature
from patchkit.editing.curvature import second_moment, whitening
from patchkit.editing.editor import find_editor
from patchkit.editing.pieces import pieces_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, collect, statistics_for
from patchkit.errors import BadInput
from patchkit.models.anatomy import anatomy_of

LAYER = 1
DOCUMENTS = ["Paris lies in the north of France.", "Rome", "The river ran on, as rivers do, and on."]
KINDS = ("llama", "gpt2", "gpt_neox", "gemma2", "bloom")


def parts_of(kind, dtype=torch.float64):
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer()
    return model, tokenizer, list(pieces_of(tokenizer, DOCUMENTS, 40, 16))


def literally(model, pieces, seed, layer=LAYER):
    """G with one gradient by one text, each through the whole model, the state moved by a leaf of its own."""
    draws, total, counted = torch.Generator().manual_seed(seed), 0, 0
    block = anatomy_of(model).blocks[layer]
    for ids, counts in sorted(pieces, key=lambda piece: len(piece[0])):
        points = torch.rand(len(ids), 1, generator=draws)
        leaf = torch.zeros(1, len(ids), model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        with reference_memit.hooked(block, output=lambda hidden, leaf=leaf: hidden + leaf):
            log_p = log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].float(), -1)
        mass = log_p.detach().exp().cumsum(-1)
        said = [int((row <= u * row[-1]).sum()) for row, u in zip(mass, points, strict=True)]
        surprise = -sum(row[token] for row, token in zip(log_p, said, strict=True))
        (slope,) = torch.autograd.grad(surprise, leaf)
        rows = slope[0][torch.tensor(counts)]
        total, counted = total + rows.T @ rows, counted + len(rows)
    return total / counted


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_literal_one(kind):
    model, _, pieces = parts_of(kind)
    found = second_moment(model, anatomy_of(model), LAYER, pieces, 3)
    expected = literally(model, pieces, 3)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-4
    assert all(weight.requires_grad for weight in model.parameters()), "as it was"


def test_only_so_many_tokens_are_read(monkeypatch):
    model, _, pieces = parts_of("llama")
    monkeypatch.setattr(curvature, "TOKENS_PER_WIDTH", 0.01)  # less than one piece
    found = second_moment(model, anatomy_of(model), LAYER, pieces, 0)
    expected = literally(model, pieces[:1], 0)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_whitening_is_the_power_that_is_asked(power):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.linspace(1, 4, 12)
    G = rows.T @ rows / 200
    T = whitening(G, power)
    assert torch.allclose(T, T.T)
    assert math.isclose(float(T.square().sum()), 12, rel_tol=1e-9)
    # T^(2 / power) G is a multiple of the identity
    values, vectors = torch.linalg.eigh(T)
    back = (vectors * values ** (2 / power)) @ vectors.T @ G
    assert torch.allclose(
        back, torch.eye(12, dtype=torch.float64) * back[0, 0], atol=1e-8 * float(back[0, 0])
    )


def test_a_direction_that_the_text_does_not_know_is_bounded():
    T = whitening(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])), 1.0).diagonal()
    assert math.isclose(float(T[3] / T[0]), math.sqrt((4 / 3) / 0.01 / (4 / 3) * (4 / 3)), rel_tol=1e-6)


def test_what_is_no_curvature_is_refused():
    for G in (torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        with pytest.raises(BadInput, match="is not a number; set curvature to 0"):
            whitening(G, 1.0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"optimiser": "momentum", "learning_rate": 0.3, "clamp": 0.4}])
def test_targets_are_the_literal_search_in_theta(kind, settings):
    model, tokenizer, _ = parts_of(kind)
    recipe = RECIPES["emmet"].override(method="memit", **{"lambda": 2.0}, curvature=1.0, **settings)
    recipe = recipe.override(templates=("{}", "You. {}"))
    statistics = statistics_for(model, tokenizer, recipe)
    edited = find_editor("memit").edit(model, tokenizer, FACTS, recipe, statistics)
    blocks = anatomy_of(model).blocks
    T = whitening(statistics.curvature[recipe.layers[-1]], 1.0)
    plain = find_editor("memit").edit(model, tokenizer, FACTS, recipe.override(curvature=0.0), statistics)
    for fact, z, other in zip(FACTS, edited.solution.targets, plain.solution.targets, strict=True):
        expected, _, _ = reference_memit.find_target(
            model, tokenizer, blocks, fact, recipe, recipe.templates, T
        )
        assert float((z.double() - expected).norm() / expected.norm()) < 1e-5
        assert float((z - other).norm() / z.norm()) > 1e-3, "it is another search"


@pytest.mark.parametrize("method", ["memit", "emmet", "rome", "alphaedit", "encore"])
def test_every_method_that_searches_walks_in_it(method):
    recipe = {**RECIPES, "memit": Recipe(layers=(0, 1, 2), lambda_=2.0, contexts=0, steps=4)}[method]
    model, tokenizer, _ = parts_of("llama")
    found = {}
    for power in (0.0, 1.0):
        edited = find_editor(method).edit(model, tokenizer, FACTS, recipe.override(curvature=power))
        assert edited.recipe.curvature == power
        found[power] = edited.solution.targets
    assert not torch.equal(found[0.0], found[1.0])


def test_it_is_kept_beside_the_statistics_and_read_again(tmp_path, monkeypatch):
    model, tokenizer, _ = parts_of("llama", torch.float32)
    options = {"tokens": 60, "length": 16, "curvature": (LAYER,), "seed": 5, "folder": tmp_path, "base": "b"}
    first = collect(model, tokenizer, (0, LAYER), DOCUMENTS, **options)
    (path,) = tmp_path.rglob("curvature-*.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(
            "patchkit.editing.statistics.second_moment", lambda *_: pytest.fail("collected again")
        )
        again = collect(model, tokenizer, (0, LAYER), DOCUMENTS, **options)
    assert torch.equal(first.curvature[LAYER], again.curvature[LAYER])
    path.write_bytes(b"cut")
    assert torch.equal(
        collect(model, tokenizer, (0, LAYER), DOCUMENTS, **options).curvature[LAYER], first.curvature[LAYER]
    )
    assert first.digest((0, LAYER)) == Statistics(first.layers, 60).digest((0, LAYER))


def test_statistics_without_it_are_refused_by_name():
    model, tokenizer, _ = parts_of("llama", torch.float32)
    recipe = Recipe(layers=(0, 1), lambda_=2.0, contexts=0, steps=3)
    statistics = statistics_for(model, tokenizer, recipe)
    assert not statistics.curvature, "it is collected where it is asked for"
    with pytest.raises(BadInput, match="layer 1: no curvature was collected"):
        find_editor("memit").edit(model, tokenizer, FACTS, recipe.override(curvature=0.5), statistics)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_the_field_has_bounds(value):
    with pytest.raises(BadInput, match="curvature should be from 0 to 1"):
        Recipe(layers=(0,), lambda_=1.0, curvature=value)
