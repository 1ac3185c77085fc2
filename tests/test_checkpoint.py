"""Opening a base: what it is known by, how its tensors are found, and what is refused with a way out."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_helpers import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchkit.checkpoint import INDEX, SINGLE, Checkpoint, is_weights
from patchkit.errors import BadInput, NotFound, PatchkitError

TENSORS = {
    "model.embed.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "model.layers.0.w": torch.ones(2, 5, dtype=torch.bfloat16),
    "model.layers.1.w": torch.full((2, 5), -0.5, dtype=torch.float16),
    "model.empty": torch.zeros(0, 3),
    "model.steps": torch.tensor(7),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", TENSORS)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", TENSORS, shards=3)


def by_hand(tensors: dict[str, Tensor], dtypes: dict[str, str]) -> str:
    rows = [
        [
            name,
            dtypes[name],
            list(tensor.shape),
            hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for name, tensor in sorted(tensors.items())
    ]
    return "sha256:" + hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


DTYPES = {
    "model.embed.weight": "F32",
    "model.layers.0.w": "BF16",
    "model.layers.1.w": "F16",
    "model.empty": "F32",
    "model.steps": "I64",
}


def test_the_fingerprint_is_that_of_the_tensors_alone(base: Path, sharded: Path) -> None:
    expected = by_hand(TENSORS, DTYPES)
    assert Checkpoint.open(base).fingerprint() == expected
    assert Checkpoint.open(sharded).fingerprint() == expected
    (base / "tokenizer.json").write_text("another")
    save_file(TENSORS, base / SINGLE, {"format": "pt", "note": "another header"})
    assert Checkpoint.open(base).fingerprint() == expected


@pytest.mark.parametrize("change", ["a bit", "a name", "a shape", "a dtype", "a tensor less"])
def test_the_fingerprint_sees_every_change(base: Path, change: str) -> None:
    before = Checkpoint.open(base).fingerprint()
    tensors = dict(TENSORS)
    name = "model.layers.0.w"
    if change == "a bit":
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.int16)[1, 4] ^= 1
    elif change == "a name":
        tensors["other"] = tensors.pop(name)
    elif change == "a shape":
        tensors[name] = tensors[name].reshape(5, 2)
    elif change == "a dtype":
        tensors[name] = tensors[name].view(torch.float16)
    else:
        del tensors[name]
    save_file(tensors, base / SINGLE)
    assert Checkpoint.open(base).fingerprint() != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"])
def test_what_is_computed_is_named_by_the_files_beside_the_weights_too(base: Path, name: str) -> None:
    before = Checkpoint.open(base)
    assert before.as_read() == f"{before.fingerprint()}+{before.reading()[:16]}"
    (base / "README.md").write_text("A model.\n", encoding="utf-8")
    (base / INDEX).write_text('{"weight_map": {}}', encoding="utf-8")  # beside the one file: says nothing
    assert Checkpoint.open(base).as_read() == before.as_read()
    (base / name).write_text('{"rope_theta": 500000.0}', encoding="utf-8")
    after = Checkpoint.open(base)
    assert after.fingerprint() == before.fingerprint()
    assert after.as_read() != before.as_read()


def test_progress_ends_at_the_total(sharded: Path) -> None:
    told: list[tuple[int, int, str]] = []
    Checkpoint.open(sharded).fingerprint(lambda done, total, what: told.append((done, total, what)))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1] == (48 + 20 + 20 + 8, 48 + 20 + 20 + 8, "hashing")


def test_a_known_fingerprint_is_not_hashed_again(base: Path) -> None:
    known = Checkpoint.open(base, fingerprint="sha256:" + "0" * 64)
    assert known.fingerprint() == "sha256:" + "0" * 64
    known.hashes()  # hashed for another reason: now the truth is known
    assert known.fingerprint() == by_hand(TENSORS, DTYPES)


def test_tensors_are_read_to_the_bit(base: Path, sharded: Path) -> None:
    for folder in (base, sharded):
        checkpoint = Checkpoint.open(folder)
        for name, tensor in TENSORS.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            found += 1  # its own memory: the file must not change
    assert torch.equal(load_file(base / SINGLE)["model.steps"], torch.tensor(7))


def test_a_name_that_is_not_there(base: Path) -> None:
    with pytest.raises(NotFound, match=r"no tensor 'model\.layers\.9\.w'"):
        Checkpoint.open(base).read("model.layers.9.w")


def test_a_dtype_that_torch_has_not(base: Path) -> None:
    header = json.dumps({"c": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (base / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BadInput, match="C64"):
        Checkpoint.open(base).read("c")


def test_a_file_that_shrinks_after_opening(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    os.truncate(base / SINGLE, 8)
    for call in (checkpoint.hashes, lambda: checkpoint.read("model.steps")):
        with pytest.raises(BadInput, match="shorter than its header says"):
            call()


def test_links_into_a_hub_cache_are_followed(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert Checkpoint.open(snapshot).fingerprint() == by_hand(TENSORS, DTYPES)


@pytest.mark.parametrize(
    ("stored", "parameter"),
    [
        ("h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"),
        ("transformer.h.0.mlp.c_proj.weight", "h.0.mlp.c_proj.weight"),
        ("model.layers.4.mlp.down_proj.weight", "model.layers.4.mlp.down_proj.weight"),
        ("language_model.model.layers.4.w", "model.language_model.layers.4.w"),
        ("model.layers.4.w", "layers.4.w"),
    ],
)
def test_stored_names_differ_from_parameters_by_known_prefixes(
    tmp_path: Path, stored: str, parameter: str
) -> None:
    folder = write_checkpoint(tmp_path / "base", {stored: torch.ones(1), "x.layers.4.w": torch.ones(1)})
    assert Checkpoint.open(folder).stored_name(parameter) == stored


def test_a_parameter_without_one_stored_name(tmp_path: Path) -> None:
    tensors = {"model.layers.4.w": torch.ones(1), "transformer.layers.4.w": torch.ones(1)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "base", tensors))
    with pytest.raises(NotFound, match="several tensors for 'layers"):
        checkpoint.stored_name("layers.4.w")
    with pytest.raises(NotFound, match="no tensor for 'layers"):
        checkpoint.stored_name("layers.5.w")


def test_the_single_file_goes_before_an_index(base: Path, sharded: Path) -> None:
    """As transformers has it: what it would load is what is edited."""
    other = {**TENSORS, "model.steps": torch.tensor(8)}
    save_file(other, sharded / SINGLE)
    assert Checkpoint.open(sharded).fingerprint() == by_hand(other, DTYPES)
    assert set(Checkpoint.open(sharded).files) == {SINGLE}


def refused(folder: Path, error: type[PatchkitError], reason: str) -> None:
    with pytest.raises(error, match=reason) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def test_no_folder(tmp_path: Path, base: Path) -> None:
    refused(tmp_path / "absent", NotFound, "no such checkpoint folder")
    refused(base / "config.json", NotFound, "no such checkpoint folder")


def test_no_weights(base: Path) -> None:
    (base / SINGLE).unlink()
    refused(base, BadInput, "holds no model.safetensors")


@pytest.mark.parametrize("name", ["model.gguf", "consolidated.00.pth", "other.safetensors"])
def test_weights_in_another_form(base: Path, name: str) -> None:
    (base / SINGLE).rename(base / name)
    refused(base, BadInput, f"not in safetensors.*{name}.*save_pretrained|{name}.*load it")
    assert is_weights(name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles(base: Path, name: str) -> None:
    """The line is the command to type."""
    (base / SINGLE).rename(base / name)
    refused(base, BadInput, f"pickles.*run patchkit init {shlex.quote(str(base))} --convert")


def test_no_config(base: Path) -> None:
    (base / "config.json").unlink()
    refused(base, BadInput, "holds no config.json")
    for text in ("{", "[]", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (base / "config.json").write_text(text, encoding="latin-1")
        refused(base, BadInput, "is not")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"bits": 4}}},
        {"compression_config": {"format": "pack"}},
    ],
)
def test_quantised_by_config(base: Path, config: dict[str, Any]) -> None:
    (base / "config.json").write_text(json.dumps(config))
    refused(base, BadInput, "is quantised.*bfloat16 checkpoint as the base")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_quantised_by_dtype(base: Path, dtype: str) -> None:
    size = 8 if dtype == "F4" else 16
    header = json.dumps({"w": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}}).encode()
    (base / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    refused(base, BadInput, f"is quantised.*{dtype}")


def test_an_unset_quantisation_is_none(base: Path) -> None:
    (base / "config.json").write_text('{"quantization_config": null}')
    assert Checkpoint.open(base).tensors


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "model.bin",
     3, None, ".hidden.safetensors", "x\x00.safetensors", "\x1b[2J.safetensors"],
)  # fmt: skip
def test_an_index_that_leads_elsewhere(sharded: Path, file: Any) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(b"")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.steps": file}}))
    refused(sharded, BadInput, "not beside it")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"a":1,"a":2}']
)
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, BadInput, r"index\.json: ")


def test_shards_that_do_not_agree_with_their_index(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, second, _ = sorted(set(index["weight_map"].values()))
    moved = dict(index["weight_map"], **{"model.embed.weight": second})
    (sharded / INDEX).write_text(json.dumps({"weight_map": moved}))
    refused(sharded, BadInput, "'model.embed.weight' is not in")
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / second).rename(sharded / "elsewhere")
    refused(sharded, NotFound, second)
    shutil.copy(sharded / first, sharded / second)
    refused(sharded, BadInput, "keep one")


def test_an_empty_file(base: Path) -> None:
    save_file({}, base / SINGLE)
    refused(base, BadInput, "holds no tensors")
    (base / SINGLE).write_bytes(b"")
    refused(base, BadInput, "too short")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["single", "sharded"]),
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=3)), max_size=3),
    st.integers(0, 30),
)
def test_fuzz_folders(
    tmp_path: Path, which: str, number: int, changes: list[tuple[int, bytes]], cut: int
) -> None:
    """Any bytes in any file: opened, or refused in one line; whatever opens can be hashed and read."""
    folder = tmp_path / which
    if not folder.exists():
        write_checkpoint(folder, TENSORS, 1 if which == "single" else 3)
    path = sorted(folder.iterdir())[number % len(list(folder.iterdir()))]
    before = path.read_bytes()
    data = bytearray(before)
    for place, piece in changes:
        place %= len(data)
        data[place : place + len(piece)] = piece
    path.write_bytes(data[: len(data) - cut])
    problem = ""
    try:
        checkpoint = Checkpoint.open(folder)
        checkpoint.fingerprint()
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except PatchkitError as error:
        problem = str(error)
    finally:
        path.write_bytes(before)
    assert problem.isprintable()
