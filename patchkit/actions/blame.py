"""Which patch makes the model say something: by the facts' text, or by leaving each patch out in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.actions.log import history_of
from patchkit.errors import BadInput, NotFound
from patchkit.facts import Fact, normal
from patchkit.git.history import Commit, writers_of
from patchkit.problem import one_line
from patchkit.stack import Stack

if TYPE_CHECKING:
    from patchkit.actions.workbench import Workbench
    from patchkit.repository import Repository

__all__ = ["Blamed", "Influence", "Responsible", "matching", "measure"]


@dataclass(frozen=True)
class Responsible:
    """A fact in force that says it, its patch, and the commit by which that patch came to say it."""

    patch: str
    line: int
    fact: Fact
    commit: Commit | None

    def to_dict(self) -> dict[str, Any]:
        commit = self.commit
        return {
            "patch": self.patch,
            "line": self.line,
            "subject": self.fact.subject,
            "prompt": self.fact.prompt,
            "target": self.fact.target,
            "source": self.fact.source,
            "commit": None if commit is None else commit.id,
            "author": None if commit is None else commit.author,
            "date": None if commit is None else commit.date.isoformat(),
            "message": None if commit is None else commit.subject,
        }


@dataclass(frozen=True)
class Influence:
    """One patch left out: P(answer) then, what the model says then, and the commit that wrote the patch."""

    patch: str
    without: float
    says: str
    commit: Commit | None


@dataclass(frozen=True)
class Blamed:
    """P(answer) after ``prompt`` on the whole stack and on the base, and each patch left out, the one whose
    absence costs the answer most first."""

    prompt: str
    answer: str
    says: str
    probability: float
    base: float
    influences: tuple[Influence, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "says": self.says,
            "probability": self.probability,
            "base": self.base,
            "patches": [
                {
                    "patch": item.patch,
                    "without": item.without,
                    "says": item.says,
                    "commit": None if item.commit is None else item.commit.id,
                    "author": None if item.commit is None else item.commit.author,
                    "date": None if item.commit is None else item.commit.date.isoformat(),
                }
                for item in self.influences
            ],
        }


def matching(repository: Repository, text: str, revision: str = "HEAD") -> list[Responsible]:
    """The facts in force that ``text`` means: by id, subject, prompt or paraphrase, or one with its target.

    Compared as keys are: case and spaces do not matter. No model is needed.
    """
    stack = repository.stack(revision)
    wanted = normal(text)
    found = [
        (patch.name, line, fact)
        for patch in stack.patches
        for line, fact in enumerate(patch.facts, 1)
        if wanted in _names(fact)
    ]
    origins = _origins(repository, stack, [(name, fact) for name, _, fact in found])
    return [Responsible(name, line, fact, origins.get((name, fact.key))) for name, line, fact in found]


def _names(fact: Fact) -> set[str]:
    prompts = [fact.text, *fact.paraphrases]
    texts = [fact.subject, *prompts, *(f"{prompt} {fact.target}" for prompt in prompts)]
    return {normal(text) for text in [*texts, *([fact.id] if fact.id else [])]}


def _origins(
    repository: Repository, stack: Stack, facts: list[tuple[str, Fact]]
) -> dict[tuple[str, tuple[str, str]], Commit]:
    """For each (patch, fact) the newest commit by which that patch came to say it so; the merge that
    brought it in only where no other commit did."""
    wanted = {(name, fact.key): fact for name, fact in facts}
    found: dict[tuple[str, tuple[str, str]], Commit] = {}
    brought: dict[tuple[str, tuple[str, str]], Commit] = {}
    if not wanted or stack.commit is None:
        return found
    for entry in history_of(repository.store, repository.store.history(stack.commit)):
        for move in entry.facts or ():
            mark = (move.patch, move.fact.key)
            if move.kind != "removed" and mark in wanted and move.fact == wanted[mark]:
                (brought if len(entry.commit.parents) > 1 else found).setdefault(mark, entry.commit)
        if len(found) == len(wanted):
            break
    return {**brought, **found}


def measure(
    repository: Repository,
    prompt: str,
    *,
    answer: str | None = None,
    revision: str = "HEAD",
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Blamed:
    """P(``answer``) after ``prompt`` with each patch left out in turn (`Workbench.without`).

    The answer is the first word that the model says, where none is given. One model is loaded; a patch costs
    the subtraction of its factors from its own weights, one scoring and one short generation.
    """
    from patchkit.evaluation.generation import continue_greedily

    if not prompt.strip():
        raise BadInput("there is no prompt to ask; give a fact or a prompt")
    stack = repository.stack(revision)
    if not stack.patches:
        raise NotFound("no patch is in force, so what the model says is the base's own; see patchkit ask")
    writers = writers_of(repository.store.history(revision), merges=False)
    bench = repository.workbench(device)

    def said() -> str:
        return continue_greedily(bench.model, bench.tokenizer, [prompt])[0]

    patches = {stored.name: repository.patch(stored) for stored in stack.patches}
    bench.put(patches.values())
    whole = said()
    answer = answer if answer is not None else _first_word(whole, prompt)
    probability = _probability(bench, prompt, answer)
    influences = []
    for number, (name, patch) in enumerate(patches.items()):
        if progress:
            progress("leaving out", number, len(patches))
        with bench.without(patch):
            without = _probability(bench, prompt, answer)
            influences.append(Influence(name, without, said(), writers.get(name)))
    if progress:
        progress("leaving out", len(patches), len(patches))
    bench.use({})
    base = _probability(bench, prompt, answer)
    ordered = sorted(influences, key=lambda item: item.without)
    return Blamed(prompt, answer, whole, probability, base, tuple(ordered))


def _probability(bench: Workbench, prompt: str, answer: str) -> float:
    from patchkit.evaluation.likelihood import score_targets

    return score_targets(bench.model, bench.tokenizer, [(prompt, answer)])[0].probability


def _first_word(said: str, prompt: str) -> str:
    """The answer without what follows: the first word, without the marks behind it."""
    words = said.split()
    if not words:
        raise BadInput(
            f"the model says nothing after {one_line(prompt)!r}; say what to look for: --answer TEXT"
        )
    return words[0].rstrip(".,;:!?\"')]}") or words[0]
