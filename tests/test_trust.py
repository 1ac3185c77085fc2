"""What comes with a checkpoint or an unpacked repository is read, and none of it is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from command_helpers import save_checkpoint
from git_helpers import git, git_environment, make_store  # noqa: F401

from patchkit.errors import BadInput
from patchkit.models.loading import load_model


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    """Neither alone nor beside safetensors, and by no fallback of the libraries."""
    base = save_checkpoint(tiny_models.tiny_model("llama"), tmp_path / "base")
    torch.save({"weight": _Trap(tmp_path / "ran")}, base / "pytorch_model.bin")
    load_model(base, "cpu")
    (base / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        load_model(base, "cpu")
    assert not (tmp_path / "ran").exists()


def test_code_that_a_checkpoint_brings_is_not_run(tmp_path: Path) -> None:
    base = save_checkpoint(tiny_models.tiny_model("llama"), tmp_path / "base")
    (base / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "theirs", "auto_map": names}))
    with pytest.raises(BadInput, match="transformers cannot load it"):
        load_model(base, "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("git_environment")
def test_a_program_that_the_configuration_names_for_watching_is_not_run(tmp_path: Path) -> None:
    store = make_store(tmp_path / "knowledge")
    program = tmp_path / "watch"
    program.write_text(f"#!/bin/sh\nmkdir {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    git(store.root, "config", "core.fsmonitor", str(program))
    list(store.status())
    assert not (tmp_path / "ran").exists()
    git(store.root, "status")
    assert (tmp_path / "ran").exists()  # what plain Git does
