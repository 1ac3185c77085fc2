"""On a CUDA device: the CPU's targets and update, one synchronisation a step, backing off for real."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from patchkit.editing import targets
from patchkit.editing.memit import Memit
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import statistics_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPE = Recipe(layers=(1, 2), lambda_=5.0, learning_rate=0.1, steps=6, contexts=2, statistics_tokens=600)


def edited_on(device, kind, dtype=torch.float64, **options):
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer()
    statistics = statistics_for(model, tokenizer, RECIPE)
    statistics.layers = {layer: C.to(device) for layer, C in statistics.layers.items()}
    return Memit().edit(model.to(device), tokenizer, tiny_models.FACTS, RECIPE, statistics, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_cuda_gives_the_cpus_numbers(kind):
    here, there = edited_on("cpu", kind), edited_on("cuda", kind)
    assert here.steps == there.steps
    z = here.solution.targets
    assert (there.solution.targets - z).norm() < 1e-5 * z.norm()
    for name, delta in here.deltas.items():
        wanted = delta.B @ delta.A
        found = there.deltas[name].B @ there.deltas[name].A
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_twice_the_same_bits_on_cuda():
    first, second = (edited_on("cuda", "llama", torch.float32) for _ in range(2))
    assert torch.equal(first.solution.targets, second.solution.targets)
    assert all(torch.equal(first.deltas[n].A, second.deltas[n].A) for n in first.deltas)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_does_not_make_the_host_wait(kind, monkeypatch):
    """CUDA itself reports every synchronisation inside the evaluation of a step."""
    evaluate = targets._evaluate

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return evaluate(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(targets, "_evaluate", watched)
    edited_on("cuda", kind, torch.float32)


def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    optimise, sizes = targets._optimise, []

    def small(model, anatomy, rewriting, *args):
        sizes.append(len(rewriting))
        if len(rewriting) > 2:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return optimise(model, anatomy, rewriting, *args)

    whole = edited_on("cuda", "llama")
    monkeypatch.setattr(targets, "_optimise", small)
    parts = edited_on("cuda", "llama", batch_size=5)
    assert sizes == [5, 2, 2, 1]
    assert torch.allclose(parts.solution.targets, whole.solution.targets, rtol=1e-5)
