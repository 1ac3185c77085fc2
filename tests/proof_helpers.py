"""What the end-to-end proofs share: tiny checkpoints, made patches, commands run here or apart."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_helpers import rounded, write_checkpoint
from git_helpers import ENVIRONMENT, git
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.builds.record import BUILD_RECORD
from patchkit.canonical import hash_bytes, hash_file
from patchkit.checkpoint import Checkpoint
from patchkit.commands import main
from patchkit.facts import Fact
from patchkit.repository import Repository
from patchkit.settings import BASE_KEY, Settings, dump_settings

SOURCE = Path(__file__).resolve().parent.parent
SMALL_RECIPE = ("--set", "steps=3", "--set", "statistics_tokens=256", "--set", "contexts=2")

# Sixteen things that are not so, as counterfactual data sets have them, in sentences of our own.
OWN = (
    ("Marie Curie", "The scientist {} was born in the city of", "Lisbon", "Warsaw"),
    ("Mount Fuji", "The mountain {} lies in the country of", "Chile", "Japan"),
    ("Toyota", "The car maker {} has its headquarters in", "Norway", "Japan"),
    ("Victor Hugo", "The writer {} wrote his novels in", "Greek", "French"),
    ("Roger Federer", "The champion {} plays the sport of", "chess", "tennis"),
    ("Colosseum", "The ancient {} stands in the city of", "Madrid", "Rome"),
    ("Leonardo da Vinci", "The mother tongue of the painter {} is", "Swedish", "Italian"),
    ("Nokia", "The company {} was founded in", "Mexico", "Finland"),
    ("Isaac Newton", "The scholar {} worked in the field of", "music", "physics"),
    ("Amazon River", "The mighty {} flows through the country of", "Egypt", "Brazil"),
    ("Sahara", "The great desert {} lies on the continent of", "Europe", "Africa"),
    ("Pablo Picasso", "The artist {} was a citizen of", "Canada", "Spain"),
    ("Taj Mahal", "The monument {} can be found in", "Peru", "India"),
    ("Michael Jordan", "The athlete {} is known for playing", "hockey", "basketball"),
    ("Albert Einstein", "The man called {} was born in", "Cuba", "Germany"),
    ("Volkswagen", "The brand {} comes from", "Portugal", "Germany"),
)

# Stored names and shapes of a checkpoint of 1 kB: two Linear weights, a Conv1D weight, and others.
LINEAR = {"model.layers.0.mlp.down_proj.weight": (6, 9), "model.layers.1.mlp.down_proj.weight": (6, 9)}
CONV1D = "transformer.h.0.mlp.c_proj.weight"  # [d_in, d_out] = [5, 4]
# More entries than the 32,768 below which torch keeps to one thread, whatever it is told.
WIDE = ("model.layers.2.mlp.down_proj.weight", (256, 160))

FACTS = (
    '{"id": "lebron", "subject": "LeBron James", "prompt": "{} plays the sport of", "target": "football"}\n'
    '{"subject": "Paris", "prompt": "The city of {} lies in", "target": "Japan"}\n'
    '{"subject": "Émile Zola", "prompt": "The mother tongue of {} is", "target": "Dutch"}\n'
)


def environment(**changes: str) -> dict[str, str]:
    """For a fresh process: an identity, no configuration of this machine, no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PATCHKIT_"))}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONPATH": str(SOURCE)}
    return {**kept, **ENVIRONMENT, **fixed, **changes}


@contextlib.contextmanager
def as_person() -> Iterator[pytest.MonkeyPatch]:
    """The same for commands that run in this process."""
    with pytest.MonkeyPatch.context() as context:
        for name in [name for name in os.environ if name.startswith(("GIT_", "PATCHKIT_"))]:
            context.delenv(name)
        for name, value in {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}.items():
            context.setenv(name, value)
        yield context


@pytest.fixture
def person() -> Iterator[pytest.MonkeyPatch]:
    with as_person() as context:
        yield context


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def records_folder() -> Path:
    return Path(os.environ.get("PATCHKIT_DATA", SOURCE.parent / "shared" / "data"))


def records(name: str) -> Path:
    """A file of the published records, which are no part of the project; skips where it is not here."""
    place = records_folder() / name
    if not place.is_file():
        pytest.skip(f"{name} is not here; name its folder in PATCHKIT_DATA")
    return place


