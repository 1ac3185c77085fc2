"""Causal tracing against a literal writing of it: one forward pass a number, with hooks on whole modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from patchkit.errors import BadInput
from patchkit.evaluation.tracing import (
    CLASSES,
    KINDS,
    Prompt,
    Traced,
    Tracer,
    default_window,
    deviation,
    prompt_of,
)
from patchkit.facts import Fact
from patchkit.models.anatomy import anatomy_of, attention_outputs

DEPTH = tiny_models.DEPTH
LLAMA = ("model.layers.{}", "mlp", "self_attn")
# Whole modules, but where there is none (OPT) or it adds the stream itself (Bloom, MPT).
PLACES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "gpt2": ("transformer.h.{}", "mlp", "attn"),
    "gptj": ("transformer.h.{}", "mlp", "attn"),
    "gpt_neo": ("transformer.h.{}", "mlp", "attn"),
    "gpt_neox": ("gpt_neox.layers.{}", "mlp", "attention"),
    "opt": ("model.decoder.layers.{}", "fc2", "self_attn"),
    "bloom": ("transformer.h.{}", "mlp.dense_4h_to_h", "self_attention.dense"),
    "mpt": ("transformer.blocks.{}", "ffn.down_proj", "attn"),
}
FACT = Fact("Émile Zola", "You see {} is a", "French")
SCALE, SAMPLES, SEED, WINDOW = 1.5, 2, 7, 3


def the_prompt(model: Any, fact: Fact = FACT) -> Prompt:
    """The fact's, and what the model holds most probable after it."""
    prompt = prompt_of(tiny_tokenizer(), fact, fact.target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
    return replace(prompt, object=int(logits.argmax()))


class Literal:
    """The paper's section 2, one pass after another, nothing batched, nothing kept."""

    def __init__(self, kind: str, model: Any, prompt: Prompt, scale: float = SCALE) -> None:
        block, mlp, attention = PLACES[kind]
        self.model, self.prompt = model, prompt
        names = {"hidden": block, "mlp": f"{block}.{mlp}", "attention": f"{block}.{attention}"}
        self.module = {
            (part, layer): model.get_submodule(name.format(layer))
            for part, name in names.items()
            for layer in range(DEPTH)
        }
        self.clean: dict[Any, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _m, _a, out, key=key: self.note(key, out))
            for key, module in self.module.items()
        ]
        self.p_clean = self.run()
        for handle in handles:
            handle.remove()
        width = model.get_input_embeddings()(torch.tensor([0])).shape[-1]
        generator = torch.Generator().manual_seed(SEED)
        self.noise = scale * torch.randn(SAMPLES, len(prompt.subject), width, generator=generator)
        self.p_corrupted = sum(self.restored(sample, {}) for sample in range(SAMPLES)) / SAMPLES

    def note(self, key: Any, out: Any) -> None:
        state = out[0] if isinstance(out, tuple) else out
        self.clean[key] = state.detach().clone().view(len(self.prompt.tokens), -1)

    def run(self) -> float:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([self.prompt.tokens]), use_cache=False).logits
        return float(logits[0, -1].double().softmax(-1)[self.prompt.object])

    @contextmanager
    def corrupted(self, sample: int) -> Iterator[None]:
        def add(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
            noisy = out.clone()
            for n, place in enumerate(self.prompt.subject):
                noisy[0, place] += self.noise[sample, n]
            return noisy

        handle = self.model.get_input_embeddings().register_forward_hook(add)
        yield
        handle.remove()

    def restored(self, sample: int, places: dict[tuple[str, int], list[int]]) -> float:
        """With the states of (part, layer) put back at some places."""

        def put_back(key: tuple[str, int], where: list[int]) -> Any:
            def hook(_module: Any, _args: Any, out: Any) -> Any:
                state = (out[0] if isinstance(out, tuple) else out).clone()
                flat = state.view(len(self.prompt.tokens), -1)
                flat[where] = self.clean[key][where]
                return (state, *out[1:]) if isinstance(out, tuple) else state

            return hook

        handles = [
            self.module[key].register_forward_hook(put_back(key, where)) for key, where in places.items()
        ]
        with self.corrupted(sample):
            found = self.run()
        for handle in handles:
            handle.remove()
        return found

    def window(self, part: str, layer: int) -> list[int]:
        if part == "hidden":
            return [layer]
        return [other for other in range(layer - WINDOW // 2, layer + -(-WINDOW // 2)) if 0 <= other < DEPTH]

    def effect(self, part: str, place: int, layer: int) -> float:
        """The mean over samples of P(restored) − P(corrupted)."""
        back = {(part, other): [place] for other in self.window(part, layer)}
        restored = [self.restored(sample, back) for sample in range(SAMPLES)]
        return sum(restored) / SAMPLES - self.p_corrupted


def traced(model: Any, prompt: Prompt, scale: float = SCALE, tokens: int | None = None) -> Traced:
    return Tracer(model, WINDOW, tokens).trace(prompt, scale=scale, samples=SAMPLES, seed=SEED)


@pytest.mark.parametrize("kind", PLACES)
def test_every_effect_is_that_of_one_pass_with_hooks(kind: str) -> None:
    model = tiny_model(kind)
    prompt = the_prompt(model)
    assert len(prompt.subject) > 1
    assert prompt.subject.start > 0
    literal, found = Literal(kind, model, prompt), traced(model, prompt)
    assert found.clean == pytest.approx(literal.p_clean, rel=1e-4)
    assert found.corrupted == pytest.approx(literal.p_corrupted, rel=1e-4)
    assert abs(found.total) > 1e-3, "nothing was tested"
    for part in KINDS:
        effects = found.indirect(part)
        assert effects.shape == (len(prompt.places), DEPTH)
        every = (
            1 if kind == "llama" else 3
        )  # a third of the numbers of other models, each layer's and place's
        for number in range(0, effects.numel(), every):
            row, layer = divmod(number, DEPTH)
            wanted = literal.effect(part, prompt.places[row], layer)
            assert float(effects[row, layer]) == pytest.approx(wanted, rel=1e-3, abs=2e-6), (part, row, layer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_everything_put_back_the_probability_is_the_clean_one(kind: str) -> None:
    """Put back at the last token, the last block's state alone decides."""
    model = tiny_model(kind)
    prompt = the_prompt(model)
    found = traced(model, prompt)
    assert found.total > 1e-2
    assert float(found.restored["hidden"][-1, -1]) == pytest.approx(found.clean, rel=1e-4)
    assert float(found.restored["hidden"][0, -1]) == pytest.approx(found.corrupted, rel=1e-4)
    literal = Literal(kind, model, prompt)
    everything = {(part, layer): list(prompt.places) for part in KINDS for layer in range(DEPTH)}
    assert literal.restored(0, everything) == pytest.approx(found.clean, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_without_noise_there_is_no_effect(kind: str) -> None:
    model = tiny_model(kind)
    found = traced(model, the_prompt(model), scale=0.0)
    assert found.total == pytest.approx(0, abs=1e-6)
    for part in KINDS:
        assert float(found.indirect(part).abs().max()) < 1e-5


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_how_many_run_at_once_does_not_matter(tokens: int) -> None:
    model = tiny_model("llama")
    prompt = the_prompt(model)
    wanted, found = traced(model, prompt), traced(model, prompt, tokens=tokens)
    for part in KINDS:
        assert torch.allclose(found.restored[part], wanted.restored[part], rtol=1e-4, atol=1e-7)


def test_the_noise_is_that_of_the_seed() -> None:
    model = tiny_model("llama")
    prompt = the_prompt(model)
    tracer = Tracer(model)
    one, same, other = (
        tracer.trace(prompt, scale=SCALE, samples=2, seed=seed).corrupted for seed in (1, 1, 2)
    )
    assert one == same != other


def test_the_model_is_as_it_was() -> None:
    model = tiny_model("gpt2")
    prompt = the_prompt(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced(model, prompt)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


# Where things stand


def test_places_by_class() -> None:
    fact = Fact("a b", "{}", "c")

    def classes(first: int, stop: int, length: int) -> dict[str, list[int]]:
        prompt = Prompt(fact, "c", tuple(range(length)), range(first, stop), 0)
        found = {name: list(places) for name, places in prompt.classes().items()}
        assert sorted(place for places in found.values() for place in places) == list(prompt.places), (
            "each place has one class"
        )
        return {name: places for name, places in found.items() if places}

    first, middle, last, after, further, end = CLASSES
    assert classes(1, 5, 9) == {
        first: [1],
        middle: [2, 3],
        last: [4],
        after: [5],
        further: [6, 7],
        end: [8],
    }
    assert classes(0, 1, 2) == {last: [0], end: [1]}
    assert classes(0, 2, 2) == {first: [0], last: [1]}
    assert classes(2, 4, 6) == {first: [2], last: [3], after: [4], end: [5]}


def test_a_class_is_the_mean_of_its_places() -> None:
    prompt = Prompt(Fact("a b", "{}", "c"), "c", tuple(range(7)), range(1, 5), 0)
    effects = torch.arange(12, dtype=torch.float64).view(6, 2)
    found = Traced(prompt, 0.9, 0.5, {"mlp": effects + 0.5}).by_class("mlp")
    assert found[:2].tolist() == [[0, 1], [3, 4]]  # the middle ones: rows 1 and 2
    assert found[2].tolist() == [6, 7]
    assert found[3].tolist() == [8, 9]
    assert found[4].isnan().all()
    assert found[5].tolist() == [10, 11]


@pytest.mark.parametrize("pieces", ["bpe", "sentencepiece"])
def test_the_subject_is_found_by_its_characters(pieces: str) -> None:
    tokenizer = tiny_tokenizer(pieces)
    prompt = prompt_of(tokenizer, FACT, "Dutch")
    inside = [prompt.tokens[place] for place in prompt.subject]
    assert tokenizer.decode(inside).strip() == "Émile Zola"
    assert prompt.tokens == tuple(tokenizer(FACT.text)["input_ids"])
    whole = tokenizer(f"{FACT.text} Dutch")["input_ids"]
    assert prompt.object == whole[len(prompt.tokens)]


def test_what_cannot_be_placed_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(BadInput, match=r"fact 'Émile Zola': \d+ tokens, but the model reads 3"):
        prompt_of(tokenizer, FACT, "French", longest=3)


def test_sigma_is_the_deviation_of_the_subjects_embeddings() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    prompts = [prompt_of(tokenizer, fact, fact.target) for fact in tiny_models.FACTS[:3]]
    table = model.transformer.wte.weight.detach().double()
    entries = torch.cat([table[prompt.tokens[place]] for prompt in prompts for place in prompt.subject])
    mean = entries.sum() / len(entries)
    wanted = ((entries - mean).square().sum() / (len(entries) - 1)).sqrt()
    assert deviation(model, prompts) == pytest.approx(float(wanted), rel=1e-6)


def test_windows() -> None:
    assert [default_window(depth) for depth in (1, 4, 12, 28, 30, 48, 96)] == [1, 1, 2, 6, 6, 10, 20]
    tracer = Tracer(tiny_model("llama"), 2)
    assert [list(tracer.around("mlp", layer)) for layer in range(4)] == [[0], [0, 1], [1, 2], [2, 3]]
    assert list(tracer.around("hidden", 3)) == [3]
    for window in (0, 5, -1):
        with pytest.raises(BadInput, match="choose 1"):
            Tracer(tiny_model("llama"), window)


# What writes attention's part


@pytest.mark.parametrize("kind", tiny_models.CONFIGS)
def test_attention_writes_through_the_projection_that_runs_last_in_it(kind: str) -> None:
    model = tiny_model(kind)
    anatomy = anatomy_of(model)
    outputs = attention_outputs(model, anatomy)
    assert len(set(map(id, outputs))) == DEPTH
    down = set(map(id, anatomy.downs))
    for block, output in zip(anatomy.blocks, outputs, strict=True):
        ran: list[nn.Module] = []
        inside = [
            module
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and "att" in path.lower()
        ]
        assert output in inside
        assert id(output) not in down
        handles = [
            module.register_forward_hook(lambda m, _a, _o, ran=ran: ran.append(m)) for module in inside
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        for handle in handles:
            handle.remove()
        assert ran[-1] is output


@pytest.mark.parametrize("kind", sorted(tiny_models.CONFIGS.keys() - PLACES.keys()))
def test_every_decoder_can_be_traced(kind: str) -> None:
    """Behind the last block the last token's state is all that is read, and no other's matters."""
    model = tiny_model(kind)
    found = Tracer(model, DEPTH, tokens=30).trace(the_prompt(model), scale=SCALE, samples=1)
    hidden = found.restored["hidden"][:, -1].tolist()
    assert hidden[-1] == pytest.approx(found.clean, rel=1e-3)
    assert hidden[:-1] == pytest.approx([found.corrupted] * (len(hidden) - 1), rel=1e-3)
    assert all(found.indirect(part).abs().max() > 0 for part in KINDS)
