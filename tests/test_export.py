"""`export peft`: what PEFT makes of the adapter is the build, and what cannot be shipped is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from proof_helpers import (  # noqa: F401
    environment,
    file_hashes,
    fine,
    fresh,
    here,
    one_line,
    person,
    saved,
    tiny_base,
)
from safetensors.torch import load_file
from shipping_helpers import Knowledge, edited, loaded, logits, with_adapter

from patchkit.algebra.factors import Delta, Patch
from patchkit.canonical import hash_file
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput
from patchkit.facts import Fact, read_facts
from patchkit.models.anatomy import anatomy_of
from patchkit.models.names import StoredNames
from patchkit.shipping.lowrank import factorise
from patchkit.shipping.vllm import RANKS, rank_for_vllm

pytestmark = pytest.mark.usefixtures("person")

KINDS = ("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt", "llava")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Knowledge:
    """Read only."""
    from proof_helpers import as_person

    with as_person():
        return edited(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


def config_of(adapter: Path) -> dict[str, object]:
    return json.loads((adapter / "adapter_config.json").read_text())


# The same numbers


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_in_peft_is_the_build(kind: str, tmp_path: Path) -> None:
    """float32: logits to 1e-5 of the build's, and far from the base's."""
    knowledge = edited(tmp_path, kind)
    fine(knowledge.export("--out", tmp_path / "adapter"))
    build, base = logits(loaded(knowledge.build())), logits(loaded(knowledge.base))
    shipped = logits(with_adapter(knowledge.base, tmp_path / "adapter"))
    assert (shipped - build).norm() <= 1e-5 * build.norm()
    assert (build - base).norm() > 1e-2 * base.norm()
    assert torch.equal(logits(loaded(knowledge.base)), base)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_in_bfloat16_it_is_the_build_up_to_the_builds_one_rounding(kind: str, tmp_path: Path) -> None:
    """PEFT adds the adapter to the weights in float32; rounded, they are the build's or its neighbours."""
    knowledge = edited(tmp_path, kind, torch.bfloat16)
    fine(knowledge.export("--out", tmp_path / "adapter"))
    merged = with_adapter(knowledge.base, tmp_path / "adapter").merge_and_unload().state_dict()
    build = loaded(knowledge.build()).state_dict()
    changed = [
        name for name, weight in loaded(knowledge.base).state_dict().items() if not weight.equal(build[name])
    ]
    assert len(changed) == 3
    for name in changed:
        unit = torch.exp2(torch.floor(torch.log2(build[name].abs().clamp_min(2.0**-120))) - 7)
        assert ((merged[name] - build[name]).abs() <= 0.5 * unit * (1 + 2.0**-14)).all()
        assert merged[name].bfloat16().equal(build[name].bfloat16()) or (
            (merged[name].bfloat16() != build[name].bfloat16()).float().mean() < 1e-3
        )
    distance = (
        logits(with_adapter(knowledge.base, tmp_path / "adapter")) - logits(loaded(knowledge.build()))
    ).norm()
    assert distance < 0.05 * (logits(loaded(knowledge.build())) - logits(loaded(knowledge.base))).norm()


def test_the_configuration_leaves_runtimes_nothing_to_scale_differently(
    llama: Knowledge, tmp_path: Path
) -> None:
    fine(llama.export("--out", tmp_path / "adapter"))
    config = config_of(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["target_modules"] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    assert config["base_model_name_or_path"] is None  # a folder of this machine is no name for others
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in tensors.values()} == {(5, 64), (32, 5)}  # layer 0 padded from 3
    first = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert not first[3:].any()
    assert first[:3].any(dim=1).all()


def test_conv1d_modules_are_named_whole(tmp_path: Path) -> None:
    """GPT-2's attention has a c_proj too, of another shape."""
    knowledge = edited(tmp_path, "gpt2")
    fine(knowledge.export("--out", tmp_path / "adapter"))
    config = config_of(tmp_path / "adapter")
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == [f"transformer.h.{layer}.mlp.c_proj" for layer in range(3)]
    adapted = {
        name.rpartition(".lora_A")[0]
        for name, _ in with_adapter(knowledge.base, tmp_path / "adapter").named_modules()
        if name.endswith("lora_A.default")
    }
    assert adapted == {f"base_model.model.{path}" for path in config["target_modules"]}


