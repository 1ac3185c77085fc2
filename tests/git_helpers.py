"""Small repositories of real patches on tiny tensors, made with plain Git, for the tests of stacks."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.facts import Fact
from patchkit.git.store import Changes, GitStore
from patchkit.git.writers import writers_lock
from patchkit.settings import Settings, dump_settings

BASE = "sha256:" + "a" * 64
OTHER_BASE = "sha256:" + "b" * 64
WEIGHT = "model.layers.0.mlp.down_proj.weight"
SETTINGS = dump_settings(Settings("tiny", None, BASE, {"method": "memit"}))

ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TEST_FSYNC": "0",  # what is asked of Git stays the same; a busy disk only makes tests slow
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


def fact(number: int, target: str | None = None) -> Fact:
    return Fact(f"Person {number}", "{} plays the sport of", target or f"sport {number}")


def patch(facts: Sequence[Fact], seed: int = 0, base: str = BASE) -> Patch:
    """A patch of a 12 x 20 weight whose numbers depend on the facts and the seed."""
    generator = torch.Generator().manual_seed(seed + sum(map(len, (f.text + f.target for f in facts))))
    count, d_out, d_in = len(facts), 12, 20
    deltas = {
        WEIGHT: Delta(
            torch.randn(d_out, count, generator=generator),
            torch.randn(count, d_in, generator=generator) * 0.1,
        )
    }
    solution = Solution(
        torch.randn(count, d_out, generator=generator),
        {WEIGHT: torch.randn(count, d_in, generator=generator) * 0.1},
    )
    return Patch(tuple(facts), deltas, base, "memit", {"lambda": 300.0}, (), solution)


def numbers(*values: int, seed: int = 0, base: str = BASE) -> Patch:
    return patch([fact(value) for value in values], seed, base)


def git(folder: Path, *args: str, ok: bool = True, **env: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert not ok or done.returncode == 0, f"git {args}: {done.stdout}{done.stderr}"
    return (done.stdout + done.stderr).strip()


def take_out_as_told(store: GitStore, remedy: str) -> None:
    """Type the commands that a problem's remedy has in brackets."""
    way = remedy[remedy.index("(git rm") + 1 : remedy.index(")")]
    subprocess.run(["bash", "-ec", way], cwd=store.folder, capture_output=True, check=True)


def make_store(folder: Path, *, object_format: str = "sha1") -> GitStore:
    """A repository with settings and no patch."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "-b", "main", f"--object-format={object_format}")
    store = GitStore.init(folder)
    store.record(Changes(settings=SETTINGS), "Start")
    return GitStore.find(folder)


def add(store: GitStore, *patches: Patch, message: str = "Add") -> list[str]:
    """Commit patches under their own names; the names."""
    store.record(Changes(patches={p.name: p.files() for p in patches}), message)
    return [p.name for p in patches]


def write(store: GitStore, name: str, files: dict[str, bytes] | Patch) -> Path:
    """Put a patch folder's files into the work tree, as a person would."""
    folder = store.folder / "patches" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in (files.files() if isinstance(files, Patch) else files).items():
        (folder / file).write_bytes(data)
    return folder


@contextmanager
def another_writer(
    store: GitStore, place: Callable[[], object], take_away: Callable[[], object]
) -> Iterator[None]:
    """Meanwhile another holds the writers' lock: what it placed lies there for half a second."""
    placed = threading.Event()

    def write_and_end() -> None:
        with writers_lock(store):
            place()
            placed.set()
            time.sleep(0.5)
            take_away()

    thread = threading.Thread(target=write_and_end)
    thread.start()
    assert placed.wait(10)
    yield
    thread.join()


def commit_all(store: GitStore, message: str = "By hand") -> str:
    git(store.root, "add", "-A", ".")
    git(store.root, "commit", "-q", "-m", message)
    return git(store.root, "rev-parse", "HEAD")


def tree_files(store: GitStore, rev: str = "HEAD") -> dict[str, bytes]:
    """Every file of patches/ at a commit."""
    return {entry.path: store.read(entry.oid) for entry in store.tree(rev).entries}


def state(store: GitStore) -> tuple[dict[str, bytes], Iterable[tuple[str, str]]]:
    return tree_files(store), store.status()


@pytest.fixture
def git_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Git with an identity and without this machine's own configuration."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