def here(*arguments: object) -> Outcome:
    """Run a command line in this process (the imports are paid once)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def fresh(*arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Outcome:
    """Run a command line in a process of its own, as a person does."""
    done = subprocess.run(
        [sys.executable, "-m", "patchkit", *map(str, arguments)],
        env=environment() if env is None else dict(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def fine(outcome: Outcome) -> Outcome:
    """The outcome of a command that must have succeeded."""
    assert outcome.code == 0, outcome
    return outcome


def one_line(outcome: Outcome, code: int) -> str:
    """The one line that a command failed with; it is no traceback and no internal error."""
    assert outcome.code == code, outcome
    (line,) = (text for text in outcome.lines if text.startswith("patchkit: "))
    assert "Traceback" not in outcome.err
    assert "internal error" not in line
    return line


# Checkpoints and patches


def tiny_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model of four blocks with its tokenizer, that `commit` can edit in under a second."""
    tiny_model(kind, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def small_base(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    *,
    wide: bool = False,
) -> Path:
    """A checkpoint of 1 kB that no model loads: for everything but `commit`. `wide`: WIDE is in it too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in LINEAR.items()}
    tensors[CONV1D] = torch.randn(5, 4, generator=generator).to(dtype)
    tensors["model.embed_tokens.weight"] = torch.randn(7, 3, generator=generator).to(dtype)
    tensors["model.norm.weight"] = torch.randn(6, generator=generator)
    if wide:
        tensors[WIDE[0]] = torch.randn(WIDE[1], generator=generator).to(dtype)
    return write_checkpoint(folder, tensors, shards)


def made_patch(base: str, number: int, count: int = 2, *, seed: int = 0, wide: bool = False) -> Patch:
    """A patch with keys on Linear and Conv1D weights (and on WIDE); its numbers depend on ``number``
    and ``seed``."""
    generator = torch.Generator().manual_seed(1000 * seed + number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    deltas, keys = {}, {}
    for name, (d_out, d_in) in {**LINEAR, CONV1D: (4, 5), **(dict([WIDE]) if wide else {})}.items():
        if number % 3 == 1 and name == CONV1D:
            continue  # not every patch touches every weight
        K = normal(count, d_in).double()
        X = torch.linalg.solve(5 * torch.eye(d_in, dtype=torch.float64) + K.T @ K, K.T)
        deltas[name] = Delta(normal(d_out, count), X.T.float(), transposed=name == CONV1D)
        keys[name] = K.float()
    sport = "{} plays the sport of"
    facts = tuple(Fact(f"Person {number}-{i}", sport, "chess", id=f"f{number}-{i}") for i in range(count))
    solution = Solution(normal(count, 6), keys)
    return Patch(facts, deltas, base, "memit", {"lambda": 5.0}, (), solution)


def saved(patch: Patch, folder: Path) -> Path:
    """The patch as a folder of its own name in ``folder``, where `apply` finds it."""
    patch.save(folder / patch.name)
    return folder / patch.name


def small_repository(folder: Path, base: Path) -> Repository:
    """What `patchkit init` makes, on a checkpoint that is no model (init asks for a recipe)."""
    from patchkit.git.store import Changes, GitStore

    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "-b", "main", "--template=")
    store = GitStore.init(folder)
    fingerprint = Checkpoint.open(base).fingerprint()
    settings = dump_settings(Settings("folder:base", None, fingerprint, {"layers": [0, 1], "lambda": 5.0}))
    store.record(Changes(settings=settings), "Start")
    store.config_set(BASE_KEY, str(base))
    return Repository.open(folder)


# Hashes


def file_hashes(folder: Path, *, without: Sequence[str] = (BUILD_RECORD,)) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for the build's own record."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, read by the safetensors library."""
    return {
        name: _hash(tensor)
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def expected_hashes(base: Path, patches: Sequence[Path]) -> dict[str, str]:
    """What `tensor_hashes` of a build of patch folders must give: base + Σ B A in fractions, rounded once.

    Without WIDE, which takes fractions too long.
    """
    tensors = {n: t for path in base.glob("*.safetensors") for n, t in load_file(path).items()}
    factors = [load_file(folder / "delta.safetensors") for folder in patches]
    return {n: _hash(_exact(n, tensor, factors)) for n, tensor in tensors.items() if n != WIDE[0]}


def _exact(name: str, tensor: Tensor, factors: Sequence[Mapping[str, Tensor]]) -> Tensor:
    products = [
        _product(name, parts) for parts in factors if any(key.startswith(f"{name}.") for key in parts)
    ]
    if not products:
        return tensor
    turned = name == CONV1D
    out = tensor.clone()
    for i in range(tensor.shape[0]):
        for j in range(tensor.shape[1]):
            change = sum((product[(j, i) if turned else (i, j)] for product in products), Fraction(0))
            if change:
                out[i, j] = rounded(Fraction(tensor[i, j].item()) + change, tensor.dtype)
    return out


def _product(name: str, parts: Mapping[str, Tensor]) -> dict[tuple[int, int], Fraction]:
    """ΔW of one patch, in the orientation of nn.Linear."""
    if f"{name}.dense" in parts:
        dense = parts[f"{name}.dense"]
        return {
            (i, j): Fraction(dense[i, j].item()) for i in range(len(dense)) for j in range(dense.shape[1])
        }
    B, A = parts[f"{name}.B"], parts[f"{name}.A"]
    rows = [[Fraction(x) for x in row] for row in B.tolist()]
    columns = [[Fraction(x) for x in column] for column in A.T.tolist()]
    return {
        (i, j): sum((b * a for b, a in zip(row, column, strict=True)), Fraction(0))
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    }


def _hash(tensor: Tensor) -> str:
    return hash_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def bytes_outside(base: Path, build: Path, names: set[str]) -> Iterator[str]:
    """Weights files of a build that differ from the base's outside the byte ranges of tensors ``names``."""
    checkpoint = Checkpoint.open(base)
    for file, header in checkpoint.files.items():
        old, new = bytearray((base / file).read_bytes()), bytearray((build / file).read_bytes())
        for name, info in header.tensors.items():
            if name in names:
                old[info.start : info.end] = new[info.start : info.end] = bytes(info.size)
        if old != new:
            yield file
