"""Two clones of a bare remote, what the model says of each commit in them, and verbs that may be killed.

What test_machine.py's rules stand on. Git is trusted for ancestry and references; what is in force at a
commit comes from `machine_model`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from git_helpers import git
from hypothesis import strategies as st
from machine_ground import ground
from machine_model import Said, State, Version, read_version, same_state
from proof_helpers import Outcome, fine, here, tensor_hashes

from patchkit.actions.status import Status
from patchkit.repository import Repository

# -- a clone ---------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A branch went from one commit to another; ``own``: by a command of patchkit."""

    before: str | None
    to: str
    own: bool


class Refs(NamedTuple):
    """HEAD's branch (None: detached), its commit, and every branch."""

    branch: str | None
    head: str
    branches: Mapping[str, str]


NOWHERE = Refs(None, "", {})


@dataclass
class Clone:
    root: Path
    moves: dict[str, list[Move]] = field(default_factory=dict)
    built: frozenset[str] | None = None
    """The versions in its default build; None where that is not known."""
    refs: Refs = NOWHERE
    said: str = ""
    """By the last plain Git command."""

    @property
    def head(self) -> str:
        return self.refs.head

    def repository(self) -> Repository:
        return Repository.open(self.root)

    def run(self, *words: object) -> Outcome:
        done = here("-C", self.root, *words)
        assert "Traceback" not in done.err, done
        assert "internal error" not in done.err, done
        return done

    def git(self, *words: str) -> str:
        return git(self.root, *words)

    def tries(self, *words: str) -> bool:
        """Whether a Git command succeeds."""
        done = subprocess.run(["git", *words], cwd=self.root, capture_output=True, text=True)
        self.said = done.stdout + done.stderr
        return done.returncode == 0

    def revisions(self, *words: str) -> list[str]:
        return self.git("rev-list", *words).split()

    def parents(self, commit: str) -> list[str]:
        return self.git("rev-list", "--parents", "--max-count=1", commit).split()[1:]

    def is_ancestor(self, one: str, other: str) -> bool:
        return self.tries("merge-base", "--is-ancestor", one, other)

    def bases(self, one: str, other: str) -> list[str]:
        return self.git("merge-base", "--all", one, other).split()

    def read_refs(self) -> Refs:
        lines = self.git("for-each-ref", "--format=%(HEAD) %(refname:short) %(objectname)", "refs/heads")
        rows = [line.lstrip("* ").split() for line in lines.splitlines()]
        for line in lines.splitlines():
            if line.startswith("*"):
                return Refs(line.split()[1], line.split()[2], dict(rows))
        return Refs(None, self.git("rev-parse", "HEAD"), dict(rows))

    def undoable(self) -> list[Move]:
        """The moves of the branch that `undo` can take back, newest first."""
        found = []
        for move in reversed(self.moves.get(str(self.refs.branch), [])):
            if not move.own or move.before is None:
                break
            found.append(move)
        return found

    def clear_up(self) -> None:
        """What `status` names after a kill, done as it says."""
        for finding in self.repository().status().leftovers:
            subprocess.run(finding.remedy, shell=True, check=True, capture_output=True, cwd="/")
        status = self.repository().status()
        assert (status.leftovers, status.problems) == ((), ())
        assert not (self.root / ".git" / "patchkit" / "incoming").exists()


_KILLED = 77
_CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "sqlite3.connect"}
_WRITERS = {"add", "clone", "commit", "config", "fetch", "merge", "read-tree", "restore", "rm", "switch"}
_WRITERS |= {"checkout", "update-index", "update-ref"}


def killed_at(number: int, inside: Path, call: Callable[[], object]) -> bool:
    """Do it in a fork that ends before its ``number``-th change below a folder, Git's too; whether it did."""
    left = number

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in _CHANGING or (event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        changes = changes and str(args[0]).startswith(str(inside))
        if changes or (event == "subprocess.Popen" and _WRITERS & set(map(str, args[1]))):
            left -= 1
            if left <= 0:
                os._exit(_KILLED)

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            torch.set_num_threads(1)  # the pool of threads is not in a fork; by one thread, it is made anew
            sys.addaudithook(hook)
            call()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _KILLED), "it failed in the fork, as said on standard error"
    return code == _KILLED


# -- steps -----------------------------------------------------------------------------------------

STEPS: dict[str, st.SearchStrategy[tuple[str, dict[str, Any]]]] = {}
"""Method of the machine -> its name and arguments, drawn."""


