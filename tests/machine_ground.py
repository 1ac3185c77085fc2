"""What every example of the machine begins with: a tiny base, a repository on it, and patches to apply."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from command_helpers import save_checkpoint, set_recipe
from git_helpers import git
from machine_model import Base, Part, Rows, Said, Version, read_version, single
from proof_helpers import as_person

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.facts import Fact
from patchkit.repository import Repository

PROMPT = "{} plays the sport of"
RIDGE = 5.0
WIDTH, INNER = 8, 12  # five facts are past the break-even
RECIPE = """
[recipe]
layers = [0, 1]
lambda = 3.0
clamp = 4.0
steps = 1
contexts = 0
statistics_tokens = 64
statistics_length = 32
"""
KINDS = {
    "llama": (
        "LlamaConfig",
        {"intermediate_size": INNER, "num_key_value_heads": 1, "max_position_embeddings": 64},
        {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2},
        "model.layers.{}.mlp.down_proj.weight",
        torch.bfloat16,
    ),
    "gpt2": (
        "GPT2Config",
        {"n_inner": INNER, "n_positions": 64},
        {"n_embd": WIDTH, "n_head": 2, "n_layer": 2},
        "transformer.h.{}.mlp.c_proj.weight",
        torch.float32,
    ),
}
# Patches from elsewhere, as subject and target: some say otherwise what others say, or the same twice.
POOL: tuple[tuple[tuple[int, str], ...], ...] = (
    ((0, "chess"),),
    ((1, "chess"), (2, "chess")),
    ((3, "chess"), (4, "chess"), (5, "chess")),
    ((0, "golf"),),
    ((1, "golf"), (6, "chess")),
    ((2, "golf"), (3, "golf")),
    ((7, "chess"),),
    ((4, "golf"), (5, "golf"), (6, "golf"), (7, "golf"), (8, "chess")),
    ((0, "chess"), (9, "chess")),
    ((9, "golf"), (8, "golf")),
)


def person(number: int) -> str:
    return f"Person {number}"


@dataclass
class Ground:
    """A base, a repository on it with no patch, and patches to apply."""

    base: Base
    scratch: Path
    weights: Sequence[str]
    fingerprint: str
    recipe: Mapping[str, Any]
    transposed: bool

    @property
    def template(self) -> Path:
        return self.scratch / "kb"

    @functools.cached_property
    def pool(self) -> list[tuple[Path, Version]]:
        return [self.patch(number, facts) for number, facts in enumerate(POOL)]

    def patch(self, number: int, facts: Sequence[tuple[int, str]]) -> tuple[Path, Version]:
        """A patch solved as MEMIT solves, with λC = RIDGE I, in a folder of its own."""
        random = np.random.default_rng(number)
        said = tuple(Said(person(subject), target) for subject, target in facts)
        layers = ((0, 1), (0,), (0, 1), (1,))[number % 4]  # a build has tensors to keep and to write
        rows = {self.weights[layer]: _solved(random, len(said)) for layer in layers}
        tensors = {name: [torch.from_numpy(part) for part in row] for name, row in rows.items()}
        targets = torch.from_numpy(random.normal(size=(len(said), WIDTH))).float()
        patch = Patch(
            tuple(Fact(fact.subject, PROMPT, fact.target) for fact in said),
            {name: Delta(R.T, X, transposed=self.transposed) for name, (R, X, _) in tensors.items()},
            self.fingerprint,
            "memit",
            {**self.recipe, "lambda": RIDGE, "layers": list(layers)},
            (),
            Solution(targets, {name: K for name, (_, _, K) in tensors.items()}),
        )
        folder = self.scratch / "pool" / str(number) / patch.name
        if not folder.exists():
            patch.save(folder)
        return folder, read_version(folder, said, single(Part(said, rows)))


def _solved(random: np.random.Generator, count: int) -> Rows:
    K = random.normal(size=(count, INNER)).astype(np.float32)
    R = random.normal(size=(count, WIDTH)).astype(np.float32)
    C = RIDGE * np.eye(INNER)
    return Rows(R, (K @ np.linalg.inv(C + K.T.astype(np.float64) @ K)).astype(np.float32), K)


@functools.cache
def ground(kind: str) -> Ground:
    scratch = Path(tempfile.mkdtemp(prefix="patchkit-tests-"))
    atexit.register(shutil.rmtree, scratch, True)
    name, own, shape, weight, dtype = KINDS[kind]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**own, **shape, **ids, vocab_size=320, tie_word_embeddings=False)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    base = Base(save_checkpoint(model, scratch / "base"), transposed=kind == "gpt2")
    with as_person():
        repository = Repository.init(base.folder, scratch / "kb")
        set_recipe(scratch / "kb", RECIPE)
        git(scratch / "kb", "reset", "-q", "--soft", "HEAD~1")  # one recipe from the first commit on
        git(scratch / "kb", "commit", "-q", "--amend", "-m", "Start")
        repository.commit([{"subject": "Ann", "prompt": PROMPT, "target": "golf"}], dry_run=True)
    weights = [weight.format(layer) for layer in (0, 1)]
    fingerprint, recipe = repository.settings.base_fingerprint, repository.recipe().to_dict()
    return Ground(base, scratch, weights, fingerprint, recipe, kind == "gpt2")
