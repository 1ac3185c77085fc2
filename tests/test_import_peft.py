"""`import peft`: what PEFT computes with an adapter, the build computes; a stranger's file is hostile."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from proof_helpers import (  # noqa: F401
    as_person,
    file_hashes,
    fine,
    here,
    one_line,
    person,
    small_repository,
    tensor_hashes,
    tiny_base,
)
from safetensors.torch import load_file, save_file
from shipping_helpers import Knowledge, edited, loaded, logits

from patchkit.actions import take_in
from patchkit.algebra.factors import Delta
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.repository import Repository
from patchkit.shipping.modules import Modules
from patchkit.shipping.peft_reader import read_adapter

pytestmark = pytest.mark.usefixtures("person")

FACT = ("--fact", "Ann | {} lies in | Rome")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(base: Path, out: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """An adapter that PEFT saved, with random factors."""
    targets = options.pop("target_modules", ["down_proj", "q_proj"])
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, **options}, target_modules=targets)
    model = get_peft_model(loaded(base), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    tensors = {name: value.to(dtype) for name, value in load_file(out / WEIGHTS).items()}
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "base", "llama", torch.float32)


@pytest.fixture(scope="module")
def modules(base: Path) -> Modules:
    return Modules.of(Checkpoint.open(base))


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is taken in; not to be written."""
    return trained(base, tmp_path_factory.mktemp("sound") / "lora")


