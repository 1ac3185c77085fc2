"""Which commit made or broke an answer: a search of the history by halves, without touching the work tree.

Git chooses what is looked at (`git rev-list --bisect-all`, limited to the commits that touch the stack), so
merges are searched as `git bisect` searches them. A commit is answered by its stack on one loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.git.history import PATCHES, Commit, read_history
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.algebra.factors import Patch
    from patchkit.git.store import GitStore
    from patchkit.repository import Repository
    from patchkit.stack import Stack

__all__ = ["BASE", "Bisected", "Step", "bisect", "first_change"]

BASE = "base"
"""The base with nothing on it, as the older end."""

Says = Callable[[str], bool]
"""Whether the model at a commit gives the answer; a `PatchkitError` where that commit cannot be asked."""


@dataclass(frozen=True)
class Step:
    """One commit that was asked; ``says`` is None where it could not be, for ``reason``."""

    commit: str
    says: bool | None
    reason: str | None = None


@dataclass(frozen=True)
class Bisected:
    """What was found: the first commit with the newer end's answer, or those that it may be.

    ``made``: whether that commit made the answer (else it broke it). ``suspects`` are the ids that are left
    where commits in between could not be asked; ``commit`` is then None.
    """

    made: bool
    commit: Commit | None
    suspects: tuple[str, ...]
    steps: tuple[Step, ...]
    candidates: int
    """Commits that it could have been."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "change": "made" if self.made else "broken",
            "commit": None if self.commit is None else self.commit.to_dict(),
            "suspects": list(self.suspects),
            "candidates": self.candidates,
            "evaluations": sum(step.says is not None for step in self.steps),
            "steps": [vars(step) for step in self.steps],
        }


