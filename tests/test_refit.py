"""Refitting: ΔW against the literal float64 writing on the model as it is; the command; another base."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import reference_memit as reference
import torch
from command_helpers import (
    Cli,
    cli,
    git,
    git_environment,
    home,
    knowledge,
    save_checkpoint,
    snapshot,
    tiny_base,
)
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from patchkit import catalogue
from patchkit.actions import commit as committing
from patchkit.actions import refit as refitting
from patchkit.algebra.factors import Delta, Patch
from patchkit.algebra.parts import parts_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import statistics_for
from patchkit.models.anatomy import anatomy_of
from patchkit.repository import Repository
from patchkit.stack import find_patch

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = "Ann | {} lies in | Rome"


def dense(delta: Delta) -> torch.Tensor:
    if delta.dense is not None:
        return delta.dense.double()
    assert delta.B is not None
    assert delta.A is not None
    return delta.B.double() @ delta.A.double()


def model_with(base: Path, patches: list[Patch]) -> Any:
    """The base in float64 with Σ ΔW as a build rounds it: to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        for name in {name for patch in patches for name in patch.deltas}:
            weight = model.get_parameter(name)
            total = weight + sum(dense(patch.deltas[name]) for patch in patches if name in patch.deltas)
            weight.copy_(total.to(torch.bfloat16))
    return model


def oracle(base: Path, patch: Patch, under: list[Patch]) -> dict[str, torch.Tensor]:
    """Dense ΔW for the patch's targets by the paper's equations, C by the base alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    recipe = Recipe.from_dict({name: value for name, value in patch.recipe.items() if name != "scale"})
    statistics = statistics_for(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokenizer, recipe
    )
    model = model_with(base, under)
    assert patch.solution is not None
    z = patch.solution.targets.double()
    return reference.spread(
        model, tokenizer, anatomy_of(model), patch.facts, z, recipe, recipe.templates, statistics.layers
    )


def assert_is(patch: Patch, wanted: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    assert set(patch.deltas) == set(wanted)
    for name, delta in patch.deltas.items():
        assert (dense(delta) - scale * wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


@pytest.fixture
def tuned(home: Path) -> Path:
    """A successor of the base: the same shapes, every weight moved a little."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * parameter.std().nan_to_num() * noise)
    return save_checkpoint(model.to(torch.bfloat16), home / "tuned")


def test_a_patch_is_refitted_on_all_others(cli: Cli, knowledge: Path) -> None:
    """LeBron's was solved on the base alone; afterwards it stands on Microsoft's."""
    repository = Repository.open(knowledge)
    lebron, microsoft = repository.patch("lebron-james"), repository.patch("microsoft")
    done = cli.ok("refit", "lebron-james", "--json").json
    now = repository.patch("lebron-james")
    assert now.id == done["patches"][0]["id"] != lebron.id == done["patches"][0]["was"]
    assert now.solved_on == (microsoft.id,)
    assert now.facts == lebron.facts
    assert torch.equal(now.solution.targets, lebron.solution.targets)
    assert_is(now, oracle(tiny_base(), lebron, [microsoft]))
    assert done["solved_on_top"] == [find_patch(repository.stack(), "microsoft").name]


def test_all_patches_are_refitted_each_on_those_before_it(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "--fact", ANN, "-q")
    repository = Repository.open(knowledge)
    microsoft, ann = repository.patch("microsoft"), repository.patch("ann")
    cli.ok("revert", "lebron-james", "-q")
    cli.ok("refit", "-q")
    new_microsoft, new_ann = repository.patch("microsoft"), repository.patch("ann")
    assert new_microsoft.solved_on == ()
    assert new_ann.solved_on == (new_microsoft.id,)
    assert_is(new_microsoft, oracle(tiny_base(), microsoft, []))
    assert_is(new_ann, oracle(tiny_base(), ann, [new_microsoft]))
    assert git(knowledge, "rev-list", "--count", "HEAD^..HEAD") == "1"


def test_where_nothing_changed_below_nothing_is_committed(cli: Cli, knowledge: Path) -> None:
    before = snapshot(knowledge)
    done = cli.ok("refit", "microsoft")
    assert "there is nothing to commit" in done.out
    assert snapshot(knowledge) == before


def test_a_dry_run_measures_and_writes_nothing(cli: Cli, knowledge: Path) -> None:
    before = snapshot(knowledge)
    done = cli.ok("refit", "lebron-james", "--dry-run")
    assert "LeBron James → football" in done.out
    assert "dry run: nothing was written" in done.out
    assert snapshot(knowledge) == before
    assert cli.ok("refit", "lebron-james", "-n", "-q").out == ""


