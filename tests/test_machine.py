"""Every verb in any order, killed or not, in two clones of one remote, with plain Git in between.

The model is a set of facts and patches for each commit, and of these follows the hash of every tensor
(`machine_model`). After each step `status` has to say what is in force, `undo --list` what can be undone,
a build has to hold exactly the model's tensors, and `fsck` has nothing to say.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from machine_commands import Changing, Joining, Keeping
from machine_ground import KINDS
from machine_plain import Plain
from machine_world import STEPS
from proof_helpers import as_person


class Knowledge(Changing, Joining, Keeping, Plain, RuleBasedStateMachine):
    """Two clones of a remote."""

    def __init__(self) -> None:
        super().__init__()
        self.person = as_person()
        context = self.person.__enter__()
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
        context.setattr(os, "fsync", lambda _: None)  # what is durable is proved elsewhere
        context.setenv("GIT_AUTHOR_DATE", "1800000000 +0000")
        context.setenv("GIT_COMMITTER_DATE", "1800000000 +0000")

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        numbers=st.lists(st.integers(0, 9), max_size=4),
        many=st.integers(0, 99),
    )
    def start(self, kind: str, numbers: list[int], many: int) -> None:
        """Both clones hold the same few patches, and a branch beside main."""
        assume(many)  # the example of nothing but zeros is one verb again and again
        self.begin(kind)
        for number in numbers:
            self.apply(0, number, True, 1.0, 0)
        self.push(0)
        for where in (0, 1):
            self.pull(where, 0)
            self.git_tag_or_branch(where, "branch")

    @precondition(lambda self: hasattr(self, "clones"))
    @rule(step=st.one_of([STEPS[name] for name in sorted(STEPS)]))
    def do_one(self, step: tuple[str, dict[str, Any]]) -> None:
        name, arguments = step
        getattr(self, name)(**arguments)

    @precondition(lambda self: hasattr(self, "clones"))
    @invariant()
    def all_is_as_the_model_says(self) -> None:
        self.note("steps")
        for clone in self.clones:
            if self.turn and clone is self.touched:
                self.check(clone, fresh=self.turn % 4 == 0, full=self.turn % 3 == 0)
        self.sound = True

    def teardown(self) -> None:
        failed = not getattr(self, "sound", True)
        try:
            if hasattr(self, "clones") and not failed:
                for clone in self.clones:
                    self.check(clone, full=True)
        finally:
            if failed:
                print(f"what it failed on lies in {self.root}")
            elif hasattr(self, "root"):
                shutil.rmtree(self.root)
            torch.set_num_threads(self.threads)
            self.person.__exit__(None, None, None)


# A step takes half a second, so to shrink would take hours; the steps of a failure are printed.
PROFILE = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


class TestKnowledge(Knowledge.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(PROFILE, max_examples=2, stateful_step_count=15, derandomize=True)


VERBS = """
apply, commit, revert, stack, refit, undo, redo, switch, merge, pull, clone, gc, reindex, fsck,
git revert, git merge, git cherry-pick, git rebase, git reset, git checkout, git rm, git commit,
git stash, git clean, git tag, git branch, git push
"""


class KnowledgeAtLength(Knowledge):
    """Counts what it did, so that a rule that never did anything is found."""

    done: ClassVar[Counter[str]] = Counter()


class TestKnowledgeAtLength(KnowledgeAtLength.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(PROFILE, max_examples=5, stateful_step_count=210)
    pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]  # noqa: RUF012

    @classmethod
    def tearDownClass(cls) -> None:
        """Each verb was done, not only drawn."""
        done = KnowledgeAtLength.done
        for what, count in sorted(done.items()):
            print(f"{count:6} {what}")
        assert done["steps"] >= 1000
        assert not {verb.strip() for verb in VERBS.split(",")} - done.keys()
