"""Every editor against a literal float64 writing of its equations; facts that leave, against solving anew."""

from __future__ import annotations

import pytest
import reference_editors as literal
import reference_memit as reference
import tiny_models
import torch

from patchkit.algebra.factors import Patch
from patchkit.algebra.joint import solve_jointly
from patchkit.checkpoint import Checkpoint
from patchkit.editing import finetune, rome
from patchkit.editing.editor import Below, find_editor
from patchkit.editing.mass import add
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.errors import BadInput
from patchkit.models.anatomy import anatomy_of

FACTS = tiny_models.FACTS
BASE = "sha256:" + 64 * "0"
COMMON = {"learning_rate": 0.1, "steps": 6, "contexts": 3, "statistics_tokens": 600, "statistics_length": 32}
RECIPES = {
    "emmet": Recipe(layers=(0, 1, 2), method="emmet", **COMMON),
    "rome": Recipe(layers=(1,), method="rome", **COMMON),
    "ft": Recipe(layers=(1,), method="ft", learning_rate=0.01, steps=6),
    "alphaedit": Recipe(layers=(0, 1, 2), lambda_=2.0, method="alphaedit", nullspace_threshold=0.3, **COMMON),
    "encore": Recipe(layers=(0, 1, 2), lambda_=2.0, method="encore", lambda_norm=0.5, **COMMON),
    "ultraedit": Recipe(layers=(1, 2), lambda_=0.5, method="ultraedit", learning_rate=1e-3),
}


def edit(method, kind="llama", dtype=torch.float64, *, facts=FACTS, recipe=None, on=(), **options):
    """``on``: edits whose patches lie below, and are on the model."""
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer()
    recipe = recipe or RECIPES[method]
    statistics = statistics_for(model, tokenizer, recipe) if recipe.reads("statistics_text") else None
    if on:
        options.setdefault("below", below(*on))
    for earlier in on:
        for name, delta in earlier.deltas.items():
            add(model.get_parameter(name), delta)
    edited = find_editor(method).edit(model, tokenizer, facts, recipe, statistics, **options)
    return model, tokenizer, statistics, edited


def product(delta):
    return delta.dense.double() if delta.dense is not None else delta.B.double() @ delta.A.double()


def patch_of(edited, facts=FACTS, **fields):
    recipe = edited.recipe
    return Patch(facts, edited.deltas, BASE, recipe.method, recipe.to_dict(), (), edited.solution, **fields)


def assert_close(found, wanted, tolerance):
    assert (found - wanted).norm() <= tolerance * wanted.norm(), float(
        (found - wanted).norm() / wanted.norm()
    )


def moments(statistics: Statistics):
    return {layer: C.double() for layer, C in statistics.layers.items()}


