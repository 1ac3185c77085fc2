"""Taking back is exact: through the commands, in any order, whatever threads, dtypes, shards, processes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from git_helpers import ENVIRONMENT
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from proof_helpers import (  # noqa: F401
    WIDE,
    bytes_outside,
    environment,
    expected_hashes,
    file_hashes,
    fine,
    fresh,
    here,
    made_patch,
    person,
    saved,
    small_base,
    small_repository,
    tensor_hashes,
)

from patchkit.algebra.rounding import materialise
from patchkit.builds.build import verify_build
from patchkit.canonical import hash_bytes
from patchkit.checkpoint import Checkpoint
from patchkit.repository import Repository

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
THREADS = (1, 2, 4)
NUMBERS = range(5)


class Knowledge(RuleBasedStateMachine):
    """Patches come, go, lose facts and come back; a build must tell which are in force and nothing else."""

    off = Bundle("off")
    on = Bundle("on")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.context = pytest.MonkeyPatch()
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            self.context.delenv(name)
        for name, value in ENVIRONMENT.items():
            self.context.setenv(name, value)
        self.context.setattr(os, "fsync", lambda _: None)  # what is durable is proved elsewhere
        self.threads = torch.get_num_threads()
        self.turn = 0
        self.seen: dict[frozenset[str], dict[str, str]] = {}

    @initialize(
        target=off, dtype=st.sampled_from(DTYPES), shards=st.sampled_from([1, 2]), seed=st.integers(0, 99)
    )
    def start(self, dtype: torch.dtype, shards: int, seed: int) -> Any:
        self.base = small_base(self.root / "base", dtype, shards, seed, wide=True)
        self.before = file_hashes(self.base)
        self.repository = small_repository(self.root / "kb", self.base)
        fingerprint = Checkpoint.open(self.base).fingerprint()
        self.folders = {
            number: saved(
                made_patch(fingerprint, number, 1 + number, seed=seed, wide=number % 2 == 0),
                self.root / "made",
            )
            for number in NUMBERS
        }
        return multiple(*NUMBERS)

    @rule(target=on, number=consumes(off))
    def apply(self, number: int) -> int:
        self._run("apply", self.folders[number])
        return number

    @rule(target=off, number=consumes(on))
    def revert(self, number: int) -> int:
        self._run("revert", self.folders[number].name)
        return number

    @rule(target=off, number=consumes(on))
    def revert_the_commit_that_brought_it(self, number: int) -> int:
        name = self.folders[number].name
        row = next(row for row in self.repository.listing() if row.name == name)
        changed = (self.folders[number] / "facts.jsonl").read_bytes() != self._facts(name)
        if changed:  # facts were taken out since: only its name takes it back
            assert here("-C", self.root / "kb", "revert", row.commit).code == 65
            self._run("revert", name)
        else:
            self._run("revert", row.commit)
        return number

    @rule(number=on, place=st.integers(0, 9))
    def take_a_fact_out_and_perhaps_back(self, number: int, place: int) -> None:
        name = self.folders[number].name
        lines = self._facts(name).count(b"\n")
        if lines < 2:
            return
        before = self._ids()
        self._run("revert", name, "--fact", 1 + place % lines)
        assert self._facts(name).count(b"\n") == lines - 1
        assert len(self._ids()) == len(before)
        assert self._ids() != before
        if place % 2:
            self._run("revert", "HEAD")
            assert self._ids() == before

    @precondition(lambda self: hasattr(self, "repository"))
    @invariant()
    def a_build_is_what_is_in_force(self) -> None:
        self.turn += 1
        torch.set_num_threads(THREADS[self.turn % 3])
        self._run("build", "--out", self.root / "out")
        patches = sorted(path for path in (self.root / "kb" / "patches").iterdir() if path.is_dir())
        found = tensor_hashes(self.root / "out")
        assert {n: h for n, h in found.items() if n != WIDE[0]} == expected_hashes(self.base, patches)
        self._wide_is_the_same_with_any_threads(found[WIDE[0]])
        assert self.seen.setdefault(self._ids(), found) == found
        touched = {weight for patch in self.repository.patches().values() for weight in patch.deltas}
        assert not list(bytes_outside(self.base, self.root / "out", touched))
        if self.turn % 3 == 0:
            torch.set_num_threads(THREADS[(self.turn + 1) % 3])
            self._run("build", "--out", self.root / f"fresh{self.turn}")
            built = file_hashes(self.root / f"fresh{self.turn}", without=())
            assert built == file_hashes(self.root / "out", without=())

    def _wide_is_the_same_with_any_threads(self, found: str) -> None:
        """The tensor that is large enough for torch to divide it, computed with each number of threads."""
        name = WIDE[0]
        deltas = [p.deltas[name] for p in self.repository.patches().values() if name in p.deltas]
        weight = Checkpoint.open(self.base).read(name)
        for threads in THREADS:
            torch.set_num_threads(threads)
            out = materialise(weight, deltas)
            assert hash_bytes(out.view(torch.uint8).numpy().tobytes()) == found, threads

    def teardown(self) -> None:
        try:
            if hasattr(self, "repository"):
                names = [patch.name for patch in self.repository.stack().patches]
                if names:
                    self._run("revert", *names)
                self._run("build", "--out", self.root / "out")
                assert file_hashes(self.root / "out") == self.before
                assert verify_build(self.root / "out") == []
                assert file_hashes(self.base) == self.before
                assert self.repository.problems() == []
        finally:
            torch.set_num_threads(self.threads)
            self.context.undo()
            shutil.rmtree(self.root)

    def _run(self, *words: object) -> None:
        fine(here("-C", self.root / "kb", *words))

    def _ids(self) -> frozenset[str]:
        return frozenset(patch.id for patch in self.repository.stack().patches)

    def _facts(self, name: str) -> bytes:
        return (self.root / "kb" / "patches" / name / "facts.jsonl").read_bytes()


TestKnowledge = Knowledge.TestCase
TestKnowledge.settings = settings(
    max_examples=6,
    stateful_step_count=7,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate],  # shrinking takes minutes: the slow run does it
)


class TestKnowledgeAtLength(Knowledge.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # noqa: RUF012


@pytest.mark.timeout(900)  # eight processes that import torch, on a busy machine
@pytest.mark.usefixtures("person")
def test_processes_hash_seeds_and_threads_change_no_byte(tmp_path: Path) -> None:
    """Two applied, a fact taken out, built: ids, committed files and build bytes, twice."""
    base = small_base(tmp_path / "base", shards=2, wide=True)
    fingerprint = Checkpoint.open(base).fingerprint()
    folders = [saved(made_patch(fingerprint, number, 3, wide=True), tmp_path / "made") for number in (0, 1)]
    results = []
    for turn, (seed, threads) in enumerate([("0", "1"), ("4242", "4")]):
        root = tmp_path / f"turn{turn}"
        small_repository(root / "kb", base)
        env = environment(PYTHONHASHSEED=seed, OMP_NUM_THREADS=threads)
        for folder in folders if turn % 2 == 0 else folders[::-1]:
            fine(fresh("-C", root / "kb", "apply", folder, env=env))
        fine(fresh("-C", root / "kb", "revert", folders[0].name, "--fact", "2", env=env))
        fine(fresh("-C", root / "kb", "build", "--out", root / "out", env=env))
        repository = Repository.open(root / "kb")
        results.append(
            (
                repository.stack().tree,
                sorted(patch.id for patch in repository.stack().patches),
                file_hashes(root / "kb" / "patches"),
                file_hashes(root / "out", without=()),
            )
        )
    assert results[0] == results[1]
    assert file_hashes(root / "out") != file_hashes(base)
