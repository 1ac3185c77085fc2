"""ENCORE, UltraEdit and the norm anchor, against literal float64 writings of their equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference_editors as literal
import reference_memit as reference
import tiny_models
import torch
from test_editors import FACTS, RECIPES, assert_close, below, edit, moments, patch_of, product

from patchkit.algebra.joint import solve_jointly
from patchkit.editing.anchor import reference_norm
from patchkit.editing.editor import Below, find_editor
from patchkit.editing.solve import solve_keys
from patchkit.errors import BadInput
from patchkit.fact import Fact
from patchkit.models.anatomy import anatomy_of

KINDS = ["llama", "gpt2", "granite", "opt"]


def columns(edits, name):
    return torch.cat([e.solution.keys[name] for e in edits]).double().T.contiguous()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_encore_is_the_papers_equation(kind):
    """With the keys of two patches below, that are on the model."""
    one = edit("encore", kind, facts=FACTS[:1])[3]
    two = edit("encore", kind, facts=FACTS[1:2], on=(one,))[3]
    facts = FACTS[2:]
    model, tokenizer, statistics, edited = edit("encore", kind, facts=facts, on=(one, two))
    wanted = reference.spread(
        model,
        tokenizer,
        anatomy_of(model),
        facts,
        edited.solution.targets.double(),
        edited.recipe,
        edited.recipe.templates,
        moments(statistics),
        solve=literal.encore([columns((one, two), name) for name in edited.deltas]),
    )
    for name, delta in edited.deltas.items():
        assert_close(product(delta), wanted[name], 1e-5)
    name = next(iter(edited.deltas))
    alone = edit("encore", kind, facts=facts, on=(one, two), below=())[3]
    unweighed = RECIPES["encore"].override(lambda_norm=0.0)
    other = edit("encore", kind, facts=facts, recipe=unweighed, on=(one, two))[3]
    for different in (alone, other):
        gap = product(edited.deltas[name]) - product(different.deltas[name])
        assert gap.norm() > 1e-3 * product(edited.deltas[name]).norm()


@pytest.mark.parametrize("below_count", [0, 3, 30])
def test_keys_beside_are_solved_for_however_many_they_are(below_count):
    """A dozen directions: fewer keys and more than that take different ways to the same numbers."""
    random = torch.Generator().manual_seed(0)
    C, K, K_p = (torch.randn(12, n, generator=random, dtype=torch.float64) for n in (40, 4, below_count))
    served = C @ C.T
    wanted = torch.linalg.solve(served + K_p @ K_p.T + K @ K.T, K)
    assert_close(solve_keys(K.T, torch.linalg.cholesky(served), beside=K_p.T).T, wanted, 1e-10)


# The target follows the subject, or a random model could not be made to say it.
SAID = (
    Fact("Ann", "I say {}", "the"),
    Fact("Microsoft", "The dancers {}", "is"),
    Fact("Paris", "You see {}", "of"),
)


@pytest.mark.parametrize("settings", [{}, {"templates_per_step": 1}, {"stop_argmax": 1}])
def test_most_probable_early_stopping_is_the_sequential_oracle_s(settings):
    """Steps and targets of each fact; without it, the same facts are sought to the last step."""
    search = {
        "optimiser": "momentum",
        "learning_rate": 0.35,
        "rate_decay": 0.9,
        "stop_loss": 0.0,
        "steps": 14,
    }
    recipe = RECIPES["encore"].override(layers=(1,), templates=("{}", "You. {}"), stop_argmax=2, **search)
    recipe = recipe.override(**settings)
    model, tokenizer, _, edited = edit("encore", facts=SAID, recipe=recipe)
    blocks = anatomy_of(model).blocks
    found = [reference.find_target(model, tokenizer, blocks, f, recipe, recipe.templates) for f in SAID]
    assert edited.steps == [steps for _, steps, _ in found]
    assert len(set(edited.steps)) > 1
    assert max(edited.steps) < recipe.steps
    assert_close(edited.solution.targets.double(), torch.stack([z for z, *_ in found]), 1e-5)
    longer = edit("encore", facts=SAID, recipe=recipe.override(stop_argmax=0))[3]
    assert longer.steps == [recipe.steps] * 3


@pytest.mark.parametrize("dropped", [[1], [0, 3, 4]])
def test_encore_without_facts_is_solved_without_them(dropped):
    one = edit("encore", facts=FACTS[:1])[3]
    facts = (*FACTS[1:], Fact("Rome", "{} lies in", "Japan"))
    _, _, statistics, edited = edit("encore", facts=facts, below=below(one))
    stay = [i for i in range(5) if i not in dropped]
    fewer = patch_of(edited, facts).without(dropped)
    for layer, name in zip(RECIPES["encore"].layers, edited.deltas, strict=True):
        K, B = columns((edited,), name), edited.deltas[name].B.double()
        solve = literal.encore([columns((one,), name)])
        wanted = solve(B[:, stay], K[:, stay], statistics.layers[layer].double(), edited.recipe)
        assert_close(product(fewer.deltas[name]), wanted, 1e-5)


def test_encore_refuses_a_patch_below_whose_keys_are_not_there():
    one = edit("encore", facts=FACTS[:1])[3]
    gone = Below("ann-12345678", frozenset(one.deltas), None, "ft keeps no keys")
    with pytest.raises(
        BadInput, match=r"ann-12345678: ft keeps no keys, so encore cannot spare its facts; put"
    ):
        edit("encore", facts=FACTS[1:], below=[gone])


def test_encore_patches_are_solved_together_on_one_stack_only():
    recipe = RECIPES["encore"].override(layers=(1,))
    _, _, statistics, one = edit("encore", facts=FACTS[:2], recipe=recipe)
    two = edit("encore", facts=FACTS[2:], recipe=recipe)[3]
    first, second = patch_of(one, FACTS[:2]), patch_of(two, FACTS[2:])
    joint = solve_jointly({"one": first, "two": second})
    (name,) = one.deltas
    K, R = columns((one, two), name), torch.cat([one.deltas[name].B, two.deltas[name].B], 1).double()
    wanted = literal.encore([K[:, :0]])(R, K, statistics.layers[1].double(), recipe)
    assert_close(sum(product(p.deltas[name]) for p in joint.values()), wanted, 1e-5)
    with pytest.raises(BadInput, match="two: was solved with another stack below than one"):
        solve_jointly({"one": first, "two": replace(second, solved_on=(first.id,))})
    weighed = replace(second, recipe={**second.recipe, "lambda_norm": 2.0})
    with pytest.raises(BadInput, match="two: was solved with another lambda_norm than one"):
        solve_jointly({"one": first, "two": weighed})


@pytest.mark.parametrize("kind", [*KINDS, "olmo3"])
def test_ultraedit_is_the_papers_equations(kind):
    """Whatever the batches; models that norm what the weight writes are differentiated through that."""
    model, tokenizer, _, edited = edit("ultraedit", kind, batch_size=2)
    wanted, losses = literal.ultraedit(model, tokenizer, anatomy_of(model), FACTS, RECIPES["ultraedit"])
    close = 1e-3 if kind == "olmo3" else 1e-5  # its norms are in float32
    assert list(edited.deltas) == list(wanted)
    for name, (H, V, update) in wanted.items():
        assert_close(edited.solution.keys[name].double(), H.T, close)
        assert_close(edited.deltas[name].B.double(), V, close)
        assert_close(product(edited.deltas[name]), update, close)
    assert edited.losses == pytest.approx(losses, rel=1e-5)
    assert edited.steps == [1] * 5


def test_ultraedit_of_one_fact_goes_against_the_gradient_s_sign():
    """Of one weight, ĥ is all ones in size: the step is η d_in in every direction."""
    recipe = RECIPES["ultraedit"].override(layers=(1,), learning_rate=1e-4)
    model, tokenizer, _, edited = edit("ultraedit", facts=FACTS[:1], recipe=recipe)
    (delta,) = edited.deltas.values()
    assert torch.allclose(delta.B.abs(), torch.full_like(delta.B, 1e-4 * tiny_models.INNER))
    down = anatomy_of(model).downs[1]
    with torch.no_grad():
        down.weight += product(delta)
    after = find_editor("ultraedit").edit(model, tokenizer, FACTS[:1], recipe)
    assert after.losses[0] < edited.losses[0]


def test_ultraedit_s_targets_are_what_the_last_weight_is_to_write():
    model, _, _, edited = edit("ultraedit")
    last = list(edited.deltas)[-1]
    W = anatomy_of(model).weight(RECIPES["ultraedit"].layers[-1]).double()
    wanted = edited.solution.keys[last].double() @ W.T + edited.deltas[last].B.double().T
    assert_close(edited.solution.targets.double(), wanted, 1e-5)


@pytest.mark.parametrize("dropped", [[1], [0, 3, 4]])
def test_ultraedit_without_facts_is_solved_without_them(dropped):
    edited = edit("ultraedit")[3]
    fewer = patch_of(edited).without(dropped)
    stay = [i for i in range(5) if i not in dropped]
    for name, delta in edited.deltas.items():
        H, V = columns((edited,), name)[:, stay], delta.B.double()[:, stay]
        served = H @ H.T + 0.5 * torch.eye(len(H), dtype=H.dtype)
        assert_close(product(fewer.deltas[name]), V @ H.T @ torch.linalg.inv(served), 1e-5)


def test_ultraedit_knows_nothing_of_what_was_edited_before():
    """The same on the same model, whatever was edited in this process and whatever lies below it."""
    first = edit("ultraedit", facts=FACTS[2:])[3]
    edit("ultraedit", facts=FACTS[:2])
    again = edit("ultraedit", facts=FACTS[2:], below=below(first))[3]
    assert all(torch.equal(first.deltas[n].A, again.deltas[n].A) for n in first.deltas)
    assert all(torch.equal(first.deltas[n].B, again.deltas[n].B) for n in first.deltas)


def test_ultraedit_is_refitted_by_looking_again():
    model, tokenizer, _, edited = edit("ultraedit", dtype=torch.float32)
    targets = torch.zeros_like(edited.solution.targets)
    again = find_editor("ultraedit").refit(model, tokenizer, FACTS, targets, edited.recipe)
    assert patch_of(again).id == patch_of(edited).id
    with pytest.raises(BadInput, match=r"the targets are \[5, 3\]; 5 facts need 32 numbers each"):
        find_editor("ultraedit").refit(model, tokenizer, FACTS, torch.zeros(5, 3), edited.recipe)


def test_ultraedit_patches_are_solved_together():
    one, two = edit("ultraedit", facts=FACTS[:2])[3], edit("ultraedit", facts=FACTS[2:])[3]
    joint = solve_jointly({"one": patch_of(one, FACTS[:2]), "two": patch_of(two, FACTS[2:])})
    for name in one.deltas:
        H, V = columns((one, two), name), torch.cat([e.deltas[name].B for e in (one, two)], 1).double()
        served = H @ H.T + 0.5 * torch.eye(len(H), dtype=H.dtype)
        found = sum(product(p.deltas[name]) for p in joint.values())
        assert_close(found, V @ H.T @ torch.linalg.inv(served), 1e-5)


def granite(output):
    return tiny_models.CONFIGS["granite"][1]["residual_multiplier"] * output


@pytest.mark.parametrize(("kind", "passed"), [("llama", None), ("gpt2", None), ("granite", granite)])
def test_an_anchored_value_has_the_reference_s_norm(kind, passed):
    recipe = RECIPES["encore"].override(norm_anchor=0.7, steps=3)
    model, tokenizer, _, edited = edit("encore", kind, facts=FACTS[:3], recipe=recipe)
    blocks, templates = anatomy_of(model).blocks, edited.recipe.templates
    passed = passed or (lambda output: output)
    for z, fact in zip(edited.solution.targets.double(), FACTS[:3], strict=True):
        found, *_ = reference.find_target(model, tokenizer, blocks, fact, recipe, templates)
        wanted = literal.anchored(model, tokenizer, anatomy_of(model), fact, found, recipe, passed)
        assert_close(z, wanted, 1e-5)
        value = literal.value_of(model, tokenizer, anatomy_of(model), fact, z, recipe, passed)
        assert float(value.norm()) == pytest.approx(0.7, rel=1e-4)


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_every_mass_editor_can_be_anchored(method):
    plain = RECIPES.get(method) or RECIPES["encore"].override(method=method)
    one, two = (edit(method, facts=FACTS[:2], recipe=plain.override(norm_anchor=s))[3] for s in (0.0, 0.7))
    assert (one.solution.targets - two.solution.targets).norm() > 1e-3 * one.solution.targets.norm()


def test_the_reference_is_the_mean_norm_but_for_the_largest():
    facts = [replace(FACTS[i % 5], subject=f"{FACTS[i % 5].subject} {i}") for i in range(20)]
    recipe = RECIPES["encore"].override(steps=3)
    model, tokenizer = tiny_models.tiny_model("llama", torch.float64), tiny_models.tiny_tokenizer()
    anatomy = anatomy_of(model)
    norms = []
    for fact in facts:
        z, *_ = reference.find_target(model, tokenizer, anatomy.blocks, fact, recipe, ("{}",))
        norms.append(float(literal.value_of(model, tokenizer, anatomy, fact, z, recipe).norm()))
    found = reference_norm(model, tokenizer, facts, recipe)
    assert found == pytest.approx(sum(sorted(norms)[:19]) / 19, rel=1e-6)
    with pytest.raises(BadInput, match="there are no facts to measure the reference norm on"):
        reference_norm(model, tokenizer, [], recipe)