def bisect(
    repository: Repository,
    prompt: str,
    expect: str,
    *,
    good: str = BASE,
    bad: str = "HEAD",
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Bisected:
    """The commit between ``good`` (older) and ``bad`` (newer) from which on ``prompt`` is answered otherwise.

    An answer is ``expect`` where greedy free generation begins with it (`generation.says`).
    """
    if not prompt.strip() or not expect.strip():
        raise BadInput("--prompt and --expect need a text; ask for what the model is to say")
    ends(repository.store, good, bad)  # what is wrong with them is said before a model is loaded
    asker = _Asker(repository, prompt, expect, device)
    return first_change(repository.store, asker, good=good, bad=bad, progress=progress)


class _Asker:
    """Asks the prompt of the stacks of commits: one model, patches read once, like trees asked once."""

    def __init__(self, repository: Repository, prompt: str, expect: str, device: str) -> None:
        self._repository, self._prompt, self._expect = repository, prompt, expect
        self._bench = repository.workbench(device)
        self._base = repository.settings.base_fingerprint
        self._patches: dict[str, Patch] = {}

    def __call__(self, commit: str) -> bool:
        from patchkit.evaluation.generation import continue_greedily, room_for, says

        if commit == BASE:
            self._bench.put(())
        else:
            fingerprint = self._repository.store.settings(commit).base_fingerprint
            if fingerprint != self._base:
                raise BadInput(f"{commit[:10]}: stands on another base than HEAD; name ends with one base")
            self._put(self._repository.stack(commit))
        model, tokenizer = self._bench.model, self._bench.tokenizer
        room = room_for(tokenizer, [self._expect])
        (said,) = continue_greedily(model, tokenizer, [self._prompt], room)
        return says(said, self._expect)

    def _put(self, stack: Stack) -> None:
        wanted = {stored.id: stored for stored in stack.patches}
        for patch_id in wanted.keys() - self._patches.keys():
            self._patches[patch_id] = self._repository.patch(wanted[patch_id])
        self._bench.put(self._patches[patch_id] for patch_id in wanted)


def ends(store: GitStore, good: str, bad: str) -> tuple[str, str]:
    """The two ends' full ids ("base" stays); BadInput unless the older one is in the newer one's history."""
    newer = store.resolve(bad)
    if good == BASE:
        return BASE, newer
    older = store.resolve(good)
    if older == newer or not store.is_ancestor(older, newer):
        raise BadInput(
            f"--good {one_line(good)}: is not in the history before {one_line(bad)}; "
            "--good names the older end, --bad the newer one"
        )
    return older, newer


def first_change(
    store: GitStore,
    says: Says,
    *,
    good: str = BASE,
    bad: str = "HEAD",
    progress: Callable[[str, int, int], None] | None = None,
) -> Bisected:
    """Search by halves: at most ⌈log₂ n⌉ commits of a straight history of n, and the two ends."""
    older, newer = ends(store, good, bad)
    search = _Search(store, says, older, newer, progress or (lambda phase, done, total: None))
    return search.run()


class _Search:
    """The commits in doubt are those reachable from ``newer`` and from none of ``older``.

    With a commit as the older end, only those that stand on it: of a branch that forked before it, the merge
    that brought it in is found.
    """

    def __init__(
        self, store: GitStore, says: Says, older: str, newer: str, progress: Callable[[str, int, int], None]
    ) -> None:
        self.store, self.says, self.progress = store, says, progress
        self.older, self.newer = [older], newer
        self.above = self._above()
        self.steps: list[Step] = []
        self.skipped: set[str] = set()
        self.known: dict[str, bool] = {}  # by tree

    def run(self) -> Bisected:
        before, after = (self._end(commit) for commit in (self.older[0], self.newer))
        if before == after:
            told = "both ends give" if before else "neither end gives"
            raise NotFound(f"{told} that answer, so no commit between them is found; name ends that differ")
        doubted = self._doubted()
        candidates = total = len(doubted)
        rounds = max(total - 1, 0).bit_length()
        while len(doubted) > 1:
            self.progress("searching", min(len(self.steps) - 2, rounds), rounds)
            chosen = next((c for c in doubted if c not in self.skipped and c != self.newer), None)
            if chosen is None:
                break
            answer = self._ask(chosen)
            if answer is None:
                self.skipped.add(chosen)
            elif answer == after:
                self.newer = chosen
            else:
                self.older.append(chosen)
            doubted = self._doubted()
        self.progress("searching", rounds, rounds)
        found = read_history(self.store, doubted[0], 1)[0] if len(doubted) == 1 else None
        suspects = () if found else tuple(doubted)
        return Bisected(after, found, suspects, tuple(self.steps), candidates)

    def _end(self, commit: str) -> bool:
        """The answer of an end, which has to be one."""
        answer = self.says(commit)
        self._remember(commit, answer)
        return answer

    def _ask(self, commit: str) -> bool | None:
        tree = self.store.tree(commit).id
        if tree in self.known:
            return self.known[tree]
        try:
            answer = self.says(commit)
        except PatchkitError as error:
            self.steps.append(Step(commit, None, one_line(error.message)))
            return None
        self._remember(commit, answer)
        return answer

    def _remember(self, commit: str, answer: bool) -> None:
        self.known["" if commit == BASE else self.store.tree(commit).id] = answer
        self.steps.append(Step(commit, answer))

    def _doubted(self) -> list[str]:
        """The commits in doubt that touch the stack, the one that halves them best first."""
        out = self.store.git.read(
            "rev_list",
            "--bisect-all",
            "--full-history",  # else a merge that left the stack as one parent had it hides the other
            self.newer,
            *(f"^{commit}" for commit in self.older if commit != BASE),
            "--",
            f":(top,literal){self.store.prefix}{PATCHES}",
            f":(top,literal,exclude){self.store.prefix}{PATCHES}/.gitattributes",
        )
        found = re.findall(r"^([0-9a-f]{40,64})", out.decode("ascii", "replace"), re.MULTILINE)
        return [commit for commit in found if self.above is None or commit in self.above]

    def _above(self) -> set[str] | None:
        """The commits that stand on the older end; None where that is the base, on which all stand.

        What forked before it stands without its patches, and would answer for them.
        """
        if BASE in self.older:
            return None
        out = self.store.git.read("rev_list", "--ancestry-path", f"{self.older[0]}..{self.newer}")
        return set(out.decode("ascii").split())
