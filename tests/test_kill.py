"""Killed at any system call of patchkit or of a Git command that it starts, it is the old state or the new.

Each command is run once under strace to list the system calls that change files, then once more
for each of them with SIGKILL as that call is entered: patchkit's own calls, and those of each Git
command, where either Git alone dies (patchkit goes on and must cope) or patchkit dies with it.
Then: HEAD's stack is the old or the new one and is believed, no commit is lost, what `status`
names clears everything that lies around, and the command run again ends in the new state.
The default run takes a spread of the calls, `slow` takes them all. Without strace patchkit alone
is ended, at each call of Python's that changes files and at each start of a Git command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from git_helpers import git
from kill_target import CALLS, EXITED
from proof_helpers import (
    FACTS,
    SMALL_RECIPE,
    as_person,
    environment,
    fine,
    here,
    made_patch,
    saved,
    small_base,
    small_repository,
    tiny_base,
)

from patchkit.builds.record import BuildRecord, verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.errors import NotFound
from patchkit.files import is_temporary
from patchkit.repository import Repository

COMMANDS = ("init", "apply", "revert", "fact", "build", "commit")
SPREAD = {"init": 8, "apply": 14, "revert": 12, "fact": 6, "build": 6, "commit": 6}
REFUSALS = {65, 66, 73, 75}  # done already, or a lock in the way

_CALL = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")
_PATH = re.compile(r'<(/[^>]*)>|"([^"]*)"')
_CREATES = re.compile(r"O_CREAT|O_WRONLY|O_RDWR|O_TRUNC")

_REMEDY = re.compile(r"(?:if none is running|with): (.*?)(?:; then try again)?$")

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed (Debian: apt install strace)"
)

GIT_SHIM = """#!/bin/sh
# Counts Git's starts; traces each, or kills the chosen one at the chosen call.
number=$(($(cat "$SHIM/count") + 1))
echo $number > "$SHIM/count"
if [ -n "$SHIM_TRACE" ]; then
    exec strace -f -y -o "$SHIM/trace.$number" -e trace="$SHIM_TRACE" "$SHIM_GIT" "$@"
fi
if [ "$number" != "$SHIM_TARGET" ]; then exec "$SHIM_GIT" "$@"; fi
strace -f -o "$SHIM/struck" $SHIM_PATH -e trace="$SHIM_CALL" \\
    -e inject="$SHIM_CALL:signal=KILL:when=$SHIM_WHEN" "$SHIM_GIT" "$@" 2> /dev/null