def test_one_patch_of_two(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama")
    (first,) = [row.name for row in knowledge.repository.listing() if row.name.startswith("person-0")]
    done = fine(knowledge.export("person-0-0", "--out", tmp_path / "adapter", "--json")).json
    assert done["patches"] == [first]
    assert (done["facts"], done["rank"]) == (3, 3)
    fine(here("-C", knowledge.folder, "revert", "person-1-0"))
    build = logits(loaded(knowledge.build()))
    assert (logits(with_adapter(knowledge.base, tmp_path / "adapter")) - build).norm() <= 1e-5 * build.norm()
    facts = read_facts(tmp_path / "adapter" / "facts.jsonl").facts
    assert [fact.subject for fact in facts] == ["Person 0-0", "Person 0-1", "Person 0-2"]


def test_the_same_patches_give_the_same_bytes_in_every_process(llama: Knowledge, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        out = tmp_path / seed
        fine(fresh("-C", llama.folder, "export", "peft", "--out", out, env=environment(PYTHONHASHSEED=seed)))
    assert file_hashes(tmp_path / "1") == file_hashes(tmp_path / "2")


# Dense updates and smaller ranks


def dense_patch(base: Path) -> Patch:
    """An update of full rank, stored multiplied out, with singular values 1, 1/2, 1/4, …"""
    model = loaded(base)
    anatomy, checkpoint = anatomy_of(model), Checkpoint.open(base)
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(anatomy.d_model, anatomy.d_model, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(anatomy.d_ff, anatomy.d_model, generator=generator).double()).Q
    values = 0.5 ** torch.arange(anatomy.d_model).double()
    dense = (left * values @ right.T).float()
    name = StoredNames(model, checkpoint).of(anatomy.weights[1])
    facts = (Fact("Person 9-0", "{} plays the sport of", "chess"),)
    deltas = {name: Delta(dense=dense, transposed=anatomy.transposed)}
    return Patch(facts, deltas, checkpoint.fingerprint(), "made", {})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dense_update_becomes_factors(kind: str, tmp_path: Path) -> None:
    knowledge = edited(tmp_path, kind, ranks=(2,))
    fine(here("-C", knowledge.folder, "apply", saved(dense_patch(knowledge.base), tmp_path / "made")))
    done = fine(knowledge.export("--out", tmp_path / "adapter", "--json")).json
    (row,) = [row for row in done["weights"] if ".1." in row["weight"]]
    assert row["error"] < 1e-6
    build = logits(loaded(knowledge.build()))
    assert (logits(with_adapter(knowledge.base, tmp_path / "adapter")) - build).norm() <= 1e-5 * build.norm()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_smaller_rank_has_the_least_error_and_says_it(rank: int, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    update = dense_patch(base).deltas
    (name,) = update
    (pair,) = factorise({name: [update[name]]}, rank).values()
    exact = update[name].dense
    assert exact is not None
    left = torch.linalg.norm(exact.double() - pair.B.double() @ pair.A.double()) / pair.norm
    expected = (0.25**rank / (1 / 0.75) / 0.75) ** 0.5  # of σ = 1, 1/2, 1/4, …: √(Σ left-out σ² / Σ σ²)
    assert pair.rank == rank
    assert pair.error == pytest.approx(expected, rel=1e-3)
    assert float(left) == pytest.approx(pair.error, rel=1e-3)


def test_updates_that_cancel_are_a_term_of_zeros() -> None:
    generator = torch.Generator().manual_seed(1)
    B, A = torch.randn(6, 2, generator=generator), torch.randn(2, 9, generator=generator)
    (pair,) = factorise({"w": [Delta(B, A), Delta(-B, A)]}, 1).values()
    assert (pair.rank, pair.norm < 1e-12, pair.error) == (1, True, 0.0)
    assert not (pair.B @ pair.A).any()
    assert pair.shape == (6, 9)


def test_more_terms_than_a_weight_has_ranks_cost_nothing(tmp_path: Path) -> None:
    """Forty terms in a weight of rank 32."""
    knowledge = edited(tmp_path, "llama", ranks=(20, 20), size=0.02)
    done = fine(knowledge.export("--out", tmp_path / "adapter", "--json")).json
    assert done["rank"] == 32
    assert max(row["error"] for row in done["weights"]) < 1e-12
    build = logits(loaded(knowledge.build()))
    assert (logits(with_adapter(knowledge.base, tmp_path / "adapter")) - build).norm() <= 1e-5 * build.norm()


def test_max_rank_tells_the_cost_by_weight_and_by_fact(llama: Knowledge, tmp_path: Path) -> None:
    done = fine(llama.export("--out", tmp_path / "adapter", "--max-rank", 2, "--json")).json
    assert done["rank"] == 2
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    repository = llama.repository
    for row in done["weights"]:
        exact = sum(
            patch.deltas[row["weight"]].B.double() @ patch.deltas[row["weight"]].A.double()
            for patch in repository.patches().values()
            if row["weight"] in patch.deltas
        )
        A, B = (tensors[f"base_model.model.{row['module']}.lora_{side}.weight"].double() for side in "AB")
        assert row["error"] == pytest.approx(float((exact - B @ A).norm() / exact.norm()), rel=1e-5)
        assert row["error"] > 0.1
    assert len(done["probed"]) == done["facts"] == 5
    for one in done["probed"]:
        assert one["shipped"]["rewrite"]["target"] != one["build"]["rewrite"]["target"]
    text = fine(llama.export("--out", tmp_path / "again", "--max-rank", 2)).out
    assert "P adapter" in text
    assert f"{100 * done['weights'][0]['error']:.2g} %" in text


def test_a_rank_that_is_enough_costs_nothing_and_asks_nothing(llama: Knowledge, tmp_path: Path) -> None:
    done = fine(llama.export("--out", tmp_path / "adapter", "--max-rank", 5, "--json")).json
    assert [row["error"] for row in done["weights"]] == [0.0, 0.0, 0.0]
    assert done["probed"] is None


# vLLM


@pytest.mark.parametrize(("rank", "accepted"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_next_rank_that_vllm_accepts(rank: int, accepted: int) -> None:
    assert rank_for_vllm(rank) == accepted
    assert accepted in RANKS


def test_past_the_largest_rank_the_line_says_what_to_do() -> None:
    with pytest.raises(BadInput, match="--max-rank 512"):
        rank_for_vllm(513)


def test_for_vllm_is_padded_and_still_the_build(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "qwen2")
    fine(knowledge.export("--out", tmp_path / "adapter", "--for", "vllm"))
    config = config_of(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 8
    build = logits(loaded(knowledge.build()))
    assert (logits(with_adapter(knowledge.base, tmp_path / "adapter")) - build).norm() <= 1e-5 * build.norm()


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llava"])
def test_what_vllm_would_ignore_is_refused(kind: str, tmp_path: Path) -> None:
    knowledge = edited(tmp_path, kind)
    line = one_line(knowledge.export("--out", tmp_path / "adapter", "--for", "vllm"), 65)
    assert "vLLM lists no LoRA for" in line
    assert not (tmp_path / "adapter").exists()


# Refusals


def test_a_weight_that_peft_cannot_target_is_named(tmp_path: Path) -> None:
    """A position embedding is a matrix too, and no module that LoRA is for."""
    knowledge = edited(tmp_path, "gpt2", ranks=(2,))
    checkpoint = Checkpoint.open(knowledge.base)
    shape = checkpoint.tensors["transformer.wpe.weight"][1].shape
    delta = Delta(0.1 * torch.ones(shape[0], 1), torch.ones(1, shape[1]))
    patch = Patch(
        (Fact("Ann", "{} lies in", "Rome"),),
        {"transformer.wpe.weight": delta},
        checkpoint.fingerprint(),
        "made",
        {},
    )
    fine(here("-C", knowledge.folder, "apply", saved(patch, tmp_path / "made")))
    line = one_line(knowledge.export("--out", tmp_path / "adapter"), 65)
    assert "transformer.wpe.weight" in line
    assert "patchkit build" in line
    assert not (tmp_path / "adapter").exists()
    fine(knowledge.export("person-0-0", "--out", tmp_path / "adapter"))


@pytest.mark.parametrize("make", ["file", "folder", "empty", "dangling"])
def test_nothing_is_written_over(llama: Knowledge, tmp_path: Path, make: str) -> None:
    out = tmp_path / "out"
    if make == "file":
        out.write_text("years")
    elif make == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if make == "folder":
            (out / "thesis.txt").write_text("years")
    before = (os.lstat(out).st_ino, file_hashes(tmp_path))
    assert "is there already" in one_line(llama.export("--out", out), 73)
    assert (os.lstat(out).st_ino, file_hashes(tmp_path)) == before


def test_a_dry_run_writes_nothing(llama: Knowledge, tmp_path: Path) -> None:
    said = fine(llama.export("--out", tmp_path / "new" / "adapter", "--dry-run")).out
    assert "would write 2 patches, 5 facts, rank 5 in 3 modules" in said
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_no_folder(llama: Knowledge, tmp_path: Path) -> None:
    """Ended at each of the writes in turn, the adapter is there whole or not at all."""
    script = (
        "import os, sys\n"
        "from patchkit import files\n"
        "from patchkit.commands import main\n"
        "left = int(sys.argv[1])\n"
        "real = files.sync\n"
        "def sync(handle):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os._exit(9)\n"
        "    real(handle)\n"
        "files.sync = sync\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    out = tmp_path / "adapter"
    whole = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "facts.jsonl",
        "patchkit-export.json",
    }
    outcomes = []
    for count in (0, 3, 6, 99):
        words = ["-C", llama.folder, "export", "peft", "--out", out]
        command = [sys.executable, "-c", script, str(count), *map(str, words)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == (0 if count == 99 else 9), done.stderr
        outcomes.append(out.exists())
        assert not out.exists() or {path.name for path in out.iterdir()} == whole
    assert outcomes == [False, False, False, True]


def test_no_patch_and_an_unknown_one(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama", ranks=(1,))
    assert "no such patch is in force" in one_line(knowledge.export("nobody", "--out", tmp_path / "a"), 66)
    fine(here("-C", knowledge.folder, "revert"))
    assert "nothing to ship" in one_line(knowledge.export("--out", tmp_path / "a"), 66)
    fine(knowledge.export("--out", tmp_path / "a", "--rev", "HEAD~1"))
    assert hash_file(tmp_path / "a" / "facts.jsonl")