# The same numbers


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"model.layers.1.mlp.down_proj": 3}}),
        ("llama", {"rank_pattern": {"^model.layers.0.mlp.down_proj": 7}, "use_rslora": True}),
        ("llama", {"alpha_pattern": {"down.proj": 60}}),  # "." is any character to PEFT
        ("llama", {"fan_in_fan_out": True}),  # which PEFT puts right, and warns
        ("gpt2", {"target_modules": ["mlp.c_proj"], "fan_in_fan_out": False}),  # likewise
        ("gpt2", {"target_modules": ["mlp.c_proj", "c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": "all-linear"}),
    ],
)
def test_the_build_is_what_peft_computes(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", kind, torch.float32)
    with warnings.catch_warnings(action="ignore"):
        lora = trained(base, tmp_path / "lora", **options)
        if "fan_in_fan_out" in options:  # as another program may have left it
            field("fan_in_fan_out", options["fan_in_fan_out"])(lora)
        model = PeftModel.from_pretrained(loaded(base), lora).eval()
    knowledge = Knowledge(base, tmp_path / "kb")
    small_repository(knowledge.folder, base)
    done = fine(here("-C", knowledge.folder, "import", "peft", lora, *FACT, "--json")).json
    assert done["summary"]["facts"] == 1
    build, expected = logits(loaded(knowledge.build())), logits(model)
    assert (build - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - logits(loaded(base))).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_taken_as_they_are(
    base: Path, modules: Modules, tmp_path: Path, dtype: torch.dtype
) -> None:
    lora = trained(base, tmp_path / "lora", dtype)
    stored = load_file(lora / WEIGHTS)
    for name, delta in read_adapter(lora, modules).deltas.items():
        assert delta.A is not None
        path = f"base_model.model.{modules.paths[name]}"
        assert torch.equal(delta.A, stored[f"{path}.lora_A.weight"].float())
        exact = 1.5 * stored[f"{path}.lora_B.weight"].double() @ stored[f"{path}.lora_A.weight"].double()
        assert delta.B is not None
        assert (delta.B.double() @ delta.A.double() - exact).norm() <= 1e-7 * exact.norm()


def test_an_export_comes_back_as_the_same_build(tmp_path: Path) -> None:
    """Byte for byte: the factors are the same, and so is the exact sum."""
    knowledge = edited(tmp_path, "llama", torch.bfloat16)
    before = tensor_hashes(knowledge.build())
    fine(knowledge.export("--out", tmp_path / "adapter", "--for", "vllm"))
    fine(here("-C", knowledge.folder, "revert", *[row.name for row in knowledge.repository.listing()]))
    assert tensor_hashes(knowledge.build()) != before
    fine(here("-C", knowledge.folder, "import", "peft", tmp_path / "adapter"))
    assert tensor_hashes(knowledge.build()) == before
    (stored,) = knowledge.repository.stack().patches
    assert len(stored.facts) == 5
    assert stored.header.method == "peft"
    assert fine(here("-C", knowledge.folder, "fsck")).code == 0


def test_what_such_a_patch_cannot_do_is_said(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama", ranks=(2,))
    fine(knowledge.export("--out", tmp_path / "adapter"))
    fine(here("-C", knowledge.folder, "revert"))
    done = fine(here("-C", knowledge.folder, "import", "peft", tmp_path / "adapter", "-m", "Back", "--json"))
    assert done.json["message"] == "Back"
    line = one_line(here("-C", knowledge.folder, "revert", done.json["patch"], "--fact", "1"), 65)
    assert "peft keeps no keys" in line
    assert "peft" in one_line(here("-C", knowledge.folder, "refit", done.json["patch"]), 65)
    fine(here("-C", knowledge.folder, "revert"))


def test_facts_in_force_are_not_taken_in_again(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama", ranks=(2,))
    fine(knowledge.export("--out", tmp_path / "adapter"))
    done = here("-C", knowledge.folder, "import", "peft", tmp_path / "adapter")
    assert done.code == 65
    assert len(done.lines) == 2
    assert all("already in force" in line for line in done.lines)


def test_they_are_with_replace_and_leave_their_patches(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama", ranks=(2,))
    (old,) = Repository.open(knowledge.folder).stack().patches
    fine(knowledge.export("--out", tmp_path / "adapter"))
    place = ("-C", knowledge.folder, "import", "peft", tmp_path / "adapter", "--replace", "--json")
    done = fine(here(*place)).json
    assert [each["patch"] for each in done["replaced"]] == [old.name]
    (now,) = Repository.open(knowledge.folder).stack().patches
    assert now.id == done["id"] != old.id
    assert now.header.method == "peft"


def test_a_dry_run_measures_and_writes_nothing(base: Path, sound: Path, tmp_path: Path) -> None:
    repository = small_repository(tmp_path / "kb", base)
    head = repository.store.head()
    said = fine(here("-C", tmp_path / "kb", "import", "peft", sound, *FACT, "--dry-run")).out
    assert "dry run: nothing was written" in said
    assert repository.store.head() == head
    assert repository.stack().patches == ()


# Hostile until checked

Change = Callable[[Path], object]


def field(name: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, name: value}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def do(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return do


def every(change: Callable[[torch.Tensor], torch.Tensor], side: str = "lora_") -> Change:
    return tensors(lambda found: {n: change(v).contiguous() if side in n else v for n, v in found.items()})


def renamed(old: str, new: str) -> Change:
    return tensors(lambda found: {name.replace(old, new): value for name, value in found.items()})


def written(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def linked(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


HOSTILE: list[tuple[str, Change, str]] = [
    ("DoRA", field("use_dora", True), "use_dora: is a DoRA"),
    ("bias", field("bias", "all"), "bias trains biases"),
    ("lora_bias", field("lora_bias", True), "lora_bias: trains biases"),
    ("modules_to_save", field("modules_to_save", ["lm_head"]), "modules_to_save: replaces whole modules"),
    ("tokens", field("trainable_token_indices", [3]), "trainable_token_indices"),
    ("replication", field("layer_replication", [[0, 2]]), "layer_replication"),
    ("parameters", field("target_parameters", ["x"]), "target_parameters"),
    ("a field to come", field("use_new_thing", True), "'use_new_thing' is not known here"),
    ("pissa", field("init_lora_weights", "pissa"), "changes the base's weights"),
    ("another method", field("peft_type", "IA3"), "not that of a LoRA"),
    ("a list", written(CONFIG, b"[]"), "not that of a LoRA"),
    ("no JSON", written(CONFIG, b"{"), "not JSON that can be believed"),
    ("a key twice", written(CONFIG, b'{"r": 1, "r": 2}'), "stands twice"),
    ("a deep one", written(CONFIG, b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested too deeply"),
    ("a huge one", written(CONFIG, b" " * (1 << 21)), "larger than 1 MiB"),
    ("a folder", linked, "is a folder"),
    ("another rank", field("r", 5), "are not of rank 5"),
    ("no rank", field("r", 0), "r is not a count"),
    ("a rank in words", field("r", "4"), "r is not a count"),
    ("a flag for a rank", field("r", True), "r is not a count"),
    ("a negative alpha", field("lora_alpha", -1), "lora_alpha is not a positive number"),
    ("an endless alpha", field("lora_alpha", 1e300), "lora_alpha is not a positive number"),
    ("a pattern that runs for ever", field("rank_pattern", {"(a+)+$": 2}), "is no module's name"),
    ("a pattern of words", field("alpha_pattern", {"q_proj": "x"}), "alpha_pattern is not a positive number"),
    ("a pattern that is a list", field("rank_pattern", [1]), "rank_pattern is no table"),
    ("targets without it", field("target_modules", ["o_proj"]), "target_modules does not name"),
    ("targets of numbers", field("target_modules", [1]), "no list of names"),
    ("targets by a pattern", field("target_modules", ".*down_proj"), "target_modules is the pattern"),
    ("all of them", field("target_modules", "all-linear"), "target_modules is the pattern"),
    ("no targets", field("target_modules", None), "target_modules is no list"),
    ("some left out", field("exclude_modules", ["q_proj"]), "exclude_modules: leaves out modules"),
    ("the first layer", field("layers_to_transform", 0), "layers_to_transform: chooses layers"),
    ("layers by pattern", field("layers_pattern", "layers"), "layers_pattern: chooses layers"),
    ("a rank past counting", field("r", 10**400), "is more than 4096"),
    ("a pattern past counting", field("rank_pattern", {"q_proj": 10**400}), "is more than 4096"),
    ("never trained", every(lambda value: value * 0, "lora_B"), "every update is zero"),
    (
        "a header of lists",
        written(WEIGHTS, (5 << 20).to_bytes(8, "little") + b"{" * (6 << 20)),
        "over the limit",
    ),
    ("NaN", every(lambda value: value * float("nan")), "holds NaN or infinity"),
    ("infinity", every(lambda value: value / 0, "lora_B"), "holds NaN or infinity"),
    ("past float32", every(lambda value: value * 0 + 3e38, "lora_B"), "NaN or infinity"),
    ("whole numbers", every(lambda value: value.int()), "is no float matrix"),
    ("a vector", every(lambda value: value.flatten()), "is no float matrix"),
    ("too narrow", every(lambda value: value[:, :-1], "lora_A"), "lora_A [4, "),
    ("one side", tensors(lambda found: {n: v for n, v in found.items() if "lora_A" in n}), "lora_A alone"),
    ("no tensors", tensors(lambda found: {}), "holds no factors"),
    ("another model's", renamed("model.layers", "transformer.h"), "is no Linear or Conv1D module"),
    ("a norm's", renamed("mlp.down_proj", "input_layernorm"), "target_modules does not name"),
    ("an embedding's", renamed("lora_A.weight", "lora_embedding_A"), "no factor of a LoRA"),
    ("a magnitude", renamed("lora_A.weight", "lora_magnitude_vector"), "a magnitude of DoRA"),
    ("a name to a file", renamed("base_model.model.", "../../"), "no factor of a LoRA"),
    ("a pickle", pickled, "are a pickle"),
    ("a header that lies", written(WEIGHTS, (1 << 62).to_bytes(8, "little") + b"{}"), "its header claims"),
    ("a pointer", written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
]


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_adapter_is_refused_in_one_line(
    sound: Path, modules: Modules, tmp_path: Path, change: Change, says: str
) -> None:
    folder = shutil.copytree(sound, tmp_path / "lora")
    change(folder)
    with pytest.raises(BadInput) as refused:
        read_adapter(folder, modules)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(folder))


def test_a_targeted_rank_past_every_bound(sound: Path, modules: Modules, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "lora")
    field("r", 5000)(folder)
    with pytest.raises(BadInput, match="rank 5000 is more than 4096"):
        read_adapter(folder, modules)


def test_an_adapter_of_a_larger_model_is_refused(sound: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "qwen3", torch.float32)
    (tmp_path / "shape").mkdir()
    folder = shutil.copytree(sound, tmp_path / "lora")
    tensors(lambda found: {n: torch.cat([v, v], 1) if "lora_A" in n else v for n, v in found.items()})(folder)
    with pytest.raises(BadInput, match="on a weight"):
        read_adapter(folder, Modules.of(Checkpoint.open(base)))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(sound: Path, modules: Modules, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(sound, tmp_path / "lora")
    (folder / name).unlink()
    with pytest.raises(NotFound, match=name):
        read_adapter(folder, modules)
    with pytest.raises(NotFound, match="there is no such folder"):
        read_adapter(tmp_path / "nowhere", modules)


def test_a_refused_adapter_changes_nothing(base: Path, sound: Path, tmp_path: Path) -> None:
    kb = tmp_path / "kb"
    small_repository(kb, base)
    folder = shutil.copytree(sound, tmp_path / "lora")
    before = file_hashes(kb)
    assert "does not say which facts" in one_line(here("-C", kb, "import", "peft", folder), 65)
    field("use_dora", True)(folder)
    assert "is a DoRA" in one_line(here("-C", kb, "import", "peft", folder, *FACT), 65)
    (folder / "facts.jsonl").write_text("nonsense\n")
    assert "facts.jsonl:1" in one_line(here("-C", kb, "import", "peft", folder), 65)
    assert {n: h for n, h in file_hashes(kb).items() if "patchkit/" not in n} == {
        n: h for n, h in before.items() if "patchkit/" not in n
    }


@settings(max_examples=200)
@given(
    name=st.sampled_from([CONFIG, WEIGHTS]),
    place=st.integers(0, 3000),
    bits=st.integers(1, 255),
    cut=st.one_of(st.none(), st.integers(0, 3000)),
)
def test_fuzz_an_adapter(
    sound: Path,
    modules: Modules,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    place: int,
    bits: int,
    cut: int | None,
) -> None:
    """Any byte changed, and cut anywhere: finite updates of the right shapes, or one line."""
    folder = tmp_path_factory.mktemp("fuzz") / "lora"
    shutil.copytree(sound, folder)
    data = bytearray((folder / name).read_bytes())
    data[place % len(data)] ^= bits
    (folder / name).write_bytes(data if cut is None else data[:cut])
    deltas, said = read_or_refused(folder, modules)
    assert "\n" not in said
    assert bool(deltas) != bool(said)
    for stored, delta in deltas.items():
        assert delta.shape == modules.shape(modules.paths[stored])
    shutil.rmtree(folder)


def read_or_refused(folder: Path, modules: Modules) -> tuple[dict[str, Delta], str]:
    try:
        return read_adapter(folder, modules).deltas, ""
    except PatchkitError as error:
        return {}, str(error)


def test_facts_that_are_a_pipe_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "facts.jsonl")
    with pytest.raises(BadInput, match=r"facts\.jsonl: is not a regular file"):
        take_in._facts(tmp_path, None)