def test_the_folder_the_message_and_the_trailers(cli: Cli, knowledge: Path) -> None:
    before = {path.name for path in (knowledge / "patches").iterdir()}
    cli.ok("refit", "lebron-james", "-m", "Mend it", "-q")
    assert {path.name for path in (knowledge / "patches").iterdir()} == before
    new = Repository.open(knowledge).patch("lebron-james")
    said = git(knowledge, "log", "-1", "--format=%s%n%(trailers:only,unfold)").splitlines()
    assert said[0] == "Mend it"
    assert f"Patchkit-Id: {new.id}" in said
    assert any(line.startswith("Patchkit-Results: efficacy") for line in said)
    changed = git(knowledge, "show", "--name-status", "--format=").split("\n")
    assert all(line.startswith("M\tpatches/lebron-james-") for line in changed)
    assert "Mend it" in cli.ok("log").out
    assert "LeBron James" in cli.ok("show", "lebron-james").out


def test_the_catalogue_has_what_was_measured(cli: Cli, knowledge: Path) -> None:
    cli.ok("refit", "lebron-james", "-q")
    repository = Repository.open(knowledge)
    new = repository.patch("lebron-james")
    assert [row["line"] for row in repository.catalogue.results(new.id)] == [1]
    assert {"keys", "solve"} <= set(repository.catalogue.timings(new.id))