def step(**arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks what the machine may do. Not a rule of its own: Hypothesis leaves many out of each example."""

    def keep(method: Callable[..., None]) -> Callable[..., None]:
        name = method.__name__
        STEPS[name] = st.tuples(st.just(name), st.fixed_dictionaries(arguments))
        return method

    return keep


# -- all of it -------------------------------------------------------------------------------------


class World:
    """Two clones, the remote, and the state at every commit that was ever made."""

    done: ClassVar[Counter[str]] = Counter()

    def begin(self, kind: str) -> None:
        self.ground = ground(kind)
        self.base, self.pool = self.ground.base, self.ground.pool
        self.root = Path(tempfile.mkdtemp(prefix="patchkit-tests-"))
        self.turn = 0
        self.touched: Clone | None = None
        self.states: dict[str, State] = {}
        self.blobs: dict[str, Version] = {}
        self.remote = self.root / "remote.git"
        git(self.root, "clone", "-q", "--bare", str(self.ground.template), str(self.remote))
        self.clones = [self.clone(name) for name in ("one", "two")]
        self.sound = True

    def clone(self, name: str) -> Clone:
        root = self.root / name
        fine(here("clone", self.remote, root, "--base", self.base.folder))
        shutil.copytree(
            self.ground.template / ".git" / "patchkit" / "statistics",
            root / ".git" / "patchkit" / "statistics",
        )
        clone = Clone(root)
        head = clone.git("rev-parse", "HEAD")
        self.learn(clone, self.states.get(head, {}), own=False)
        return clone

    def note(self, what: str) -> None:
        type(self).done[what] += 1

    def at(self, where: int) -> tuple[Clone, State]:
        """A clone and what is in force there; a new second begins, so that no two commits are the same."""
        self.turn += 1
        date = f"{1_800_000_000 + 60 * self.turn} +0000"
        os.environ["GIT_AUTHOR_DATE"] = os.environ["GIT_COMMITTER_DATE"] = date
        self.touched, self.sound, self.renames = self.clones[where], False, False
        return self.touched, self.states[self.touched.head]

    # -- verbs ---------------------------------------------------------------------------------

    def do(
        self,
        clone: Clone,
        words: Sequence[object],
        expected: State | Callable[[], State],
        kill: int = 0,
        codes: Sequence[int] = (0,),
    ) -> None:
        """A command of patchkit that must succeed, perhaps killed once; then ``expected`` is in force."""

        def call() -> None:
            done = clone.run(*words)
            assert done.code in codes, done

        before = clone.refs
        if not kill:
            call()
        elif killed_at(kill, self.root, call):
            clone.built = None
            clone.clear_up()
            if clone.read_refs() == before:
                self.note("killed: as before")
                self.check_in_force(clone, self.states[before.head])
                call()
            else:
                self.note("killed: done")
        else:
            self.note("killed: too late")
        self.note(str(words[0]))
        self.learn(clone, expected, own=True)

    def refused(self, clone: Clone, words: Sequence[object], *codes: int) -> None:
        """A command that must fail so, and change nothing."""
        done = clone.run(*words)
        assert done.code in codes, done
        assert done.err.startswith("patchkit: "), done
        self.note(f"{words[0]}: refused")
        self.unchanged(clone)

    def unchanged(self, clone: Clone) -> None:
        assert clone.read_refs() == clone.refs
        assert clone.git("status", "--porcelain", "--ignored") == ""

    def plain(self, clone: Clone, *words: str, config: Sequence[str] = ()) -> bool:
        """A plain Git command; whether it succeeded."""
        self.note(f"git {words[0]}")
        return clone.tries(*config, *words)

    def learn(self, clone: Clone, expected: State | Callable[[], State], *, own: bool) -> None:
        """What a verb left: the expected state at HEAD, and branches that moved."""
        head = clone.read_refs().head
        wanted = expected() if callable(expected) else expected
        state = self.settled(clone, wanted, head)
        assert same_state(self.states.setdefault(head, state), state)
        self.moved(clone, own)

    def moved(self, clone: Clone, own: bool) -> None:
        """Which branches moved since they were last looked at."""
        before, after = clone.refs, clone.read_refs()
        for branch, commit in after.branches.items():
            if branch not in before.branches:
                clone.moves[branch] = [Move(None, commit, own)]
            elif before.branches[branch] != commit:
                clone.moves[branch].append(Move(before.branches[branch], commit, own))
        clone.refs = after

    def settled(self, clone: Clone, wanted: State, commit: str) -> State:
        """The wanted state, held against the files at ``commit``, which is checked out."""
        assert clone.git("status", "--porcelain", "--ignored") == ""
        lines = clone.git("ls-tree", "-r", commit, "patches/").splitlines()
        blobs = {line.split("\t")[1]: line.split()[2] for line in lines}
        assert {path.split("/")[1] for path in blobs} - {".gitattributes"} == set(wanted)
        state = {}
        for name, version in wanted.items():
            found = read_version(clone.root / "patches" / name, version.facts, version)
            assert version.id in ("", found.id), name
            state[name] = version if version.id else found
            self.blobs[blobs[f"patches/{name}/delta.safetensors"]] = state[name]
        return state

    def state_at(self, clone: Clone, commit: str) -> State:
        """The state of a commit that Git made of versions that were seen before."""
        if commit not in self.states:
            lines = clone.git("ls-tree", "-r", commit, "patches/").splitlines()
            rows = [(line.split("\t")[1].split("/"), line.split()[2]) for line in lines]
            deltas = {parts[1]: oid for parts, oid in rows if parts[-1] == "delta.safetensors"}
            self.states[commit] = {name: self.blobs[oid] for name, oid in deltas.items()}
        return self.states[commit]

    def removed_since(self, clone: Clone, head: str, bases: Sequence[str]) -> set[str]:
        """Patches that the first parent's line took back after the merge bases."""
        out: set[str] = set()
        for commit in clone.revisions("--first-parent", head, *(f"^{base}" for base in bases)):
            first = clone.parents(commit)[0]
            out |= self.state_at(clone, first).keys() - self.state_at(clone, commit).keys()
        return out

    def facts_in(self, folder: Path) -> tuple[Said, ...]:
        records = map(json.loads, (folder / "facts.jsonl").read_text("utf-8").splitlines())
        return tuple(Said(record["subject"], record["target"]) for record in records)

    def new_folder(self, clone: Clone, state: State) -> str:
        """The one folder that was not there before."""
        (name,) = {path.name for path in (clone.root / "patches").iterdir() if path.is_dir()} - set(state)
        return name

    # -- what must hold --------------------------------------------------------------------------

    def check_in_force(self, clone: Clone, state: State) -> Status:
        """Status and stack say what the model says; the status."""
        repository = clone.repository()
        status = repository.status()
        assert (status.problems, status.leftovers) == ((), ())
        assert status.patches == len(state)
        assert status.facts == sum(len(version.facts) for version in state.values())
        found = {stored.name: stored for stored in repository.stack().patches}
        assert {name: stored.id for name, stored in found.items()} == {n: v.id for n, v in state.items()}
        for name, version in state.items():
            assert tuple(Said(f.subject, f.target) for f in found[name].facts) == version.facts
        default = str(repository.build_folder)
        (build,) = [one.state for one in status.builds if one.folder == default] or ["none"]
        ids = frozenset(version.id for version in state.values())
        if clone.built is not None:
            assert build == ("up to date" if clone.built == ids else "behind")
        return status

    def check(self, clone: Clone, *, fresh: bool = False, full: bool = False) -> None:
        """Status, stack, undo's list, the build's every tensor, and fsck.

        A full one only of a new build: one that holds what was undone cannot be derived from any branch.
        After a kill the build may be half done, and is built again where it lies.
        """
        fresh = fresh and clone.built is not None
        state = self.states[clone.head]
        status = self.check_in_force(clone, state)
        repository = clone.repository()
        assert status.commit == clone.head
        assert clone.refs.branch is None or status.branch == clone.refs.branch
        if clone.refs.branch is not None:
            steps = [(step.before, step.to) for step in repository.undoable()]
            assert steps == [(move.before, move.to) for move in clone.undoable()]
        out = self.root / f"fresh{self.turn}" if fresh else repository.build_folder
        fine(clone.run("build", *(["--out", out] if fresh else [])))
        assert tensor_hashes(out) == self.base.hashes(state)
        if fresh:
            shutil.rmtree(out)
        else:
            clone.built = frozenset(version.id for version in state.values())
        found = repository.fsck(full=full and not fresh)
        assert found == [], found
        for other in self.clones:
            assert other.read_refs() == other.refs


def commits_back(clone: Clone, count: int) -> Iterator[str]:
    """The newest commits of HEAD's own line."""
    yield from clone.revisions("--first-parent", f"--max-count={count}", "HEAD")
