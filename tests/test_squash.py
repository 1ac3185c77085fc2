"""`stack squash` and `apply --scale` in a repository: bytes of builds, history, what can still leave."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import Cli, cli, facts_file, git, git_environment, home, knowledge, snapshot
from safetensors.torch import load_file

from patchkit.algebra.factors import Patch
from patchkit.algebra.parts import joined, parts_of
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput
from patchkit.facts import dump_facts, read_facts
from patchkit.repository import Repository
from patchkit.stack import find_patch

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = "Ann | {} lies in | Rome"
LEBRON, MICROSOFT = "lebron-james-da1d451a", "microsoft-f3ee615e"


def build(cli: Cli, out: Path) -> bytes:
    cli.ok("build", "--out", out, "-q")
    return (out / "model.safetensors").read_bytes()


def names(knowledge: Path) -> list[str]:
    return sorted(path.name for path in (knowledge / "patches").iterdir() if path.is_dir())


def test_a_squash_leaves_every_byte_of_the_build(cli: Cli, knowledge: Path, home: Path) -> None:
    before = build(cli, home / "one")
    repository = Repository.open(knowledge)
    old = [repository.patch(name) for name in (LEBRON, MICROSOFT)]
    done = cli.ok("stack", "squash", "microsoft", "lebron-james")
    assert "the same bytes: 2048 entries compared" in done.out
    assert build(cli, home / "two") == before
    (name,) = names(knowledge)
    facts = dump_facts([*old[0].facts, *old[1].facts])
    assert name == f"lebron-james-{hash_bytes(facts)[:8]}"
    assert (knowledge / "patches" / name / "facts.jsonl").read_bytes() == facts
    trailers = git(knowledge, "log", "-1", "--format=%(trailers:only,unfold)").splitlines()
    assert [f"Patchkit-Squashes: {patch.id}" for patch in old] == trailers[-2:]
    assert git(knowledge, "status", "--porcelain") == ""
    assert not repository.problems()
    assert "2" in cli.ok("stack").out
    assert "squash" in cli.ok("show").out


def test_a_fact_leaves_the_squash_as_it_leaves_its_patch(cli: Cli, knowledge: Path, home: Path) -> None:
    """Three facts in two patches: to take one out before or after the squash is one and the same build."""
    cli.ok("commit", "--fact", ANN, "--fact", "Japan | {} lies in | Paris", "--set", "steps=2", "-q")
    git(knowledge, "branch", "apart")
    cli.ok("stack", "squash", "ann", "microsoft", "-q")
    whole = Repository.open(knowledge).patch("microsoft")
    assert [fact.subject for fact in whole.facts] == ["Microsoft", "Ann", "Japan"]
    cli.ok("revert", "microsoft", "--fact", "2", "-q")
    build(cli, home / "joined")
    git(knowledge, "switch", "-q", "apart")
    cli.ok("revert", "ann", "--fact", "1", "-q")
    build(cli, home / "apart")
    one, other = (load_file(home / at / "model.safetensors") for at in ("joined", "apart"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_taking_the_squash_back_takes_its_parts_back(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("stack", "squash", "lebron-james", "microsoft", "-q")
    git(knowledge, "revert", "--no-edit", "HEAD")
    assert names(knowledge) == [LEBRON, MICROSOFT]
    assert not Repository.open(knowledge).problems()
    git(knowledge, "reset", "-q", "--hard", "HEAD~1")
    cli.ok("revert", "-q")
    assert names(knowledge) == []
    base = Repository.open(knowledge).base_folder / "model.safetensors"
    assert build(cli, home / "base") == base.read_bytes()


def test_what_was_solved_on_a_part_was_solved_on_the_squash(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "--fact", ANN, "--set", "steps=2", "-q")
    cli.ok("stack", "squash", "lebron-james", "microsoft", "-q")
    assert "ann-" in cli.ok("revert", "lebron-james", "-n").out.split("was solved on top")[0]


def test_a_squash_here_and_a_revert_of_a_part_there_is_no_clean_merge(cli: Cli, knowledge: Path) -> None:
    """Git guesses at a rename and stops; where it finds the merge clean, `test_merges.py` has it named."""
    git(knowledge, "switch", "-q", "-c", "side")
    cli.ok("revert", "lebron-james", "-q")
    git(knowledge, "switch", "-q", "main")
    cli.ok("stack", "squash", "lebron-james", "microsoft", "-q")
    git(knowledge, "merge", "-q", "--no-edit", "side", ok=False)
    assert any("is in conflict" in str(problem) for problem in Repository.open(knowledge).problems())


def test_a_squash_that_would_move_bytes_is_refused_and_told(cli: Cli, knowledge: Path, home: Path) -> None:
    """Past the break-even of 32 x 64: 21 terms. The base is in float32, where a second rounding shows."""
    prompts = ["{} lies in", "{} plays the sport of", "{} is a", "{} has a", "{} knows"]
    subjects = ["Ann", "Paris", "Japan", "Rome", "Dutch"]
    facts = [{"subject": s, "prompt": p, "target": "Rome"} for s in subjects for p in prompts]
    model = float32_base(home)
    cli.ok("init", model, home / "wide", "-q")
    at = home / "wide"
    repository = Repository.open(at)
    options: dict[str, Any] = {"layers": [0], "steps": 2, "contexts": 0, "statistics_tokens": 400}
    first = repository.commit(facts[:12], overrides=options).patch.name
    second = repository.commit(facts[12:], overrides=options).patch.name
    before = snapshot(at)
    refused = cli("-C", at, "stack", "squash", first, second)
    assert refused.code == 3
    assert "of 2048 entries differ" in refused.err
    assert snapshot(at) == before
    old = build_at(cli, at, home / "old")
    done = cli.ok("-C", at, "stack", "squash", first, second, "--inexact", "--json").json
    new = build_at(cli, at, home / "new")
    differing = sum(int((old[name] != new[name]).sum()) for name in old)
    assert 0 < differing == done["entries_that_differ"]
    apart = {name: (old[name].double() - new[name].double()).abs() for name in old}
    shares = [apart[name] / old[name].double().abs().maximum(new[name].abs()) for name in old]
    assert done["largest_difference"] == max(float(share.nan_to_num().max()) for share in shares)
    # An entry that all but cancels may differ by a large share of itself, never by more than a rounding.
    eps = torch.finfo(torch.float32).eps
    assert all(float(apart[name].max()) <= eps * float(old[name].abs().max()) for name in old)
    assert len(parts_of(repository.patch(done["patch"]))) == 2


def float32_base(home: Path) -> Path:
    from command_helpers import save_checkpoint, tiny_base
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0009765625)  # digits that bfloat16 does not have
    return save_checkpoint(model, home / "float32")


def build_at(cli: Cli, at: Path, out: Path) -> dict[str, torch.Tensor]:
    cli.ok("-C", at, "build", "--out", out, "-q")
    return load_file(out / "model.safetensors")


def test_facts_of_two_files_may_have_one_id(cli: Cli, knowledge: Path, home: Path) -> None:
    """An id names one fact of a file: joined, none of the two has it, and the patch is read again."""
    for number, subject in enumerate(("Ann", "Dutch")):
        fact = {"id": "1", "subject": subject, "prompt": "{} lies in", "target": "Rome"}
        cli.ok("commit", facts_file(home, fact, name=f"{number}.jsonl"), "--set", "steps=1", "-q")
    exported = home / "adapter"
    cli.ok("export", "peft", "ann", "dutch", "--out", exported, "-q")
    assert [fact.id for fact in read_facts(exported / "facts.jsonl").facts] == [None, None]
    done = cli.ok("stack", "squash", "ann", "dutch")
    assert "facts of several patches have the id 1: they have none now" in done.out
    facts = Repository.open(knowledge).patch("ann").facts
    assert [(fact.subject, fact.id) for fact in facts] == [("Ann", None), ("Dutch", None)]
    assert cli.ok("status").code == 0


def test_facts_that_a_patch_cannot_hold_together_are_not_squashed(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    """Of one text, and told apart by the relation that one of them names."""
    twins = {"subject": "Ann", "prompt": "{} lies in", "target": "Rome"}
    for number, fact in enumerate((twins, {**twins, "relation": "P17"})):
        cli.ok("commit", facts_file(home, fact, name=f"{number}.jsonl"), "--set", "steps=1", "-q")
    before = git(knowledge, "rev-parse", "HEAD")
    names = [row["name"] for row in cli.ok("stack", "--json").json][-2:]
    for dry in ((), ("-n",)):
        done = cli("stack", "squash", *names, *dry)
        assert (done.code, done.err.count("\n")) == (65, 1)
        assert "'Ann lies in' would be said twice" in done.err
    assert git(knowledge, "rev-parse", "HEAD") == before
    assert cli.ok("status").code == 0


def test_a_dry_run_of_a_squash_compares_and_writes_nothing(cli: Cli, knowledge: Path) -> None:
    before = snapshot(knowledge)
    said = cli.ok("stack", "squash", "lebron-james", "microsoft", "--dry-run").out
    assert f"would join {LEBRON}" in said
    assert "the same bytes" in said
    assert cli.ok("stack", "squash", "lebron-james", "microsoft", "-n", "-q").out == ""
    assert snapshot(knowledge) == before


def test_keys_that_are_missing_are_told(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "rm", "-q", f"patches/{LEBRON}/keys.safetensors")
    git(knowledge, "commit", "-q", "-m", "Ship it without")
    said = cli.ok("stack", "squash", "lebron-james", "microsoft").out
    assert f"no keys are kept, since {LEBRON} has none" in said
    done = cli("revert", "--fact", "1")
    assert done.code == 65
    assert "no single fact can be taken out" in done.err


@pytest.mark.parametrize("words", [(), ("HEAD",), ("list",), ("list", "HEAD")])
def test_the_stack_is_still_listed(cli: Cli, knowledge: Path, words: tuple[str, ...]) -> None:
    assert LEBRON in cli.ok("stack", *words).out
    assert len(cli.ok("stack", *words, "--json").json) == 2
    assert LEBRON in cli.ok("stack", *words, "-C", knowledge).out


# apply --scale


def test_a_patch_in_force_is_scaled_in_its_place(cli: Cli, knowledge: Path, home: Path) -> None:
    repository = Repository.open(knowledge)
    old, base = repository.patch("lebron-james"), load_file(repository.base_folder / "model.safetensors")
    microsoft = repository.patch("microsoft")
    said = cli.ok("apply", "lebron-james", "--scale", "0.5").out
    assert "ΔW times 0.5" in said
    assert f"{MICROSOFT} was solved on top of it" in said
    new = repository.patch("lebron-james")
    assert names(knowledge) == [LEBRON, MICROSOFT]
    assert new.id != old.id
    assert new.recipe == {**old.recipe, "scale": 0.5}
    cli.ok("build", "--out", home / "half", "-q")
    found = load_file(home / "half" / "model.safetensors")
    for name, delta in old.deltas.items():
        wanted = base[name].double() + 0.5 * delta.B.double() @ delta.A.double()
        wanted += microsoft.deltas[name].B.double() @ microsoft.deltas[name].A.double()
        assert torch.equal(found[name], wanted.to(torch.bfloat16))
    cli.ok("apply", f"patches/{LEBRON}", "--scale", "2", "-q")  # its folder in the work tree means it too
    again = repository.patch("lebron-james")
    assert again.recipe["scale"] == 1.0
    assert torch.equal(again.deltas[name].B, old.deltas[name].B)
    git(knowledge, "revert", "--no-edit", "HEAD")
    assert repository.patch("lebron-james").id == new.id


def test_a_patch_from_elsewhere_is_taken_in_scaled(cli: Cli, knowledge: Path, home: Path) -> None:
    shutil.copytree(knowledge / "patches" / MICROSOFT, home / MICROSOFT)
    repository = Repository.open(knowledge)
    plain = repository.patch("microsoft")
    cli.ok("revert", "microsoft", "-q")
    assert (
        f"took in {MICROSOFT}: 1 fact, ΔW times -1.5"
        in cli.ok("apply", home / MICROSOFT, "--scale", "-1.5").out
    )
    new = repository.patch("microsoft")
    assert torch.equal(new.deltas[next(iter(new.deltas))].B, -1.5 * plain.deltas[next(iter(new.deltas))].B)
    assert names(knowledge) == [LEBRON, MICROSOFT]
    cli.ok("revert", "microsoft", "-q")
    cli.ok("apply", home / MICROSOFT, "--scale", "1", "-q")
    assert repository.patch("microsoft").id == plain.id


def test_scaling_dry_writes_nothing(cli: Cli, knowledge: Path) -> None:
    before = snapshot(knowledge)
    found = cli.ok("apply", "lebron-james", "--scale", "0.5", "-n", "--json").json
    assert found["commit"] is None
    assert found["id"] != find_patch(Repository.open(knowledge).stack(), "lebron-james").id
    assert snapshot(knowledge) == before


def test_the_python_way(knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    wanted = joined([repository.patch(LEBRON), repository.patch(MICROSOFT)])
    assert repository.squash(LEBRON, MICROSOFT).patch.id == wanted.id


def test_a_squash_whose_parts_count_other_facts_is_not_believed(cli: Cli, knowledge: Path) -> None:
    cli.ok("stack", "squash", "lebron-james", "microsoft", "-q")
    repository = Repository.open(knowledge)
    (stored,) = repository.stack().patches
    patch = repository.patch(stored)
    first, second = patch.recipe["parts"]
    wrong = replace(patch, recipe={"parts": [{**first, "facts": 2}, second]})
    with pytest.raises(BadInput, match="its parts have 3 facts together, and it has 2"):
        Patch.from_files(wrong.files(), "patch")
    folder = knowledge / "patches" / stored.name
    for name, data in wrong.files().items():
        (folder / name).write_bytes(data)
    git(knowledge, "commit", "-q", "-a", "-m", "A lie")
    done = cli("stack")
    assert (done.code, "its parts have 3 facts together" in done.err) == (65, True)


def test_a_squash_may_have_the_name_of_one_of_its_patches(cli: Cli, knowledge: Path, home: Path) -> None:
    """Two facts in a batch, one taken out and committed again alone: together they are that batch."""
    pair = ("--fact", ANN, "--fact", "Japan | {} lies in | Paris", "--set", "steps=2", "-q")
    cli.ok("commit", *pair)
    name = find_patch(Repository.open(knowledge).stack(), "ann").name
    cli.ok("revert", "ann", "--fact", "2", "-q")
    cli.ok("commit", "--fact", "Japan | {} lies in | Paris", "--set", "steps=2", "-q")
    before = build(cli, home / "before")
    cli.ok("stack", "squash", "ann", "japan", "-q")
    assert names(knowledge) == sorted([LEBRON, MICROSOFT, name])
    assert len(Repository.open(knowledge).patch(name).facts) == 2
    assert build(cli, home / "after") == before
    assert cli.ok("fsck", "-q")