if [ -n "$SHIM_ALL" ]; then kill -KILL $PPID; fi
kill -KILL $$
"""


@dataclass(frozen=True)
class Target:
    """A system call to die at. ``start``: which Git command makes it, 0 for patchkit itself."""

    start: int
    call: str
    number: int
    what: str
    path: str | None = None
    """For a call of a process that Git starts: its file, and ``number`` counts calls on it."""
    everything: bool = True
    """Whether patchkit dies with Git."""

    def __str__(self) -> str:
        who = f"git command {self.start}" if self.start else "patchkit"
        return f"{who}{'' if self.everything else ' alone'}, {self.call} {self.number}: {self.what}"


@dataclass
class Case:
    """A command, the folder that it starts from, and the states before and after it."""

    name: str
    template: Path
    arguments: Callable[[Path], list[str]]
    old: str | None
    new: str | None = None
    targets: list[Target] = field(default_factory=list)


class Bench:
    """Runs a case's command in a copy of its template, killed or not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shim = root / "shim"
        self.shim.mkdir()
        (self.shim / "git").write_text(GIT_SHIM)
        (self.shim / "git").chmod(0o755)
        plain = environment(PYTHONHASHSEED="0")
        path = f"{self.shim}{os.pathsep}{plain['PATH']}"
        shim = {"SHIM": str(self.shim), "SHIM_GIT": str(shutil.which("git")), "SHIM_TARGET": "0"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_target.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**plain, **shim, "PATH": path, "SHIM_TRACE": "", "SHIM_PATH": "", "SHIM_ALL": ""},
            text=True,
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def folder(self, case: Case) -> Path:
        """A new copy of the template, always in the same place."""
        place = self.root / "work"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(case.template, place)
        return place

    def run(self, case: Case, folder: Path, **job: Any) -> int:
        (self.shim / "count").write_text("0")
        said = str(self.root / "said")
        job = {"environment": {}, "output": said, **job, "arguments": case.arguments(folder)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code: int = json.loads(self.process.stdout.readline())
        return code

    def kill(self, case: Case, folder: Path, target: Target) -> tuple[int, bool]:
        """How patchkit ended, and whether the system call itself was what killed it, or its Git."""
        if not target.start:
            code = self.run(case, folder, kill=[target.call, target.number])
            return code, code == -9
        struck = self.shim / "struck"
        struck.unlink(missing_ok=True)
        shim = {"SHIM_TARGET": str(target.start), "SHIM_CALL": target.call, "SHIM_WHEN": str(target.number)}
        shim["SHIM_ALL"] = "1" if target.everything else ""
        shim["SHIM_PATH"] = f"-P {target.path}" if target.path else ""
        code = self.run(case, folder, environment=shim)
        return code, struck.exists() and "killed by SIGKILL" in struck.read_text(errors="replace")

    def list_targets(self, case: Case) -> Iterator[Target]:
        """Every system call of an uninterrupted run that changes files of the copy."""
        folder = self.folder(case)
        log = self.root / "trace"
        for old in self.shim.glob("trace.*"):
            old.unlink()
        assert self.run(case, folder, trace=str(log)) == 0, (self.root / "said").read_text()
        yield from _changes(log, folder, 0)
        folder = self.folder(case)
        assert self.run(case, folder, environment={"SHIM_TRACE": CALLS}) == 0
        for start in range(1, 1 + int((self.shim / "count").read_text())):
            for target in _changes(self.shim / f"trace.{start}", folder, start):
                yield target
                yield Target(**{**target.__dict__, "everything": False})


def _changes(log: Path, folder: Path, start: int) -> Iterator[Target]:
    counts: Counter[tuple[str | None, str]] = Counter()
    on_path: Counter[tuple[str, str]] = Counter()
    first: str | None = None
    for line in log.read_text(errors="replace").splitlines():
        if (match := _CALL.match(line)) is None:
            continue
        process, call, rest = match.groups()
        first = first or process
        counts[process, call] += 1
        paths = [a or b for a, b in _PATH.findall(rest.rpartition(" = ")[0])]
        quoted = re.findall(r'"([^"]*)"', rest) if call in ("write", "pwrite64") else []
        paths = [path for path in paths if path not in quoted]
        near = [
            path for path in paths if path.startswith(str(folder)) or (start and path.startswith(".git/"))
        ]
        for path in set(near):
            on_path[call, path] += 1
        opens = call in ("openat", "open", "creat")
        changed = [path for path in near if not (opens and path == str(folder / "kb"))]
        if (
            not changed
            or (opens and not _CREATES.search(rest))
            or (call == "ioctl" and "FICLONE" not in rest)
        ):
            continue
        path = changed[-1]
        if process == first:
            yield Target(start, call, counts[process, call], path.removeprefix(str(folder)))
        elif "tmp_obj" not in path:
            yield Target(start, call, on_path[call, path], path.removeprefix(str(folder)), path=path)


# What must hold afterwards


def state_of(folder: Path) -> str | None:
    """The stack at HEAD; None where there is no commit."""
    kb = folder / "kb"
    if not (kb / ".git" / "HEAD").exists():
        return None
    head = subprocess.run(
        ["git", "-C", str(kb), "rev-parse", "--verify", "--quiet", "HEAD:patches"],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() or None


def assert_believed(case: Case, folder: Path) -> None:
    state = state_of(folder)
    assert state in (case.old, case.new)
    if state is not None:
        assert Repository.open(folder / "kb").problems() == []
    if case.old is not None:
        start = git(case.template / "kb", "rev-parse", "HEAD")
        git(folder / "kb", "merge-base", "--is-ancestor", start, "HEAD")  # no commit was lost
    if case.name == "build" and (folder / "out" / "config.json").exists():
        record = BuildRecord.read(folder / "out")
        problems = verify_build(folder / "out")
        # An untouched old build, or the new one; a record that is behind its files cannot be loaded.
        assert problems == [], problems
        assert record is not None
        assert record.finished


def clear(folder: Path) -> None:
    """Do what `status` says until nothing lies half done; then look whether that was all there was."""
    kb = folder / "kb"
    try:
        repository = Repository.open(kb)
    except NotFound:
        return  # killed before there was a repository of patches: init again is the way
    for _ in range(3):
        found = repository.status().leftovers
        for problem in found:
            done = subprocess.run(problem.remedy, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (str(problem), done.stderr)
    assert repository.status().leftovers == ()
    assert stale(kb) == []
    if state_of(folder) is not None:
        assert git(kb, "status", "--porcelain", "--ignored") == ""
        assert git(kb, "diff", "--stat", "HEAD") == ""


def stale(kb: Path) -> list[str]:
    """Locks and temporary files of ours and of Git's, however deep."""
    ours = kb / ".git" / "patchkit"
    return [
        str(path)
        for path in kb.rglob("*")
        if (path.suffix == ".lock" and path.is_file()) or path == ours / "incoming" or is_temporary(path.name)
    ]


def run_again(case: Case, folder: Path) -> None:
    """The same command once more: it ends in the new state, or says that all is done already."""
    done_already = case.new == state_of(folder) and case.name not in ("init", "build")
    outcome = here(*case.arguments(folder))
    if case.name == "init":
        for _ in range(5):  # there may be no repository yet that `status` could open: the line itself helps
            if outcome.code not in (73, 75):
                break
            found = re.search(
                r"(?:if none is running|with): (.*?)(?:; then try again)?$", outcome.err.strip()
            )
            assert found, outcome
            subprocess.run(found[1], shell=True, check=True)
            outcome = here(*case.arguments(folder))
    assert outcome.code in (REFUSALS if done_already else {0}), outcome
    assert all(line.startswith("patchkit: ") for line in outcome.lines), outcome.err
    assert bool(outcome.lines) == done_already


def aftermath(case: Case, folder: Path, *, at_once: bool) -> None:
    """``at_once``: the command is run again before anything is cleared, as people do."""
    assert_believed(case, folder)
    if at_once:
        outcome = here(*case.arguments(folder))
        assert outcome.code in {0, *REFUSALS}, outcome
        assert "Traceback" not in outcome.err
        assert_believed(case, folder)
    clear(folder)
    assert_believed(case, folder)
    run_again(case, folder)
    clear(folder)
    assert state_of(folder) == case.new
    assert_believed(case, folder)
    assert [str(problem) for problem in Repository.open(folder / "kb").fsck()] == []
    if case.name == "build":
        assert (folder / "out" / "config.json").exists()
        assert verify_build(folder / "out", Repository.open(folder / "kb").checkpoint()) == []


# The commands


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with as_person():
        found = Bench(tmp_path_factory.mktemp("kill"))
        yield found
        found.close()


@pytest.fixture(scope="module")
def cases(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("cases")
    template = root / "template"
    base = small_base(root / "base", shards=2)
    git_template = root / "git-template"
    git_template.mkdir()
    os.environ["GIT_TEMPLATE_DIR"] = str(git_template)  # undone with the bench's environment
    small_repository(template / "kb", base)
    fingerprint = Checkpoint.open(base).fingerprint()
    made = [saved(made_patch(fingerprint, number, 3), root / "made") for number in range(3)]
    kb = template / "kb"
    for folder in made[:2]:
        fine(here("-C", kb, "apply", folder))
    fine(here("-C", kb, "build", "--out", template / "out"))
    fine(here("-C", kb, "revert", made[1].name))
    empty = root / "empty"
    empty.mkdir()
    model = tiny_base(root / "model")
    (root / "facts.jsonl").write_text(FACTS)
    engine = root / "engine"
    fine(here("init", model, engine / "kb"))
    fine(here("-C", engine / "kb", "commit", root / "facts.jsonl", "--dry-run", *SMALL_RECIPE))  # statistics
    commit = ["commit", str(root / "facts.jsonl"), *SMALL_RECIPE]

    def at(*words: str) -> Callable[[Path], list[str]]:
        return lambda folder: ["-C", str(folder / "kb"), *words]

    old = state_of(template)
    found = [
        Case("init", empty, lambda folder: ["init", str(model), str(folder / "kb")], None),
        Case("apply", template, at("apply", str(made[2])), old),
        Case("revert", template, at("revert", made[0].name), old),
        Case("fact", template, at("revert", made[0].name, "--fact", "f0-1"), old),
        Case("build", template, lambda folder: [*at("build", "--out")(folder), str(folder / "out")], old),
        Case("commit", engine, at(*commit), state_of(engine)),
    ]
    return {case.name: case for case in found}


@pytest.fixture
def case(request: pytest.FixtureRequest, bench: Bench, cases: dict[str, Case]) -> Case:
    found = cases[request.param]
    if found.new is None:
        folder = bench.folder(found)
        fine(here(*found.arguments(folder)))
        found.new = state_of(folder)
        assert found.new is not None
        assert (found.new == found.old) == (found.name == "build")
    return found


def targets_of(bench: Bench, case: Case) -> list[Target]:
    case.targets = case.targets or list(bench.list_targets(case))
    return case.targets


def spread(targets: list[Target], count: int) -> list[Target]:
    """Some of them, evenly, with the ends."""
    steps = min(count, len(targets))
    return [targets[round(i * (len(targets) - 1) / (steps - 1))] for i in range(steps)]


def kill_and_look(bench: Bench, case: Case, targets: list[Target]) -> None:
    killed = 0
    for turn, target in enumerate(targets):
        folder = bench.folder(case)
        code, struck = bench.kill(case, folder, target)
        killed += struck
        try:
            aftermath(case, folder, at_once=turn % 2 == 1)
        except Exception as error:
            said = (bench.root / "said").read_text(errors="replace")
            raise AssertionError(f"{case.name}, killed at {target} ({code}): {error}\n{said}") from error
    # A run may differ from the one that was traced by a call or two.
    assert killed >= 0.95 * len(targets)


@needs_strace
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_killed_at_some_system_calls(bench: Bench, case: Case) -> None:
    found = targets_of(bench, case)
    assert len(found) > 40
    assert any(target.start for target in found) or case.name == "build"
    kill_and_look(bench, case, spread(found, SPREAD[case.name]))


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_killed_at_every_system_call(bench: Bench, case: Case) -> None:
    kill_and_look(bench, case, targets_of(bench, case))


def end_and_look(bench: Bench, case: Case, numbers: Iterator[int] | list[int]) -> int:
    """End patchkit at its n-th call; the number of ends."""
    ended = 0
    for number in numbers:
        folder = bench.folder(case)
        code = bench.run(case, folder, exit_at=number)
        assert code in (0, EXITED), (bench.root / "said").read_text()
        try:
            aftermath(case, folder, at_once=number % 2 == 1)
        except Exception as error:
            raise AssertionError(f"{case.name}, ended at call {number}: {error}") from error
        if code == 0:
            break
        ended += 1
    return ended


@pytest.mark.skipif(shutil.which("strace") is not None, reason="strace does it better")
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_ended_at_some_of_its_own_calls(bench: Bench, case: Case) -> None:
    assert end_and_look(bench, case, list(range(5, 400, 25))) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_ended_at_each_of_its_own_calls(bench: Bench, case: Case) -> None:
    assert end_and_look(bench, case, iter(range(1, 10_000))) > 40
