"""MEMIT whole: ΔW equals the literal float64 writing of the paper, and the model keeps every bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference_memit as reference
import tiny_models
import torch
from proof_helpers import OWN, records_folder

from patchkit.algebra.factors import Patch
from patchkit.checkpoint import Checkpoint
from patchkit.editing import memit
from patchkit.editing.curvature import whitening
from patchkit.editing.editor import Edited, editor_names, find_editor
from patchkit.editing.memit import Memit
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import statistics_for
from patchkit.editing.templates import rewriting_passages, write_templates
from patchkit.errors import BadInput, Unavailable
from patchkit.facts import Fact
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import float32_compute, frozen, load_model, pick_device, put_weights

FACTS = tiny_models.FACTS
BASE = "sha256:" + 64 * "0"
RECIPE = Recipe(
    layers=(0, 1, 2),
    lambda_=5.0,
    learning_rate=0.1,
    steps=6,
    contexts=3,
    statistics_tokens=600,
    statistics_length=32,
)


def edit(kind, dtype=torch.float32, *, words="bpe", facts=FACTS, recipe=RECIPE, **options):
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer(words)
    statistics = statistics_for(model, tokenizer, recipe)
    return model, tokenizer, statistics, Memit().edit(model, tokenizer, facts, recipe, statistics, **options)


def oracle_deltas(model, tokenizer, edited: Edited, statistics, facts=FACTS):
    """The dense float64 updates for the targets that the engine found."""
    z = edited.solution.targets.double()
    recipe = edited.recipe
    return reference.spread(
        model, tokenizer, anatomy_of(model), facts, z, recipe, recipe.templates, statistics.layers
    )


def assert_deltas(edited, wanted, tolerance):
    assert list(edited.deltas) == list(wanted)
    for name, delta in edited.deltas.items():
        found = delta.B.double() @ delta.A.double()
        assert (found - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("words", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_update_is_the_papers(kind, words):
    model, tokenizer, statistics, edited = edit(kind, torch.float64, words=words)
    assert_deltas(edited, oracle_deltas(model, tokenizer, edited, statistics), 1e-6)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
def test_a_shrunk_c_is_solved_with(shrinkage):
    recipe = RECIPE.override(shrinkage=shrinkage)
    model, tokenizer, statistics, edited = edit("llama", torch.float64, recipe=recipe)
    assert_deltas(edited, oracle_deltas(model, tokenizer, edited, statistics), 2e-6)
    plain = edit("llama", torch.float64)[3]
    assert torch.equal(plain.solution.targets, edited.solution.targets), "targets do not depend on it"
    assert all((plain.deltas[n].A - d.A).norm() > 0.01 * d.A.norm() for n, d in edited.deltas.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_context_weight_each_contexts_key_is_solved_for(kind):
    recipe = RECIPE.override(context_weight=1.0)
    model, tokenizer, statistics, edited = edit(kind, torch.float64, recipe=recipe)
    templates, anatomy = edited.recipe.templates, anatomy_of(model)
    solve = reference.memit_of_all_contexts(model, tokenizer, anatomy, FACTS, templates)
    wanted = reference.spread(
        *(model, tokenizer, anatomy, FACTS, edited.solution.targets.double(), edited.recipe),
        *(templates, statistics.layers),
        solve=solve,
    )
    assert_deltas(edited, wanted, 2e-6)
    plain = edit(kind, torch.float64)[3]
    assert torch.equal(plain.solution.targets, edited.solution.targets), "targets do not depend on it"
    first = next(iter(plain.deltas))
    assert torch.equal(plain.solution.keys[first], edited.solution.keys[first]), "nor do the lowest keys"
    assert all((plain.deltas[n].A - d.A).norm() > 0.01 * d.A.norm() for n, d in edited.deltas.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bases_in_any_precision_are_solved_as_their_exact_float64_selves(kind, dtype):
    """A half-precision base is computed with in float32: the oracle's update on the same numbers."""
    _, tokenizer, statistics, edited = edit(kind, dtype)
    exact = tiny_models.tiny_model(kind, dtype).double()
    assert_deltas(edited, oracle_deltas(exact, tokenizer, edited, statistics), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_keeps_every_bit_mode_and_gradient(kind, dtype):
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer()
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    Memit().edit(model, tokenizer, FACTS[:2], RECIPE)
    for name, parameter in model.named_parameters():
        kept, wanted = before[name]
        assert parameter.dtype == dtype
        assert torch.equal(parameter, kept), name
        assert parameter.requires_grad == wanted
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_keeps_every_bit_when_the_edit_fails(monkeypatch):
    model, tokenizer = tiny_models.tiny_model("llama", torch.bfloat16), tiny_models.tiny_tokenizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    real, calls = memit.solve_keys, []

    def fail_at_the_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(memit, "solve_keys", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        Memit().edit(model, tokenizer, FACTS, RECIPE)
    assert len(calls) == 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_edit_moves_the_hidden_states_to_their_targets():
    """With λ small the sum of the layers' updates carries the bare prompts' states most of the way to z."""
    model, tokenizer, _, edited = edit("llama", recipe=RECIPE.override(**{"lambda": 1e-3}))
    anatomy = anatomy_of(model)
    templates = ["{}"]

    def states():
        block = anatomy.blocks[2]
        rows = [reference.read(model, tokenizer, block, f, templates, inputs=False)[0] for f in FACTS]
        return torch.stack(rows)

    before = (edited.solution.targets - states()).norm()
    with torch.no_grad():
        for name, delta in edited.deltas.items():
            model.get_parameter(name).add_(delta.B @ delta.A)
    assert (edited.solution.targets - states()).norm() < 0.5 * before


def test_conv1d_factors_are_given_as_linear_ones_and_flagged():
    _, _, _, edited = edit("gpt2", facts=FACTS[:2])
    anatomy = anatomy_of(tiny_models.tiny_model("gpt2"))
    for delta in edited.deltas.values():
        assert delta.transposed
        assert delta.shape == (anatomy.d_model, anatomy.d_ff)
        assert delta.rank == 2


def test_twice_gives_the_same_patch():
    ids = []
    for _ in range(2):
        _, _, _, edited = edit("llama")
        patch = Patch(FACTS, edited.deltas, BASE, "memit", edited.recipe.to_dict(), (), edited.solution)
        ids.append(patch.id)
    assert ids[0] == ids[1]


def test_another_process_and_hash_seed_gives_the_same_patch():
    code = (
        "import test_memit as t; e = t.edit('gpt2', facts=t.FACTS[:2])[3];"
        "print(t.Patch(t.FACTS[:2], e.deltas, t.BASE, 'memit', e.recipe.to_dict(), (), e.solution).id)"
    )
    here = Path(__file__).parent
    found = set()
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": f"{here}:{here.parent}", "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        found.add(out.stdout.strip().splitlines()[-1])
    assert len(found) == 1


def test_the_recipe_comes_back_resolved():
    _, tokenizer, statistics, edited = edit("llama", facts=FACTS[:1])
    model = tiny_models.tiny_model("llama")
    assert edited.recipe.templates == write_templates(model, tokenizer, RECIPE)
    assert edited.recipe.statistics_digest == statistics.digest(RECIPE.layers)
    _, _, _, again = edit("llama", facts=FACTS[:1], recipe=edited.recipe)
    assert again.recipe == edited.recipe
    assert torch.equal(again.solution.targets, edited.solution.targets)


def test_a_corpus_file_is_in_the_recipe_by_name_only(tmp_path):
    corpus = tmp_path / "words.txt"
    corpus.write_text("LeBron James plays the sport of basketball.\n\nParis lies in France.\n\n" * 20)
    recipe = RECIPE.override(statistics_text=str(corpus), statistics_tokens=500)
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    statistics = statistics_for(model, tokenizer, recipe)
    statistics.layers = {layer: C + torch.eye(len(C)) for layer, C in statistics.layers.items()}
    edited = Memit().edit(model, tokenizer, FACTS[:1], recipe, statistics)
    assert edited.recipe.statistics_text == "words.txt"
    assert edited.recipe.statistics_digest == statistics.digest(recipe.layers)


def test_what_is_handed_back_is_complete():
    told = []
    _, _, _, edited = edit("llama", progress=lambda *step: told.append(step))
    anatomy = anatomy_of(tiny_models.tiny_model("llama"))
    assert set(edited.timings) == {"statistics", "text", "targets", "keys", "solve"}
    assert all(seconds >= 0 for seconds in edited.timings.values())
    assert len(edited.steps) == len(edited.losses) == len(FACTS)
    assert edited.solution.targets.shape == (len(FACTS), anatomy.d_model)
    assert set(edited.solution.keys) == set(edited.deltas) == {anatomy.weights[i] for i in RECIPE.layers}
    assert {phase for phase, _, _ in told} == {"targets", "keys", "solve"}
    assert told[-1] == ("solve", 3, 3)


def test_a_fact_out_of_the_solution_is_as_if_it_had_not_been_there():
    """The stored keys are those that were solved with: design.md's closed form agrees with solving again."""
    _, _, statistics, edited = edit("llama")
    patch = Patch(FACTS, edited.deltas, BASE, "memit", {}, (), edited.solution)
    fewer = patch.without([1, 3])
    for layer, name in zip(RECIPE.layers, edited.deltas, strict=True):
        stay = [0, 2, 4]
        keys = edited.solution.keys[name][stay]
        solved = memit.solve_keys(keys, statistics.cholesky(layer, RECIPE.lambda_))
        wanted = edited.deltas[name].B[:, stay].double() @ solved
        found = fewer.deltas[name].B.double() @ fewer.deltas[name].A.double()
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_facts_leave_a_solve_of_all_contexts_which_keeps_its_variation():
    """(λC + V + K_S K_Sᵀ)⁻¹ K_S of the facts that stay, V of the whole batch; the lowest layer by hand."""
    recipe = RECIPE.override(context_weight=1.0)
    model, tokenizer, statistics, edited = edit("llama", torch.float64, recipe=recipe)
    name, layer = next(iter(edited.deltas)), recipe.layers[0]
    down = anatomy_of(model).downs[layer]
    V = torch.zeros_like(statistics.layers[layer], dtype=torch.float64)
    for fact in FACTS:
        keys = reference.read(model, tokenizer, down, fact, edited.recipe.templates, inputs=True).double()
        share = torch.tensor([0.5] + [0.5 / (len(keys) - 1)] * (len(keys) - 1), dtype=torch.float64)
        apart = keys - share @ keys
        V += apart.T @ (share[:, None] * apart)
    stay = [0, 2, 4]
    K = edited.solution.keys[name][stay].double().T
    served = recipe.lambda_ * statistics.layers[layer].double() + V
    wanted = edited.deltas[name].B[:, stay].double() @ torch.linalg.solve(served + K @ K.T, K).T
    fewer = Patch(FACTS, edited.deltas, BASE, "memit", {}, (), edited.solution).without([1, 3])
    found = fewer.deltas[name].B.double() @ fewer.deltas[name].A.double()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_contexts_are_written_once_each_without_braces():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer("sentencepiece")
    templates = write_templates(model, tokenizer, RECIPE.override(contexts=7))
    assert templates[0] == "{}"
    assert len(templates) == len(set(templates)) > 4
    assert all(t.count("{}") == 1 and t.count("{") == 1 and t.endswith(". {}") for t in templates[1:])
    assert templates[1].startswith("The")
    assert templates != write_templates(model, tokenizer, RECIPE.override(contexts=7, context_seed=1))


@pytest.mark.parametrize("words", ["bpe", "sentencepiece"])
def test_subjects_and_targets_are_found_by_their_characters(words):
    """The subject's last token holds its last character and no earlier one does not; the target is whole."""
    tokenizer = tiny_models.tiny_tokenizer(words)
    facts = [*FACTS, Fact("Ann", "Ann and {}and Ann", "Ann"), Fact("É", "{}", "É")]
    for template in ("{}", "You see Ann. {}"):
        for fact, (passage,) in zip(facts, rewriting_passages(tokenizer, facts, (template,)), strict=True):
            text = template.replace("{}", fact.prompt.replace("{}", fact.subject))
            last = template.index("{}") + fact.prompt.index("{}") + len(fact.subject) - 1
            spans = tokenizer(f"{text} {fact.target}", return_offsets_mapping=True)["offset_mapping"]
            start, end = spans[passage.subject]
            assert start <= last < end
            assert passage.subject + 1 == len(spans) or spans[passage.subject + 1][1] > last + 1
            assert spans[passage.target - 1][1] <= len(text) < spans[passage.target][1]
            if "É" not in fact.target:  # which the second tokenizer does not know
                assert tokenizer.decode(passage.labels).strip() == fact.target


def test_facts_that_cannot_be_tokenised_are_refused_by_name():
    tokenizer = tiny_models.tiny_tokenizer()
    with pytest.raises(BadInput, match=r"fact 'LeBron James': \d+ tokens, but the model reads 5; shorten"):
        rewriting_passages(tokenizer, FACTS, ("{}",), 5)

    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="Slow is a slow tokenizer"):
        rewriting_passages(Slow(), FACTS, ("{}",))
    model = tiny_models.tiny_model("llama")
    with pytest.raises(BadInput, match="there are no facts"):
        Memit().edit(model, tokenizer, [], RECIPE)
    with pytest.raises(BadInput, match="layer 7 is not in this model"):
        Memit().edit(model, tokenizer, FACTS, RECIPE.override(layers=(2, 7)))
    narrow = statistics_for(model, tokenizer, RECIPE.override(layers=(0, 1)))
    with pytest.raises(BadInput, match="layer 2: no statistics"):
        Memit().edit(model, tokenizer, FACTS, RECIPE, narrow)


def test_editors_are_found_by_name(monkeypatch):
    assert find_editor("memit").name == "memit"
    assert "memit" in editor_names()
    with pytest.raises(
        BadInput,
        match="'nemit' is not an editor; there are alphaedit, emmet, encore, ft, memit, mend, rome, ultra",
    ):
        find_editor("nemit")
    from patchkit.editing import editor

    monkeypatch.setitem(editor._OWN, "gone", "patchkit.editing.gone:Gone")
    with pytest.raises(Unavailable, match="editor 'gone' cannot be loaded"):
        find_editor("gone")


def test_models_are_loaded_whole_or_refused(tmp_path):
    model, tokenizer = tiny_models.tiny_model("llama", torch.bfloat16), tiny_models.tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = load_model(tmp_path, "cpu")
    assert loaded.dtype == torch.float32
    assert words("Paris") == tokenizer("Paris")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for (name, wide), stored in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(wide, stored.float()), name
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(BadInput, match=r"lacks model\.layers\.4"):
        load_model(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="transformers cannot load it") as caught:
        load_model(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def test_stored_weights_are_put_in_exactly(tmp_path):
    from patchkit.checkpoint import Checkpoint

    model = tiny_models.tiny_model("gpt2", torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    loaded, _ = load_model(tmp_path, "cpu")
    name = checkpoint.stored_name("transformer.h.1.mlp.c_proj.weight")
    changed = checkpoint.read(name) * 2
    put_weights(loaded, {name: changed}, checkpoint)
    assert torch.equal(loaded.get_parameter("transformer.h.1.mlp.c_proj.weight"), changed.float())
    with pytest.raises(BadInput, match="shape"):
        put_weights(loaded, {name: changed[:-1]}, checkpoint)
    with pytest.raises(BadInput, match="nowhere: the loaded model has no such weight"):
        put_weights(loaded, {"nowhere": changed}, checkpoint)


def test_devices_are_picked_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    with pytest.raises(BadInput, match="'gpu' is not a device"):
        pick_device("gpu")
    with pytest.raises(Unavailable, match="cuda is not there"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(Unavailable, match="cuda:2 is not there"):
        pick_device("cuda:2")


def test_lent_precision_is_given_back_when_something_fails():
    model = tiny_models.tiny_model("llama", torch.float16)
    before = [p.data_ptr() for p in model.parameters()]

    def fail():
        with float32_compute(model), frozen(model):
            assert all(p.dtype == torch.float32 for p in model.parameters())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert [p.data_ptr() for p in model.parameters()] == before
    assert all(p.dtype == torch.float16 for p in model.parameters())


def eight_facts():
    """Eight of CounterFact-R and their right objects, or the tests' own where the records are not here."""
    if (path := records_folder() / "counterfact-r.jsonl").exists():
        lines = path.read_text(encoding="utf-8").splitlines()[:8]
        requests = [json.loads(line)["requested_rewrite"] for line in lines]
        facts = [Fact(r["subject"], r["prompt"], r["target_new"]["str"]) for r in requests]
        return facts, [r["target_true"]["str"] for r in requests]
    return [Fact(*told[:3]) for told in OWN[:8]], [told[3] for told in OWN[:8]]


def mean_nll(model, tokenizer, fact, target):
    text = fact.prompt.replace("{}", fact.subject)
    ids, _, start = reference.tokens_of(tokenizer, f"{text} {target}", 0, len(text))
    with torch.no_grad():
        log_p = reference.logits_of(model, ids).log_softmax(-1)
    return float(-log_p[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).mean())


@pytest.mark.model
def test_on_the_real_model_facts_take_and_z_is_the_sequential_references(smollm2, smollm2_statistics):
    """Eight CounterFact-R facts; CPU seconds a fact of both, engine and reference, are printed (-s).

    In float64: in float32 twenty steps of constant length amplify roundings to a tenth of z and more.
    """
    from patchkit.editing.published import recipe_for

    facts, true = eight_facts()
    model, tokenizer = load_model(smollm2, "cpu")
    recipe = recipe_for(model.config)
    base = Checkpoint.open(smollm2).fingerprint()
    statistics = statistics_for(model, tokenizer, recipe, folder=smollm2_statistics, base=base)
    model = model.double()
    begun = time.process_time()
    edited = Memit().edit(model, tokenizer, facts, recipe, statistics)
    seconds = (time.process_time() - begun) / len(facts)
    T = whitening(statistics.curvature[recipe.layers[-1]], recipe.curvature).to(model.dtype)
    begun = time.process_time()
    compared = 2
    for fact, z in zip(facts[:compared], edited.solution.targets, strict=False):
        with frozen(model):
            wanted, _, _ = reference.find_target(
                model, tokenizer, anatomy_of(model).blocks, fact, recipe, edited.recipe.templates, T
            )
        assert (z - wanted).norm() < 1e-6 * wanted.norm()
    sequential = (time.process_time() - begun) / compared
    print(f"\n{seconds:.2f} CPU s a fact, reference {sequential:.2f}: {sequential / seconds:.1f} times")
    assert sequential > 2 * seconds
    with torch.no_grad():
        for name, delta in edited.deltas.items():
            model.get_parameter(name).add_(delta.B @ delta.A)
    taken = [
        mean_nll(model, tokenizer, fact, fact.target) < mean_nll(model, tokenizer, fact, old)
        for fact, old in zip(facts, true, strict=True)
    ]
    assert all(taken)
