"""The Python interface: `patchkit.Repository`, `patchkit.edit`, and that they agree with the commands."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import LEBRON, Cli, cli, facts_file, git_environment, home, knowledge, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkit
from patchkit import Fact, Patch, PatchkitError, Repository
from patchkit.actions.gates import check_gate
from patchkit.actions.given import as_batch
from patchkit.algebra.rounding import materialise
from patchkit.editing.recipe import Recipe
from patchkit.errors import BadInput
from patchkit.facts import FactsError, read_facts

in_memory = import_module("patchkit.actions.edit")

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = {"subject": "Ann", "prompt": "{} plays the sport of", "target": "football"}
DUTCH = {"subject": "Dutch", "prompt": "{} lies in", "target": "France"}


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Statistics go to a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    return home / "cache"


def loaded(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.nn.Module, object]:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(tiny_base())


def test_the_public_names_are_lazy() -> None:
    code = (
        "import sys, patchkit; assert 'torch' not in sys.modules and 'git' not in sys.modules; "
        "patchkit.Fact, patchkit.PatchkitError, patchkit.Repository; assert 'torch' not in sys.modules; "
        "print(sorted(patchkit.__all__), set(patchkit.__all__) <= set(dir(patchkit)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['Fact', 'Patch', 'PatchkitError', 'Repository', 'edit'] True\n"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        patchkit.nonsense  # noqa: B018


def test_init_commit_load_revert_build(home: Path) -> None:
    repository = Repository.init(tiny_base(), home / "new")
    options = {"overrides": {"layers": [0], "lambda": 3.0, "steps": 2, "contexts": 0}}
    done = repository.commit([ANN], **options)
    assert done.commit == repository.history()[0].id
    model, tokenizer = repository.load()
    base, _ = repository.load("HEAD~1")
    name = next(iter(done.patch.deltas))
    assert not torch.equal(model.get_parameter(name), base.get_parameter(name))
    built = repository.build(home / "built")
    assert built is not None
    again = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32)
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key)), key
    assert tokenizer("Ann")["input_ids"]
    reverted = repository.revert(done.patch.name)
    assert reverted.removed == (done.patch.name,)
    assert repository.stack().patches == ()
    assert Repository.init(tiny_base(), home / "new").settings == repository.settings


@pytest.mark.parametrize("kind", ["file", "facts", "mappings", "batch"])
def test_facts_in_every_form_give_the_same_patch(knowledge: Path, home: Path, kind: str) -> None:
    path = facts_file(home, ANN, DUTCH)
    facts = {
        "file": path,
        "facts": [Fact(**ANN), Fact(**DUTCH)],
        "mappings": [ANN, DUTCH],
        "batch": read_facts(path),
    }[kind]
    done = Repository.open(knowledge).commit(facts, dry_run=True, overrides={"steps": 1})
    assert [fact.to_line() for fact in done.patch.facts] == [json.dumps(ANN), json.dumps(DUTCH)]
    assert done.patch.name.startswith("ann-")
    assert done.commit is None


def test_bad_facts_are_told_with_their_places(knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    with pytest.raises(FactsError) as caught:
        repository.commit([{"subject": "Ann"}, ANN, {**DUTCH, "target": 3}, {**LEBRON, "x": object()}, 7])
    assert {fault.line for fault in caught.value.faults} == {1, 3, 4, 5}
    with pytest.raises(FactsError, match="already in force"):
        repository.commit([LEBRON])
    assert issubclass(FactsError, PatchkitError)


def test_edit_in_memory_gives_the_id_that_commit_gives(cli: Cli, knowledge: Path, home: Path) -> None:
    repository = Repository.open(knowledge)
    repository.revert("lebron-james", "microsoft")
    committed = repository.commit([ANN, DUTCH]).patch
    model, tokenizer = loaded(torch.float32)
    patch = patchkit.edit(model, tokenizer, [ANN, DUTCH], recipe=repository.recipe())
    assert isinstance(patch, Patch)
    assert patch.files() == committed.files()
    assert patch.id == committed.id == hashlib.sha256(patch.files()["delta.safetensors"]).hexdigest()
    patch.save(home / patch.name)
    repository.revert()
    assert "took in" in cli.ok("-C", knowledge, "apply", home / patch.name).out


def test_edit_leaves_the_weights_of_a_build(knowledge: Path, home: Path) -> None:
    """In the base's own dtype: to the bit."""
    repository = Repository.open(knowledge)
    repository.revert("lebron-james", "microsoft")
    model, tokenizer = loaded()
    before = {name: value.clone() for name, value in model.named_parameters()}
    patch = patchkit.edit(model, tokenizer, [ANN], recipe=repository.recipe(), base=tiny_base())
    patch.save(home / patch.name)
    repository.apply(home / patch.name)
    built = repository.build(home / "built")
    assert built is not None
    wanted = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted.get_parameter(name)), name
        assert torch.equal(parameter, before[name]) == (name not in patch.deltas)
    assert model.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_edit_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done: list[str] = []

    def overflows_the_second_time(weight: torch.Tensor, deltas: Any, name: str) -> torch.Tensor:
        if done:
            raise BadInput(f"{name}: would overflow its dtype")
        done.append(name)
        return materialise(weight, deltas, name)

    monkeypatch.setattr(in_memory, "materialise", overflows_the_second_time)
    with pytest.raises(BadInput, match="overflow"):
        patchkit.edit(model, tokenizer, [ANN])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_what_is_no_list_of_facts_is_one_line_and_one_fact_is_a_list() -> None:
    assert as_batch(Fact("Ann", "{} plays", "chess")) == as_batch([Fact("Ann", "{} plays", "chess")])
    plain = {"subject": "Ann", "prompt": "{} plays", "target": "chess"}
    assert as_batch(plain) == as_batch([plain])
    with pytest.raises(BadInput, match="NoneType: is no facts"):
        as_batch(None)  # type: ignore[arg-type]


