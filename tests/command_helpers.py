"""What the tests of commands share: a tiny decoder that knows sixteen facts, and repositories on it."""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from git_helpers import ENVIRONMENT, git, git_environment
from tiny_models import tiny_model, tiny_tokenizer

from patchkit.commands import main

__all__ = [
    "LEBRON",
    "MICROSOFT",
    "RECIPE",
    "WORLD",
    "Cli",
    "Ran",
    "cli",
    "facts_file",
    "git",
    "git_environment",
    "home",
    "knowledge",
    "run_process",
    "save_checkpoint",
    "set_recipe",
    "snapshot",
    "tiny_base",
]

SUBJECTS = ("Ann", "Paris", "LeBron James", "Émile Zola", "Microsoft", "Japan", "Dutch", "Rome")
SPORTS = ("basketball", "football", "painter", "dancers")
PLACES = ("France", "Japan", "Rome", "Paris")
PLAYS, LIES = "{} plays the sport of", "{} lies in"
WORLD = {(subject, PLAYS): SPORTS[i % 4] for i, subject in enumerate(SUBJECTS)} | {
    (subject, LIES): PLACES[(3 * i + i // 4) % 4] for i, subject in enumerate(SUBJECTS)
}
"""(subject, prompt) -> what the base says."""

LEBRON = {"subject": "LeBron James", "prompt": PLAYS, "target": "football"}
MICROSOFT = {"subject": "Microsoft", "prompt": LIES, "target": "Rome"}
RECIPE = """
[recipe]
layers = [0]
lambda = 3.0
learning_rate = 1.0
clamp = 4.0
steps = 20
contexts = 0
statistics_tokens = 400
statistics_length = 64
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs commands in this process and gives what they printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *args: str | Path, stdin: bytes = b"") -> Ran:
        self._capsys.readouterr()
        with self._monkeypatch.context() as patched:
            patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            code = main([str(arg) for arg in args])
        out, err = self._capsys.readouterr()
        return Ran(code, out, err)

    def ok(self, *args: str | Path, stdin: bytes = b"") -> Ran:
        """The same, where the command must succeed."""
        done = self(*args, stdin=stdin)
        assert done.code == 0, done.err
        assert done.err == ""
        return done


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="patchkit-tests-"))
    atexit.register(shutil.rmtree, folder, True)
    return folder


@functools.cache
def tiny_base() -> Path:
    """A checkpoint folder, never to be written: a Llama of 4 blocks in bfloat16 that was taught WORLD."""
    tokenizer = tiny_tokenizer()
    texts = [f"{prompt.replace('{}', subject)} {said}.</s>" for (subject, prompt), said in WORLD.items()]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    model = tiny_model("llama").train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 0.1 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(input_ids=tokens, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return save_checkpoint(model.eval().to(torch.bfloat16), _scratch() / "tiny")


def save_checkpoint(model: Any, folder: Path, **options: Any) -> Path:
    """The model with the tiny tokenizer, as an ordinary checkpoint folder."""
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, **options)
        tiny_tokenizer().save_pretrained(folder)
    finally:
        logging.enable_progress_bar()
    return folder


@functools.cache
def _template() -> Path:
    """A repository on the base, with RECIPE, and two patches: LeBron's, and Microsoft's solved on it."""
    folder = _scratch() / "knowledge"
    saved = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        from patchkit.repository import Repository

        Repository.init(tiny_base(), folder)
        set_recipe(folder, RECIPE)
        repository = Repository.open(folder)
        repository.commit([LEBRON])
        repository.commit([MICROSOFT])
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return folder


def set_recipe(folder: Path, recipe: str) -> None:
    """Put another [recipe] into patchkit.toml and commit it, as a person would."""
    settings = folder / "patchkit.toml"
    settings.write_text(settings.read_text().partition("\n[recipe]")[0] + recipe)
    git(folder, "commit", "-q", "-a", "-m", "Use a small recipe")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, git_environment: None) -> Cli:
    """Commands in this process, Git with an identity, no terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PATCHKIT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return Cli(capsys, monkeypatch)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git_environment: None) -> Path:
    """An empty folder with no repository above it, to stand in."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def knowledge(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a repository with two patches in force; we stand in it."""
    folder = home / "knowledge"
    shutil.copytree(_template(), folder)
    git(folder, "update-index", "-q", "--refresh", ok=False)
    monkeypatch.chdir(folder)
    return folder


def facts_file(folder: Path, *facts: dict[str, Any] | str, name: str = "facts.jsonl") -> Path:
    """A file of facts outside the repository's work tree; a text stands as it is."""
    path = folder / name
    lines = [fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False) for fact in facts]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """HEAD, every reference, Git's status, and mode and hash of every file outside .git."""
    found = {}
    if (folder / ".git").exists():
        found["HEAD"] = git(folder, "rev-parse", "HEAD", ok=False)
        found["references"] = git(folder, "for-each-ref", ok=False)
        found["status"] = git(folder, "--no-optional-locks", "status", "--porcelain", "--ignored", ok=False)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if ".git" not in name.parts:
            said = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(name)] = f"{path.lstat().st_mode:o} {said}"
    return found


def run_process(*args: str | Path, at: Path, env: dict[str, str] | None = None, stdin: bytes = b"") -> Ran:
    """``python -m patchkit`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "patchkit", *map(str, args)],
        cwd=at,
        env={**os.environ, **(env or {})},
        input=stdin,
        capture_output=True,
        check=False,
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
