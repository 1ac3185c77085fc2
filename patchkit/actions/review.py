"""What a hosting service checks of a range of commits: every tree in it, and the merges, without a base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchkit.errors import BadInput, PatchkitError
from patchkit.facts import Fact, altered
from patchkit.git.store import GitStore
from patchkit.inspection import inspect_layout, inspect_numbers
from patchkit.merging.merges import Violation
from patchkit.problem import Problem, one_line
from patchkit.stack import StoredPatch, problems, read_stack

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Review", "review"]


@dataclass(frozen=True)
class Review:
    """What was found in ``old``..``new``; facts with the patch they belong to.

    ``known`` is False where one of the two ends cannot be believed, so that the facts are not compared.
    """

    old: str
    new: str
    commits: int
    problems: list[Problem]
    known: bool
    added: list[tuple[Fact, str]]
    removed: list[tuple[Fact, str]]
    changed: list[tuple[Fact, Fact, str]]
    settings_changed: bool

    def to_dict(self) -> dict[str, Any]:
        def plain(fact: Fact, patch: str) -> dict[str, str]:
            return {"patch": patch, "subject": fact.subject, "prompt": fact.prompt, "target": fact.target}

        return {
            **{name: getattr(self, name) for name in ("old", "new", "commits", "known", "settings_changed")},
            "problems": [problem.to_dict() for problem in self.problems],
            "added": [plain(*pair) for pair in self.added],
            "removed": [plain(*pair) for pair in self.removed],
            "changed": [
                {
                    **plain(after, patch),
                    "prompt_before": before.prompt,
                    "target_before": before.target,
                    "altered": altered(before, after),
                }
                for before, after, patch in self.changed
            ],
        }


def review(repository: Repository, words: str) -> Review:
    """Check the commits that ``words`` (BASE..HEAD) name; a problem is told with its first commit.

    The tip is checked as everything is that is believed, its history's merges among it; of each other
    commit the tree. NotFound for an end that is no commit.
    """
    store = repository.store
    start, dots, end = words.partition("..")
    if not dots or not start or end.startswith("."):
        raise BadInput(f"--ci {one_line(words)!r}: is no range; say BASE..HEAD")
    old, new = store.resolve(start), store.resolve(end or "HEAD")
    commits = store.git.read("rev_list", "--topo-order", "--reverse", new, f"^{old}").decode().split()
    found = _found(store, commits, old, new)
    before, after = _facts(store, old), _facts(store, new)
    known = before is not None and after is not None
    before, after = (before, after) if known else ({}, {})
    assert before is not None
    assert after is not None
    both = before.keys() & after.keys()
    return Review(
        old=old,
        new=new,
        commits=len(commits),
        problems=found,
        known=known,
        added=[(fact, patch) for key, (patch, fact) in after.items() if key not in both],
        removed=[(fact, patch) for key, (patch, fact) in before.items() if key not in both],
        changed=[
            (before[key][1], fact, patch)
            for key, (patch, fact) in after.items()
            if key in both and before[key][1] != fact
        ],
        settings_changed=_settings(store, old) != _settings(store, new),
    )


class _TreeAlone:
    """A memory for which every history was looked through: what is left to check is the tree."""

    def __init__(self, commit: str) -> None:
        self._commit = commit

    def recall(self, tree: str, base: str) -> list[StoredPatch] | None:
        return None

    def believe(self, tree: str, base: str, patches: Sequence[StoredPatch]) -> None:
        return

    def checked_merges(self) -> tuple[list[str], list[Violation]]:
        return [self._commit], []

    def remember_merges(self, tip: str, violations: Sequence[Violation]) -> None:
        return


def _found(store: GitStore, commits: Sequence[str], old: str, tip: str) -> list[Problem]:
    """The problems of all trees, each once, and of the numbers of versions that ``old`` has not."""
    found: dict[tuple[str, str], Problem] = {}
    files: set[str] = set()
    with suppress(PatchkitError):  # an end that cannot be read holds nothing that was looked at
        files.update(entry.oid for entry in store.tree(old).entries)
    seen: set[tuple[str, str | None]] = set()
    for commit in [*(commit for commit in commits if commit != tip), tip]:
        tree = store.tree(commit)
        same = tree.id, tree.settings.oid if tree.settings else None
        if commit != tip and same in seen:
            continue
        seen.add(same)
        memory = None if commit == tip else _TreeAlone(commit)
        folders, _ = inspect_layout(store, tree)
        for problem in (*problems(store, commit, memory=memory), *inspect_numbers(store, folders, files)):
            told = replace(problem, path=f"{commit[:10]}:{problem.path}")
            found.setdefault((problem.path, problem.message), told)
    return list(found.values())


def _facts(store: GitStore, commit: str) -> dict[Any, tuple[str, Fact]] | None:
    try:
        return dict(read_stack(store, commit, _TreeAlone(commit)).facts_in_force())
    except PatchkitError:
        return None


def _settings(store: GitStore, commit: str) -> str | None:
    settings = store.tree(commit).settings
    return settings.oid if settings else None
