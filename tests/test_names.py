"""A weight's stored name, where files and classes differ: other prefixes, wrapped models, older files."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from command_helpers import save_checkpoint
from safetensors.torch import load_file, save_file

from patchkit.algebra.factors import Delta, Patch
from patchkit.builds.build import build
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, NotFound
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import load_model, put_weights
from patchkit.models.names import StoredNames

# (kind, what the class says, what the file says)
RENAMED = [
    ("llama", "", ""),
    ("gpt2", "transformer.", ""),
    ("bloom", "transformer.", ""),
    ("llava", "model.language_model.", "language_model.model."),
    ("llava", "model.language_model.", "model.language_model."),
    ("mistral3", "model.language_model.", "language_model.model."),
    ("gemma3", "model.language_model.", "language_model.model."),
]


def stored_as(folder, kind, module, file):
    """A checkpoint of a tiny model whose text weights are named as ``file`` says."""
    model = tiny_models.tiny_model(kind)
    base = save_checkpoint(model, folder, save_original_format=False)
    tensors = load_file(base / "model.safetensors")
    renamed = {
        file + name.removeprefix(module) if name.startswith(module) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize(("kind", "module", "file"), RENAMED)
def test_the_stored_tensor_is_the_weight(tmp_path, kind, module, file):
    base = stored_as(tmp_path / "base", kind, module, file)
    checkpoint = Checkpoint.open(base)
    model, _ = load_model(base, "cpu")
    anatomy, names = anatomy_of(model), StoredNames(model, checkpoint)
    for layer, name in enumerate(anatomy.weights):
        stored = names.of(name)
        assert stored.startswith(file)
        assert torch.equal(checkpoint.read(stored), anatomy.weight(layer))
    with pytest.raises(NotFound):
        names.of("model.nowhere.weight")

    stored = names.of(anatomy.weights[1])
    wanted = checkpoint.read(stored) + 1
    put_weights(model, {stored: wanted}, checkpoint)
    assert torch.equal(anatomy.weight(1), wanted)
    assert torch.equal(anatomy.weight(2), checkpoint.read(names.of(anatomy.weights[2])))


def test_a_weight_that_is_built_on_loading_bars_no_other(tmp_path, monkeypatch):
    """It cannot be edited itself; the base's plainly stored ones can."""
    base = save_checkpoint(tiny_models.tiny_model("llama"), tmp_path / "base")
    checkpoint = Checkpoint.open(base)
    model, _ = load_model(base, "cpu")
    built = "model.layers.1.self_attn.q_proj.weight"
    monkeypatch.setattr(StoredNames, "_found", ({}, {built}))
    name = anatomy_of(model).weights[1]
    put_weights(model, {name: checkpoint.read(name) + 1}, checkpoint)
    assert torch.equal(anatomy_of(model).weight(1), checkpoint.read(name) + 1)
    with pytest.raises(BadInput, match=f"^{built}: the loaded model has no such weight"):
        put_weights(model, {built: checkpoint.read(built)}, checkpoint)


@pytest.mark.parametrize(("kind", "module", "file"), RENAMED)
def test_a_build_is_loaded_with_the_edit_and_a_revert_is_the_base(tmp_path, kind, module, file):
    base = stored_as(tmp_path / "base", kind, module, file)
    checkpoint = Checkpoint.open(base)
    model, _ = load_model(base, "cpu")
    anatomy = anatomy_of(model)
    stored = StoredNames(model, checkpoint).of(anatomy.weights[1])
    B, A = torch.ones(anatomy.d_model, 1), torch.ones(1, anatomy.d_ff)
    delta = Delta(B=B, A=A, transposed=anatomy.transposed)
    patch = Patch(tiny_models.FACTS[:1], {stored: delta}, checkpoint.fingerprint(), "ft", {}, (), None)
    build(checkpoint, {patch.id: patch}, tmp_path / "out")
    edited = anatomy_of(load_model(tmp_path / "out", "cpu")[0])
    assert torch.equal(edited.weight(1), anatomy.weight(1) + 1)
    assert torch.equal(edited.weight(2), anatomy.weight(2))
    build(checkpoint, {}, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
