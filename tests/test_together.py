"""Three processes in one repository commit, pull and collect garbage, while a clone feeds its remote.

Each command ends well or says that the repository is busy; nothing that was committed is lost, and in the
end both clones hold the same, to the hash of every tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from git_helpers import git
from machine_model import State, read_version
from machine_world import World
from proof_helpers import as_person, fine, fresh, here, tensor_hashes

from patchkit.repository import Repository

BUSY = 75
DIVERGED = 3
IN_FORCE = 6  # of one writer: then its oldest are taken back


class Ran(NamedTuple):
    """A command of one process: how it ended, and after how long."""

    who: str
    words: list[str]
    code: int
    err: str
    seconds: float


class Worker:
    """What one process does to one clone until its time is over; every command is written down."""

    def __init__(self, who: str, root: Path, log: Path, made: Callable[[int], Path], first: int) -> None:
        self.who, self.root, self.log, self.made, self.number = who, root, log, made, first
        self.mine: list[str] = []
        self.pause = self.until = 0.0

    def run(self, *words: object, apart: bool = False) -> int:
        start = time.monotonic()
        done = (fresh if apart else here)("-C", self.root, *words)
        ran = Ran(self.who, [str(word) for word in words], done.code, done.err, time.monotonic() - start)
        with self.log.open("a") as file:
            file.write(json.dumps(ran) + "\n")
        return done.code

    def commit(self) -> None:
        """A patch more, or the oldest of its own fewer."""
        if len(self.mine) >= IN_FORCE:
            if self.run("revert", *self.mine[:3]) == 0:
                del self.mine[:3]
            return
        folder = self.made(self.number)
        self.number += 1
        if self.run("apply", folder) == 0:
            self.mine.append(folder.name)

    def commit_now_and_then(self) -> None:
        self.commit()
        time.sleep(self.pause)

    def exchange(self) -> bool:
        """What the other clone pushed comes here, and what is here goes there; whether it did."""
        if self.run("pull") == DIVERGED:
            self.run("merge", "@{upstream}")
        done = subprocess.run(["git", "push", "-q"], cwd=self.root, capture_output=True).returncode == 0
        with self.log.open("a") as file:
            file.write(json.dumps(Ran(self.who, ["pushed" if done else "not pushed"], 0, "", 0)) + "\n")
        return done

    def feed(self) -> None:
        self.commit_now_and_then()
        while not self.exchange() and time.monotonic() < self.until:
            pass

    def collect(self) -> None:
        for words in (["gc", "--grace", "0"], ["status"], ["log"], ["fsck"], ["build"], ["reindex"]):
            self.run(*words)
        for words in (["pack-refs", "--all"], ["repack", "-q"]):
            subprocess.run(["git", *words], cwd=self.root, capture_output=True)

    def look_apart(self) -> None:
        """The same as a person does it, each command a process of its own."""
        self.run("status", apart=True)
        self.collect()


def started(worker: Worker, work: Callable[[], None], seconds: float, left: Path) -> int:
    """A process that does ``work`` again and again; its patches in force are in ``left`` when it ends."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            worker.pause, worker.until = seconds / 60, time.monotonic() + seconds
            while time.monotonic() < worker.until:
                work()
            left.write_text(json.dumps(worker.mine))
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return child


@pytest.fixture
def world() -> World:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    with as_person():
        found = World()
        found.begin("llama")
        yield found
        shutil.rmtree(found.root)
    torch.set_num_threads(threads)


def together(world: World, seconds: float, *, apart: bool) -> list[Ran]:
    made: Callable[[int], Path] = lambda number: world.ground.patch(number, [(number, "chess")])[0]  # noqa: E731
    one, two = (clone.root for clone in world.clones)
    log = world.root / "log"
    workers = {
        name: Worker(name, root, log, made, first)
        for name, root, first in (
            ("commits", one, 1000),
            ("pulls", one, 0),
            ("collects", one, 0),
            ("feeds", two, 5000),
        )
    }
    work = {
        "commits": workers["commits"].commit_now_and_then,
        "pulls": workers["pulls"].exchange,
        "collects": workers["collects"].look_apart if apart else workers["collects"].collect,
        "feeds": workers["feeds"].feed,
    }
    children = [started(workers[name], work[name], seconds, world.root / name) for name in work]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)
    return [Ran(*json.loads(line)) for line in log.read_text().splitlines()]


def _as_it_should(ran: Ran) -> bool:
    allowed = {0, BUSY, DIVERGED} if ran.words[0] == "pull" else {0, BUSY}
    return ran.code in allowed and "Traceback" not in ran.err and "internal error" not in ran.err


def ended_well(world: World, ran: list[Ran]) -> None:
    bad = {(each.who, each.words[0], each.err) for each in ran if not _as_it_should(each)}
    assert not bad, "\n".join(map(str, sorted(bad)[:20]))
    one, two = (clone.root for clone in world.clones)
    for root in (one, two, one):
        Worker("last", root, world.root / "log", lambda _: one, 0).exchange()
    names = {n for who in ("commits", "feeds") for n in json.loads((world.root / who).read_text())}
    for root in (one, two):
        holds(world, root, names)


def holds(world: World, root: Path, names: set[str]) -> None:
    """The named patches and no others, all that is kept whole, and the build of exactly these."""
    repository = Repository.open(root)
    status = repository.status()
    assert (status.leftovers, status.problems) == ((), ())
    assert {stored.name for stored in repository.stack().patches} == names
    assert git(root, "status", "--porcelain", "--ignored") == ""
    state: State = {}
    for name in names:
        number = int(name.split("-")[1])
        _, version = world.ground.patch(number, [(number, "chess")])
        state[name] = read_version(root / "patches" / name, version.facts, version)
        assert state[name].id == version.id
    fine(here("-C", root, "build"))
    assert tensor_hashes(repository.build_folder) == world.base.hashes(state)
    assert repository.fsck(full=True) == []
    assert not list((root / ".git").rglob("*.lock"))


def told(ran: list[Ran]) -> None:
    """How often each command ended how."""
    counts = Counter((each.who, each.words[0], each.code) for each in ran)
    for (who, word, code), count in sorted(counts.items()):
        print(f"{count:6} {who}: {word} ({code})")


def test_three_processes_lose_nothing(world: World) -> None:
    ran = together(world, 5, apart=False)
    told(ran)
    ended_well(world, ran)
    assert {each.who for each in ran} == {"commits", "pulls", "collects", "feeds"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_processes_lose_nothing_in_five_minutes(world: World) -> None:
    ran = together(world, 300, apart=True)
    told(ran)
    ended_well(world, ran)
    done = Counter(each.words[0] for each in ran if each.code == 0)
    assert {"apply", "revert", "pull", "merge", "gc", "fsck", "pushed"} <= done.keys()