def test_a_gate_that_is_none_is_refused_before_the_edit() -> None:
    with pytest.raises(BadInput, match="gate eficacy: there are efficacy"):
        check_gate({"eficacy": 0.9}, as_batch([Fact("Ann", "{} plays", "chess")]))


def test_edit_keeps_statistics_and_uses_the_bases_own_recipe(cache: Path) -> None:
    model, tokenizer = loaded(torch.float32)
    patch = patchkit.edit(model, tokenizer, [ANN])
    assert patch.recipe["layers"] == [1, 2]
    assert patch.recipe["guess"] is True
    assert len(patch.recipe["templates"]) > 1
    assert list(cache.rglob("*.safetensors"))
    again, _ = loaded(torch.float32)
    assert patchkit.edit(again, tokenizer, [ANN]).id == patch.id


def test_edit_of_rounded_weights_keeps_its_statistics_apart(cache: Path, home: Path) -> None:
    """A float32 checkpoint that is loaded in bfloat16 is another model: C of one does not serve the other."""
    model, tokenizer = loaded(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-9)
    model.save_pretrained(home / "fine")
    tokenizer.save_pretrained(home / "fine")

    def edited(dtype: torch.dtype) -> str:
        again = AutoModelForCausalLM.from_pretrained(home / "fine", dtype=dtype)
        return patchkit.edit(again, tokenizer, [ANN]).recipe["statistics_digest"]

    rounded, exact = edited(torch.bfloat16), edited(torch.float32)
    assert rounded != exact
    shutil.rmtree(cache)
    assert edited(torch.float32) == exact
    assert edited(torch.bfloat16) == rounded


def test_edit_refuses_a_model_that_is_not_its_checkpoint_any_more(cache: Path) -> None:
    """Or what is kept for the base would be of what was edited into it."""
    model, tokenizer = loaded(torch.float32)
    patch = patchkit.edit(model, tokenizer, [ANN])
    kept = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    edited = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BadInput, match=rf"^{next(iter(patch.deltas))}: the model has another weight than"):
        patchkit.edit(model, tokenizer, [DUTCH])
    assert {path: path.read_bytes() for path in cache.rglob("*.safetensors")} == kept
    assert all(value.equal(edited[name]) for name, value in model.state_dict().items())


def test_edit_measures_a_model_in_training_as_it_is_without(cache: Path) -> None:
    model, tokenizer = loaded(torch.float32)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    patch = patchkit.edit(model, tokenizer, [ANN])
    assert model.training
    again, _ = loaded(torch.float32)
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    assert patchkit.edit(again, tokenizer, [ANN]).id == patch.id


def test_edit_of_a_model_that_came_from_nowhere() -> None:
    model, tokenizer = loaded()
    model.name_or_path = ""
    with pytest.raises(BadInput, match="base=FOLDER"):
        patchkit.edit(model, tokenizer, [ANN])


def test_edit_refuses_bad_facts_and_leaves_the_model_alone() -> None:
    model, tokenizer = loaded()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FactsError):
        patchkit.edit(model, tokenizer, [ANN, ANN])
    recipe = Recipe(layers=(40,), lambda_=1.0)
    with pytest.raises(BadInput, match="layer"):
        patchkit.edit(model, tokenizer, [ANN], recipe=recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_looking(knowledge: Path) -> None:
    repository = Repository.open(knowledge / "patches")
    assert [row.facts for row in repository.listing()] == [1, 1]
    assert repository.status().patches == 2
    assert repository.show("lebron-james").facts[0].target == "football"
    assert [len(commit.added) for commit in repository.history()] == [1, 1]
    assert len(repository.history(limit=1)) == 1
    assert repository.diff().added[0][0].subject == "Microsoft"
    assert repository.search("lebron")[0]["target"] == "football"
    assert repository.ask(["Rome lies in"], new_tokens=2, top=1)[0].prompt == "Rome lies in"
    assert repository.fsck() == []
    assert repository.reindex()["facts"] == 2
    assert repository.problems() == []
