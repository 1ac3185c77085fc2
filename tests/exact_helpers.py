"""What the tests of exactness share: an oracle in fractions, small patches, small checkpoints."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.facts import Fact

LARGEST = {d: Fraction(torch.finfo(d).max) for d in (torch.float32, torch.bfloat16, torch.float16)}
DIGITS = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}


class Overflows(Exception):
    """The exact sum rounds to infinity."""


def rounded(exact: Fraction, dtype: torch.dtype) -> float:
    """The number of ``dtype`` nearest to ``exact``, ties to even, by integer arithmetic alone."""
    digits, lowest = DIGITS[dtype]
    step = Fraction(2) ** lowest
    while abs(exact) >= step * 2**digits:
        step *= 2
    value = round(exact / step) * step  # Fraction rounds half to even
    if abs(value) > LARGEST[dtype]:
        raise Overflows
    return float(value)


def exact_sum(base: Tensor, B: Tensor, A: Tensor, i: int, j: int) -> tuple[Fraction, Fraction]:
    """The base's entry, and Σ_k B_ik A_kj, as fractions."""
    terms = (Fraction(b) * Fraction(a) for b, a in zip(B[i].tolist(), A[:, j].tolist(), strict=True))
    return Fraction(base[i, j].item()), sum(terms, Fraction(0))


def facts(count: int, start: int = 0) -> tuple[Fact, ...]:
    return tuple(
        Fact(subject=f"Person {n}", prompt="{} plays the sport of", target="chess")
        for n in range(start, start + count)
    )


def solved_patch(
    shapes: dict[str, tuple[int, int]], count: int, base: str, *, seed: int = 0, ridge: float = 5.0
) -> tuple[Patch, dict[str, Tensor]]:
    """A patch solved as MEMIT solves, and λC [d_in, d_in] of each weight, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    deltas, keys, statistics = {}, {}, {}
    for name, (d_out, d_in) in shapes.items():
        sample = normal(d_in, 3 * d_in)
        C = ridge * (sample @ sample.T) / (3 * d_in)
        K, R = normal(d_in, count).float().double(), normal(d_out, count)
        X = torch.linalg.solve(C + K @ K.T, K)
        deltas[name] = Delta(R.float(), X.T.float())
        keys[name] = K.T.float()
        statistics[name] = C
    solution = Solution(normal(count, 5).float(), keys)
    patch = Patch(facts(count, 100 * seed), deltas, base, "memit", {"lambda": ridge}, (), solution)
    return patch, statistics


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """An ordinary checkpoint folder: one safetensors file, or shards and their index."""
    folder.mkdir(parents=True)
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
    else:
        names = sorted(tensors)
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, folder / file, metadata)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "none"}\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return folder