@pytest.mark.parametrize("method", sorted(RECIPES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_keeps_every_bit(method, dtype):
    model, tokenizer = tiny_models.tiny_model("gpt2", dtype), tiny_models.tiny_tokenizer()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    edited = find_editor(method).edit(model, tokenizer, FACTS[:2], RECIPES[method])
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1]
    assert all(delta.transposed for delta in edited.deltas.values())
    assert edited.recipe.method == method
    assert len(edited.steps) == len(edited.losses) == 2


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_twice_gives_the_same_patch_and_reads_back(method):
    one, two = (patch_of(edit(method, dtype=torch.float32, facts=FACTS[:3])[3], FACTS[:3]) for _ in range(2))
    assert one.id == two.id
    back = Patch.from_files(one.files(), "x")
    assert back.files() == one.files()
    assert Recipe.from_dict(back.recipe).to_dict() == back.recipe
    assert back.recipe["method"] == method


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_emmet_is_the_papers_equation(kind):
    model, tokenizer, statistics, edited = edit("emmet", kind)
    z, recipe = edited.solution.targets.double(), edited.recipe
    wanted = reference.spread(
        model,
        tokenizer,
        anatomy_of(model),
        FACTS,
        z,
        recipe,
        recipe.templates,
        moments(statistics),
        solve=literal.emmet,
    )
    assert list(edited.deltas) == list(wanted)
    for name, delta in edited.deltas.items():
        assert_close(
            product(delta), wanted[name], 1e-5
        )  # factors are float32, and Γ's condition is some tens


def test_emmet_meets_every_constraint():
    """ΔW K = R with KᵀX = I: each fact's key gives just its share, whatever the other facts are."""
    model, tokenizer, _, edited = edit("emmet")
    layer, name = 0, anatomy_of(model).weights[0]
    keys = edited.solution.keys[name].double()
    block = anatomy_of(model).blocks[2]
    states = torch.stack(
        [reference.read(model, tokenizer, block, fact, ["{}"], inputs=False)[0] for fact in FACTS]
    )
    share = (edited.solution.targets.double() - states) / 3
    assert layer == 0
    assert_close(keys @ product(edited.deltas[name]).T, share, 1e-5)


@pytest.mark.parametrize("dropped", [[1], [0, 3], [1, 2, 4]])
def test_emmet_without_facts_is_solved_without_them(dropped):
    _, _, statistics, edited = edit("emmet")
    patch = patch_of(edited)
    fewer = patch.without(dropped)
    stay = [i for i in range(5) if i not in dropped]
    for layer, name in zip(RECIPES["emmet"].layers, edited.deltas, strict=True):
        K = edited.solution.keys[name].double().T
        R = product(edited.deltas[name]) @ K
        wanted = literal.emmet(R[:, stay], K[:, stay], statistics.layers[layer].double(), None)
        assert_close(product(fewer.deltas[name]), wanted, 2e-5)
    twice = fewer.without([0])
    again = patch.without([*dropped, stay[0]])
    for name in edited.deltas:
        assert_close(product(twice.deltas[name]), product(again.deltas[name]), 2e-5)


def test_emmet_refuses_facts_that_share_a_key():
    twins = (FACTS[0], type(FACTS[0])(FACTS[0].subject, FACTS[0].prompt, "painter"))
    with pytest.raises(BadInput, match=r"layer 0: the keys of these facts are too alike .*--method memit"):
        edit("emmet", facts=twins)


def test_emmet_patches_solved_together_are_one_batch():
    """Of one layer, whose keys do not depend on one another: the sum is solving for all facts at once."""
    recipe = RECIPES["emmet"].override(layers=(1,))
    _, _, statistics, one = edit("emmet", facts=FACTS[:2], recipe=recipe)
    _, _, _, two = edit("emmet", facts=FACTS[2:], recipe=recipe)
    joint = solve_jointly({"one": patch_of(one, FACTS[:2]), "two": patch_of(two, FACTS[2:])})
    (name,) = one.deltas
    K = torch.cat([one.solution.keys[name], two.solution.keys[name]]).double().T
    R = torch.cat([product(e.deltas[name]) @ e.solution.keys[name].double().T for e in (one, two)], 1)
    wanted = literal.emmet(R, K, statistics.layers[1].double(), None)
    assert_close(sum(product(p.deltas[name]) for p in joint.values()), wanted, 2e-5)
    again = solve_jointly(joint)
    assert_close(sum(product(p.deltas[name]) for p in again.values()), wanted, 2e-5)


@pytest.mark.parametrize("mean_key", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rome_is_the_papers_equations(kind, mean_key):
    """Values, sought on the model with the facts before, and the sum of the rank-one updates."""
    recipe = RECIPES["rome"].override(mean_key=mean_key)
    model, tokenizer, statistics, edited = edit("rome", kind, recipe=recipe)
    wanted, values = literal.rome(
        model, tokenizer, anatomy_of(model), FACTS, recipe, edited.recipe.templates, moments(statistics)[1]
    )
    assert_close(edited.solution.targets.double(), values, 1e-4)
    (delta,) = edited.deltas.values()
    assert_close(product(delta), wanted, 1e-3)
    exact, _ = literal.rome(
        model,
        tokenizer,
        anatomy_of(model),
        FACTS,
        recipe,
        edited.recipe.templates,
        moments(statistics)[1],
        edited.solution.targets.double(),
    )
    assert_close(product(delta), exact, 1e-5)


@pytest.mark.parametrize("kind", ["granite", "olmo2", "olmo3"])
def test_rome_reaches_the_stream_behind_a_scale_or_a_norm(kind):
    """δ is what the stream takes more; the value is what the projection has to write for it."""
    model, tokenizer, statistics, edited = edit("rome", kind)
    anatomy = anatomy_of(model)
    (layer,) = RECIPES["rome"].layers
    if kind == "granite":
        way = literal.Way(anatomy.downs[layer], scale=model.config.residual_multiplier)
    else:
        way = literal.Way(anatomy.blocks[layer].post_feedforward_layernorm, norm=True)
    wanted, values = literal.rome(
        model,
        tokenizer,
        anatomy,
        FACTS,
        RECIPES["rome"],
        edited.recipe.templates,
        moments(statistics)[1],
        way=way,
    )
    assert_close(edited.solution.targets.double(), values, 1e-3)
    (delta,) = edited.deltas.values()
    assert_close(product(delta), wanted, 1e-2 if way.norm else 1e-3)  # olmo's norms are in float32


def test_keys_of_rome_do_not_depend_on_how_many_are_read_together(monkeypatch):
    _, _, _, whole = edit("rome")
    monkeypatch.setattr(rome, "_AT_ONCE", 2)
    _, _, _, parts = edit("rome")
    (name,) = whole.solution.keys
    assert_close(parts.solution.keys[name].double(), whole.solution.keys[name].double(), 1e-6)


@pytest.mark.parametrize("at", [1, 3])
def test_rome_goes_on_behind_the_facts_of_a_killed_run_to_the_same_bits(tmp_path, monkeypatch, at):
    monkeypatch.setattr(rome, "_KEEP_EVERY", 0.0)
    model, tokenizer, statistics, wanted = edit("rome")
    recipe, sought = RECIPES["rome"], []

    def kill(phase, done, total):
        if phase == "targets" and done == at:
            raise KeyboardInterrupt

    def watch(phase, done, total):
        if phase == "targets":
            sought.append(done)

    def run(facts, progress):
        options = {"unfinished": tmp_path, "progress": progress}
        return find_editor("rome").edit(model, tokenizer, facts, recipe, statistics, **options)

    with pytest.raises(KeyboardInterrupt):
        run(FACTS, kill)
    run(FACTS[::-1], None)  # other facts before each, so other values
    again = run(FACTS, watch)
    assert sought[0] == at
    assert (again.steps, again.losses) == (wanted.steps, wanted.losses)
    for name, delta in wanted.deltas.items():
        assert torch.equal(again.deltas[name].B, delta.B)
        assert torch.equal(again.deltas[name].A, delta.A)
    assert torch.equal(again.solution.targets, wanted.solution.targets)
    sought.clear()
    run(FACTS, watch)
    assert sought == [len(FACTS)]


def test_rome_corrected_and_not_are_two_edits():
    one, two = (edit("rome", recipe=RECIPES["rome"].override(mean_key=m))[3] for m in (True, False))
    (first,), (second,) = one.deltas.values(), two.deltas.values()
    assert (product(first) - product(second)).norm() > 0.01 * product(first).norm()


@pytest.mark.parametrize("mean_key", [True, False])
@pytest.mark.parametrize("dropped", [[0], [1, 3], [4], [0, 1, 2, 3]])
def test_rome_without_facts_is_the_sequence_without_them(dropped, mean_key):
    """The values held, the facts that stay are written one after another as if there were no others."""
    recipe = RECIPES["rome"].override(mean_key=mean_key)
    model, tokenizer, statistics, edited = edit("rome", recipe=recipe)
    stay = [i for i in range(5) if i not in dropped]
    wanted, _ = literal.rome(
        model,
        tokenizer,
        anatomy_of(model),
        [FACTS[i] for i in stay],
        recipe,
        edited.recipe.templates,
        moments(statistics)[1],
        edited.solution.targets.double()[stay],
    )
    (delta,) = patch_of(edited).without(dropped).deltas.values()
    assert_close(product(delta), wanted, 1e-5)


def test_rome_is_not_solved_together():
    patches = {name: patch_of(edit("rome", facts=FACTS[:2])[3], FACTS[:2]) for name in ("one", "two")}
    with pytest.raises(BadInput, match=r"one: rome does not solve facts as a batch.*merge without --joint"):
        solve_jointly(patches)


FT = {
    "published": {},
    "decay": {"weight_decay": 0.01, "rate_decay": 0.9},
    "bound": {"norm_bound": 0.02},
    "early": {"steps": 30},
}


@pytest.mark.parametrize("settings", list(FT.values()), ids=list(FT))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "olmo3"])
def test_ft_is_adam_on_the_weight(kind, settings):
    recipe = RECIPES["ft"].override(**settings)
    if settings == FT["early"]:
        start = edit("ft", kind, recipe=recipe.override(steps=1))[3]
        recipe = recipe.override(stop_loss=0.9 * sum(start.losses) / len(FACTS))
    model, tokenizer, _, edited = edit("ft", kind, recipe=recipe, batch_size=2)
    wanted = literal.finetune(model, tokenizer, anatomy_of(model), FACTS, recipe)
    (delta,) = edited.deltas.values()
    assert_close(product(delta), wanted, 1e-3 if kind == "olmo3" else 1e-5)  # its norms are in float32
    assert edited.solution is None
    if "norm_bound" in settings:
        assert float(product(delta).abs().max()) == pytest.approx(0.02)
    if settings == FT["early"]:
        assert 1 < edited.steps[0] < 30