def test_a_scaled_patch_stays_scaled(cli: Cli, knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    plain = repository.patch("lebron-james")
    cli.ok("apply", "lebron-james", "--scale", "0.5", "-q")
    microsoft = repository.patch("microsoft")
    cli.ok("refit", "lebron-james", "-q")
    new = repository.patch("lebron-james")
    assert new.recipe["scale"] == 0.5
    assert_is(new, oracle(tiny_base(), plain, [microsoft]), scale=0.5)


def test_a_squash_is_refitted_part_by_part(cli: Cli, knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    lebron, microsoft = repository.patch("lebron-james"), repository.patch("microsoft")
    cli.ok("commit", "--fact", ANN, "-q")
    cli.ok("stack", "squash", "lebron-james", "microsoft", "-q")
    ann = repository.patch("ann")
    cli.ok("refit", "lebron-james", "-q")
    first, second = parts_of(repository.patch("lebron-james"))
    assert first.solved_on == (ann.id,)
    assert second.solved_on == tuple(sorted((ann.id, first.id)))
    assert_is(first, oracle(tiny_base(), lebron, [ann]))
    assert_is(second, oracle(tiny_base(), microsoft, [ann, first]))


def test_a_patch_without_keys_is_refused_by_name(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "rm", "-q", "patches/lebron-james-da1d451a/keys.safetensors")
    git(knowledge, "commit", "-q", "-m", "Ship it without")
    before = snapshot(knowledge)
    done = cli("refit")
    assert done.code == 65
    assert "lebron-james-da1d451a: its keys.safetensors was not shipped" in done.err
    assert len(done.err.splitlines()) == 1
    assert snapshot(knowledge) == before


def test_the_text_of_the_statistics_is_found_or_named(cli: Cli, knowledge: Path, home: Path) -> None:
    """A patch holds its corpus' name and no path."""
    text = home / "corpus.txt"
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstx"]
    text.write_text("\n\n".join(" ".join(words[i::7]) for i in range(7)))
    cli.ok("commit", "--fact", ANN, "--corpus", text, "--set", "steps=2", "-q")
    cli.ok("revert", "lebron-james", "-q")
    done = cli("refit", "ann")
    assert done.code == 66
    assert "corpus.txt" in done.err
    cli.ok("refit", "ann", "--corpus", text, "-q")
    assert Repository.open(knowledge).patch("ann").recipe["statistics_text"] == "corpus.txt"


def test_a_corpus_is_for_the_patches_whose_editor_reads_one(cli: Cli, knowledge: Path, home: Path) -> None:
    text = home / "corpus.txt"
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstx"]
    text.write_text("\n\n".join(" ".join(words[i::7]) for i in range(7)))
    cli.ok("commit", "--fact", ANN, "--method", "ultraedit", "-q")
    cli.ok("revert", "lebron-james", "-q")
    cli.ok("refit", "--corpus", text, "-q")
    recipe = Repository.open(knowledge).patch("microsoft").recipe
    assert recipe["statistics_text"] == "corpus.txt"
    assert "statistics_text" not in Repository.open(knowledge).patch("ann").recipe


# another base


def test_every_patch_and_the_settings_move_in_one_commit(cli: Cli, knowledge: Path, tuned: Path) -> None:
    repository = Repository.open(knowledge)
    old = {name: repository.patch(name) for name in ("lebron-james", "microsoft")}
    settings = (knowledge / "patchkit.toml").read_text().partition("[recipe]")[2]
    folders = {path.name for path in (knowledge / "patches").iterdir()}
    done = cli.ok("refit", "--base", tuned, "--json").json
    repository = Repository.open(knowledge)
    assert git(knowledge, "rev-list", "--count", "HEAD~1..HEAD") == "1"
    assert repository.settings.base_fingerprint == done["base"]["fingerprint"] != old["microsoft"].base
    assert repository.settings.base_source == "folder:tuned"
    assert repository.base_folder == tuned
    assert repository.checkpoint().folder == tuned
    assert not repository.problems()
    assert (knowledge / "patchkit.toml").read_text().partition("[recipe]")[2] == settings
    assert {path.name for path in (knowledge / "patches").iterdir()} == folders
    lebron, microsoft = repository.patch("lebron-james"), repository.patch("microsoft")
    assert lebron.base == microsoft.base == repository.settings.base_fingerprint
    assert microsoft.solved_on == (lebron.id,)
    assert_is(lebron, oracle(tuned, old["lebron-james"], []))
    assert_is(microsoft, oracle(tuned, old["microsoft"], [lebron]))
    assert torch.equal(lebron.solution.targets, old["lebron-james"].solution.targets)
    assert f"Patchkit-Base: {repository.settings.base_fingerprint}" in git(knowledge, "log", "-1")
    assert "folder:tuned" in cli.ok("status").out
    git(knowledge, "revert", "--no-edit", "HEAD")  # plain Git takes the move back as one thing
    assert Repository.open(knowledge).settings.base_fingerprint == old["microsoft"].base
    assert not Repository.open(knowledge).problems()


def test_an_undone_move_finds_the_old_base_again(
    cli: Cli, knowledge: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_SETTLED", -1.0)  # these files are new
    assert Repository.open(knowledge).checkpoint().folder == tiny_base()
    cli.ok("refit", "--base", tuned, "-q")
    assert Repository.open(knowledge).checkpoint().folder == tuned
    cli.ok("undo", "-q")
    assert Repository.open(knowledge).checkpoint().folder == tiny_base()
    cli.ok("fsck")
    cli.ok("undo", "-q")  # the undo itself
    assert Repository.open(knowledge).checkpoint().folder == tuned


def test_facts_that_do_not_take_are_listed_and_retried_alone(cli: Cli, knowledge: Path, tuned: Path) -> None:
    """Some facts of a patch take on the new base with their old targets; the others' are found again."""
    repository = Repository.open(knowledge)
    old = {name: repository.patch(name) for name in ("lebron-james", "microsoft")}
    listed = cli.ok("refit", "--base", tuned, "-n", "--json").json
    lost = {text for one in listed["patches"] for text in one["lost"]}
    assert lost
    said = cli.ok("refit", "--base", tuned, "-n").out
    assert all(f"does not take: {text}" in said for text in lost)
    done = cli.ok("refit", "--base", tuned, "--retry", "--json").json
    retried = {text for one in done["patches"] for text in one["retried"]}
    assert retried
    for name, patch in old.items():
        new = repository.patch(name)
        for place, fact in enumerate(patch.facts):
            same = torch.equal(new.solution.targets[place], patch.solution.targets[place])
            assert same == (fact.text not in retried)


def test_a_base_that_does_not_fit_is_refused(cli: Cli, knowledge: Path, home: Path) -> None:
    others = {
        "is this repository's base already": tiny_base(),
        "is a gpt2 of 4 blocks": save_checkpoint(tiny_model("gpt2", torch.bfloat16), home / "gpt2"),
    }
    wide = LlamaConfig(**{**AutoConfig.from_pretrained(tiny_base()).to_dict(), "intermediate_size": 96})
    others["down_proj.weight is [32, 96] there, the patch is for [32, 64]"] = save_checkpoint(
        LlamaForCausalLM(wide).to(torch.bfloat16), home / "wide"
    )
    before = snapshot(knowledge)
    place = git(knowledge, "config", "patchkit.base")
    for says, base in others.items():
        done = cli("refit", "--base", base)
        assert done.code == 65
        assert says in done.err
        assert len(done.err.splitlines()) == 1
    assert snapshot(knowledge) == before
    assert git(knowledge, "config", "patchkit.base") == place


def test_a_commit_that_comes_meanwhile_keeps_the_old_base(
    cli: Cli, knowledge: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be left on the old base in a tree that names the new one."""
    real = refitting.commit_move

    def late(*args: Any) -> str:
        git(knowledge, "rm", "-rq", "patches/microsoft-f3ee615e")
        git(knowledge, "commit", "-q", "-m", "Meanwhile")
        return real(*args)

    monkeypatch.setattr(refitting, "commit_move", late)
    done = cli("refit", "--base", tuned)
    assert done.code == 75
    assert git(knowledge, "log", "-1", "--format=%s") == "Meanwhile"
    assert not Repository.open(knowledge).problems()


# what a revert leaves


def test_a_revert_below_measures_and_names_the_mend(cli: Cli, knowledge: Path) -> None:
    name = find_patch(Repository.open(knowledge).stack(), "microsoft").name
    before = snapshot(knowledge)
    done = cli.ok("revert", "lebron-james", "--check", "--dry-run")
    assert "Microsoft → Rome" in done.out
    assert f"patchkit refit {name}" in done.out
    assert snapshot(knowledge) == before
    found = cli.ok("revert", "lebron-james", "--check", "--json").json
    (checked,) = found["checked"]
    assert checked["before"]["rewrite"]["target"] != checked["after"]["rewrite"]["target"]
    alone = model_with(tiny_base(), [Repository.open(knowledge).patch("microsoft")])
    tokenizer = AutoTokenizer.from_pretrained(tiny_base())
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("Microsoft lies in", "Microsoft lies in Rome"))
    with torch.no_grad():
        said = torch.log_softmax(alone(torch.tensor([whole])).logits[0], -1)
    likely = sum(float(said[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))
    assert checked["after"]["rewrite"]["target"] == pytest.approx(float(torch.tensor(likely).exp()), rel=1e-4)
    assert "nothing to measure" in cli.ok("revert", "microsoft", "--check", "-n").out


def test_no_patch_comes_back_onto_another_base(cli: Cli, knowledge: Path, tuned: Path) -> None:
    cli.ok("revert", "microsoft", "-q")
    cli.ok("refit", "--base", tuned, "-q")
    before = snapshot(knowledge)
    for revision, way in (("HEAD", "git revert"), ("HEAD~1", "git show")):
        done = cli("revert", revision)
        assert done.code == 65
        assert ("was made on the base sha256:" in done.err, way in done.err) == (True, True)
        assert snapshot(knowledge) == before
    (show,) = re.findall(r"(git show .*?) &&", " ".join(done.err.split()))
    subprocess.run(["bash", "-ec", show], cwd=knowledge, check=True, capture_output=True)
    assert "Microsoft" in (knowledge / "facts.jsonl").read_text()


def test_what_was_edited_on_the_old_base_is_not_committed_on_the_new(
    cli: Cli, knowledge: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*args: Any) -> Any:
        monkeypatch.undo()
        Repository.open(knowledge).refit(base=str(tuned))
        return record_committed(*args)

    record_committed = committing.record_committed
    monkeypatch.setattr(committing, "record_committed", meanwhile)
    done = cli("commit", "--fact", ANN)
    assert done.code == 75
    assert "this branch was moved to sha256:" in done.err
    assert "apply" not in done.err
    assert not Repository.open(knowledge).problems()
    assert git(knowledge, "status", "--porcelain") == ""


def test_only_what_can_be_refitted_is_told_to_be(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "--fact", ANN, "--method", "ft", "-q")
    ann = find_patch(Repository.open(knowledge).stack(), "ann").name
    for words in (
        ("refit", "microsoft", "-n"),
        ("revert", "microsoft", "-n"),
        ("apply", "microsoft", "--scale", "2"),
    ):
        out = " ".join(cli.ok(*words, *(["-n"] if words[0] == "apply" else [])).out.split())
        assert f"{ann} was solved on top of what" in out or f"{ann} was solved on top of it" in out
        assert f"refit {ann}" not in out
    found = cli.ok("revert", "lebron-james", "-n", "--json").json
    assert set(found["solved_on_top"]) - set(found["refittable"]) == {ann}
    assert len(found["refittable"]) == 1