def test_ft_holds_what_there_is_room_for_and_runs_the_rest_again(monkeypatch):
    ran = []
    really = finetune.capture
    monkeypatch.setattr(finetune, "capture", lambda *a, **k: ran.append(1) or really(*a, **k))
    _, _, _, held = edit("ft", batch_size=2)
    groups = len(ran)
    monkeypatch.setattr(finetune, "_HELD", 0)
    _, _, _, bare = edit("ft", batch_size=2)
    assert len(ran) == groups * (1 + RECIPES["ft"].steps)
    assert groups > 1
    (one,), (two,) = held.deltas.values(), bare.deltas.values()
    assert torch.equal(one.dense, two.dense)


def test_ft_keeps_no_keys_and_no_single_fact_leaves():
    patch = patch_of(edit("ft", facts=FACTS[:2])[3], FACTS[:2])
    assert set(patch.files()) == {"facts.jsonl", "delta.safetensors"}
    with pytest.raises(BadInput, match="ft keeps no keys, so no single fact can be taken out; revert"):
        patch.without([0])


def below(*edits):
    return [Below(f"p{i}", frozenset(e.deltas), e.solution.keys) for i, e in enumerate(edits)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_alphaedit_is_the_papers_equation(kind):
    """With the keys of two patches below, that are on the model."""
    _, _, _, one = edit("alphaedit", kind, facts=FACTS[:1])
    _, _, _, two = edit("alphaedit", kind, facts=FACTS[1:2], on=(one,))
    facts, recipe = FACTS[2:], RECIPES["alphaedit"]
    model, tokenizer, statistics, edited = edit("alphaedit", kind, facts=facts, on=(one, two))
    K_p = [
        torch.cat([one.solution.keys[n], two.solution.keys[n]]).double().T.contiguous() for n in edited.deltas
    ]
    wanted = reference.spread(
        model,
        tokenizer,
        anatomy_of(model),
        facts,
        edited.solution.targets.double(),
        recipe,
        edited.recipe.templates,
        moments(statistics),
        solve=literal.alphaedit(K_p, recipe.nullspace_threshold, recipe.lambda_),
    )
    for name, delta in edited.deltas.items():
        assert_close(product(delta), wanted[name], 1e-5)
    alone = edit("alphaedit", kind, facts=facts, on=(one, two), below=())[3]
    name = next(iter(edited.deltas))
    assert (product(alone.deltas[name]) - product(edited.deltas[name])).norm() > 1e-3 * product(
        edited.deltas[name]
    ).norm()


def test_alphaedit_leaves_what_c_uses_alone():
    _, _, statistics, edited = edit("alphaedit")
    for layer, delta in zip(RECIPES["alphaedit"].layers, edited.deltas.values(), strict=True):
        values, vectors = torch.linalg.eigh(statistics.layers[layer].double())
        used = vectors[:, values >= 0.3]
        assert 0 < used.shape[1] < len(values)
        assert (product(delta) @ used).norm() < 1e-6 * product(delta).norm()


@pytest.mark.parametrize("dropped", [[1], [0, 3, 4]])
def test_alphaedit_without_facts_is_solved_without_them(dropped):
    _, _, _, one = edit("alphaedit", facts=FACTS[:1])
    facts = (*FACTS[1:], type(FACTS[0])("Rome", "{} lies in", "Japan"))
    _, _, statistics, edited = edit("alphaedit", facts=facts, below=below(one))
    stay = [i for i in range(5) if i not in dropped]
    fewer = patch_of(edited, facts).without(dropped)
    for layer, name in zip(RECIPES["alphaedit"].layers, edited.deltas, strict=True):
        K, B = edited.solution.keys[name].double().T, edited.deltas[name].B.double()
        K_p = [one.solution.keys[name].double().T]
        solve = literal.alphaedit(K_p, 0.3, 2.0)
        wanted = solve(B[:, stay], K[:, stay], statistics.layers[layer].double(), None)
        assert_close(product(fewer.deltas[name]), wanted, 1e-5)


def test_alphaedit_refuses_a_patch_below_whose_keys_are_not_there():
    _, _, _, one = edit("alphaedit", facts=FACTS[:1])
    gone = Below("lebron-james-12345678", frozenset(one.deltas), None, "its keys.safetensors was not shipped")
    with pytest.raises(
        BadInput, match=r"lebron-james-12345678: its keys\.safetensors was not shipped, so alph"
    ):
        edit("alphaedit", facts=FACTS[1:], below=[gone])
    elsewhere = Below("other", frozenset({"another.weight"}), None, "ft keeps no keys")
    edit("alphaedit", facts=FACTS[1:2], below=[elsewhere])


@pytest.mark.parametrize(("threshold", "says"), [(1e-9, "no direction"), (1e9, "every direction")])
def test_alphaedit_needs_some_directions_and_not_all(threshold, says):
    recipe = RECIPES["alphaedit"].override(nullspace_threshold=threshold)
    with pytest.raises(
        BadInput, match=f"layer 0: nullspace_threshold .* leaves {says} free; the eigenvalues"
    ):
        edit("alphaedit", recipe=recipe)


def test_alphaedit_patches_are_solved_together_on_one_stack_only():
    recipe = RECIPES["alphaedit"].override(layers=(1,))
    _, _, statistics, one = edit("alphaedit", facts=FACTS[:2], recipe=recipe)
    _, _, _, two = edit("alphaedit", facts=FACTS[2:], recipe=recipe)
    first, second = patch_of(one, FACTS[:2]), patch_of(two, FACTS[2:])
    joint = solve_jointly({"one": first, "two": second})
    (name,) = one.deltas
    K = torch.cat([one.solution.keys[name], two.solution.keys[name]]).double().T
    R = torch.cat([one.deltas[name].B, two.deltas[name].B], 1).double()
    solve = literal.alphaedit([K[:, :0]], 0.3, 2.0)
    wanted = solve(R, K, statistics.layers[1].double(), None)
    assert_close(sum(product(p.deltas[name]) for p in joint.values()), wanted, 1e-5)
    from dataclasses import replace

    with pytest.raises(BadInput, match="two: was solved with another stack below than one"):
        solve_jointly({"one": first, "two": replace(second, solved_on=(first.id,))})


@pytest.mark.parametrize("method", ["emmet", "rome", "alphaedit", "encore"])
def test_a_refit_on_the_same_model_gives_the_same_update(method):
    """Forward passes only: keys and residuals again, for the targets that were found."""
    model, tokenizer, statistics, edited = edit(method, dtype=torch.float32)
    again = find_editor(method).refit(
        model, tokenizer, FACTS, edited.solution.targets, edited.recipe, statistics
    )
    for name, delta in edited.deltas.items():
        assert_close(product(again.deltas[name]), product(delta), 1e-5)
    assert torch.equal(again.solution.targets, edited.solution.targets)
    assert again.steps == [0] * 5
    alone = find_editor(method).refit(model, tokenizer, FACTS, edited.solution.targets, edited.recipe)
    for name, delta in again.deltas.items():
        assert_close(product(alone.deltas[name]), product(delta), 1e-5)  # statistics are collected
    one = find_editor(method).refit(
        model,
        tokenizer,
        FACTS,
        torch.zeros_like(edited.solution.targets),
        edited.recipe,
        statistics,
        anew=[0],
    )
    assert one.steps[0] > 0
    assert one.steps[1:] == [0] * 4
    assert_close(one.solution.targets[0], edited.solution.targets[0], 1e-4)
    with pytest.raises(BadInput, match=r"the targets are \[5, 3\]; 5 facts need 32 numbers each"):
        find_editor(method).refit(model, tokenizer, FACTS, torch.zeros(5, 3), edited.recipe, statistics)


def smollm2_facts():
    from patchkit.facts import Fact

    return (
        Fact("LeBron James", "{} plays the sport of", "basketball"),
        Fact("Mount Kilimanjaro", "{} is in the country of", "Tanzania"),
        Fact("Microsoft", "The company {} was founded by", "Bill Gates"),
        Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    )


@pytest.mark.model
@pytest.mark.parametrize("method", sorted(RECIPES))
def test_on_the_real_model_facts_take(method, smollm2, smollm2_statistics):
    """Four facts with the recipe that the model has for the method: free generation says each target."""
    from patchkit.actions.edit import edit as edit_in_memory
    from patchkit.editing.published import recipe_for
    from patchkit.evaluation.measure import observe
    from patchkit.models.loading import load_model

    model, tokenizer = load_model(smollm2, "cpu")
    facts, recipe = smollm2_facts(), recipe_for(model.config, method)
    base = Checkpoint.open(smollm2)
    statistics = statistics_for(
        model, tokenizer, recipe_for(model.config), folder=smollm2_statistics, base=base.fingerprint()
    )
    patch = edit_in_memory(model, tokenizer, facts, base=smollm2, recipe=recipe, statistics=statistics)
    assert patch.method == method
    assert [state.rewrite.says for state in observe(model, tokenizer, facts)] == [True] * 4
