"""Taking back: whole patches, all that a commit did to patches, or single facts of one patch.

Nothing is subtracted. A revert is a commit whose stack holds less; the model of that stack is the
base with the patches that remain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import Taken, record, refittable, solved_on_top, take_out
from patchkit.errors import BadInput, Busy, NotFound
from patchkit.facts import load_canonical, normal
from patchkit.git.store import Changes, Commit
from patchkit.inspection import odd_twin
from patchkit.merging.merges import is_shallow
from patchkit.patch import DELTA, FACTS, read_patch_header
from patchkit.settings import FILE as SETTINGS
from patchkit.stack import Ambiguous, Stack, StoredPatch, find_patch

if TYPE_CHECKING:
    from patchkit.evaluation.measure import FactChange
    from patchkit.repository import Repository

__all__ = ["Reverted", "revert"]


@dataclass(frozen=True)
class Reverted:
    """What was taken back; ``commit`` is None for a dry run."""

    removed: tuple[str, ...] = ()
    """Patches that left whole."""
    taken: tuple[Taken, ...] = ()
    """Facts that left patches which stay."""
    restored: tuple[str, ...] = ()
    """Patches that a reverted commit had removed or changed, as they were before it."""
    above: tuple[str, ...] = ()
    """Patches still in force that were solved on top of what left."""
    refittable: tuple[str, ...] = ()
    """Those of ``above`` that `patchkit refit` can solve again."""
    message: str = ""
    commit: str | None = None
    checked: tuple[FactChange, ...] = ()
    """The facts of ``above`` before and after, where that was asked for."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "removed": list(self.removed),
            "facts": [
                {"patch": taken.patch, "prompt": fact.text, "target": fact.target}
                for taken in self.taken
                for fact in taken.facts
            ],
            "restored": list(self.restored),
            "solved_on_top": list(self.above),
            "refittable": list(self.refittable),
            "checked": [change.to_dict() for change in self.checked],
            "commit": self.commit,
        }


@dataclass
class _Plan:
    changes: Changes
    removed: tuple[str, ...] = ()
    taken: tuple[Taken, ...] = ()
    restored: tuple[str, ...] = ()
    left: set[str] = field(default_factory=set)
    """Ids of versions that leave."""
    subject: str = ""
    trailers: tuple[tuple[str, str], ...] = ()


def revert(
    repository: Repository,
    words: Sequence[str] = (),
    *,
    facts: Sequence[str] = (),
    message: str | None = None,
    check: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Reverted:
    """Take back what ``words`` name (patches, or one commit; none: the newest patch), or ``facts`` of one.

    ``facts`` are ids, or line numbers in the patch's facts.jsonl. One new commit. NotFound names
    what there is no such thing of; BadInput what cannot be taken back as it stands. ``check`` measures
    the facts of the patches that were solved on top of what leaves, before and after (loads the model).
    """
    if not dry_run:
        repository.store.ensure_ready()
    began_on = repository.store.standing()
    stack = repository.stack()
    plan = _plan(repository, stack, words, facts)
    _refuse_twice(stack, plan.changes)
    leaving = [stored for stored in stack.patches if stored.id in plan.left]
    above = tuple(name for name in solved_on_top(stack, leaving) if name not in plan.removed)
    text = message or plan.subject
    checked = _checked(repository, stack, plan, above, device, progress) if check and above else ()
    again = refittable(stack, above)
    done = Reverted(plan.removed, plan.taken, plan.restored, above, again, text, None, checked)
    if dry_run:
        return done

    def still_right(now: Stack) -> None:
        for name in [*plan.removed, *plan.changes.patches]:
            if stack.get(name) != now.get(name):
                raise Busy(f"{name}: was changed by another commit meanwhile; look at it and try again")
        _refuse_twice(now, plan.changes)

    commit = record(repository, stack, plan.changes, text, plan.trailers, still_right, began_on=began_on)
    return replace(done, commit=commit)


def _checked(
    repository: Repository,
    stack: Stack,
    plan: _Plan,
    above: Sequence[str],
    device: str,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[FactChange, ...]:
    """What the facts of ``above`` say on the stack as it is, and as the plan leaves it."""
    from patchkit.algebra.factors import Patch
    from patchkit.evaluation.measure import compare, observe

    tell = progress or (lambda phase, done, total: None)
    facts = [fact for name in above for fact in stack.named(name).facts]
    now = {stored.name: repository.patch(stored) for stored in stack.patches}
    changed = {name: Patch.from_files(files, name) for name, files in plan.changes.patches.items()}
    then = {name: patch for name, patch in (now | changed).items() if name not in plan.changes.removed}
    tell("loading", 0, 1)
    bench = repository.workbench(device)
    tell("loading", 1, 1)
    states = []
    for place, patches in enumerate((now, then)):
        tell("measuring", place, 2)
        bench.put(patches.values())
        states.append(observe(bench.model, bench.tokenizer, facts))
    tell("measuring", 2, 2)
    return tuple(compare(facts, *states))


def _plan(repository: Repository, stack: Stack, words: Sequence[str], facts: Sequence[str]) -> _Plan:
    if facts and len(words) > 1:
        raise BadInput("--fact takes facts out of one patch; name one")
    if facts:
        stored = find_patch(stack, words[0]) if words else _newest(repository, stack)
        return _plan_facts(repository, stored, facts)
    if not words:
        return _plan_patches([_newest(repository, stack)])
    if len(words) == 1 and (commit := _commit_named(repository, stack, words[0])) is not None:
        return _plan_commit(repository, stack, commit)
    return _plan_patches([find_patch(stack, word) for word in dict.fromkeys(words)])


def _commit_named(repository: Repository, stack: Stack, word: str) -> Commit | None:
    """The commit that ``word`` names, unless it names a patch in force."""
    try:
        find_patch(stack, word)
        return None
    except Ambiguous:
        raise
    except NotFound as no_patch:
        if _was_a_patch(repository, word):  # a branch may have its name, and is not what is meant
            raise
        try:
            commit = repository.store.resolve(word)
        except NotFound:
            raise no_patch from None
    found = repository.store.history(commit, 1)
    if not found or found[0].id != commit:
        raise BadInput(f"{word}: that commit changed no patches; patchkit log lists those that did")
    _refuse_part(repository)
    return found[0]


def _was_a_patch(repository: Repository, word: str) -> bool:
    """Whether a patch was in force whose folder's name, or slug, this is."""
    gone = (name for commit in repository.store.history() for name in commit.removed)
    return any(word in (name, name.rpartition("-")[0]) for name in gone)


def _newest(repository: Repository, stack: Stack) -> StoredPatch:
    """The patch in force that was added last."""
    _refuse_part(repository)
    dated = stack.by_date(repository.store.history())
    if not dated:
        raise NotFound("no patch is in force: there is nothing to take back")
    return dated[-1][0]


def _refuse_part(repository: Repository) -> None:
    """In a part of the history, everything seems to be of the commit where it is cut off."""
    if is_shallow(repository.store):
        raise BadInput(
            "the history is cut off (a shallow clone), so nobody knows which commit brought what; name the "
            "patch, or get all of it: git fetch --unshallow"
        )


def _plan_patches(patches: Sequence[StoredPatch]) -> _Plan:
    names = tuple(dict.fromkeys(stored.name for stored in patches))
    return _Plan(
        changes=Changes(removed=names),
        removed=names,
        left={stored.id for stored in patches},
        subject=f"Revert {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
        trailers=tuple(("Patchkit-Reverts", stored.id) for stored in patches),
    )


def _plan_facts(repository: Repository, stored: StoredPatch, words: Sequence[str]) -> _Plan:
    patch = repository.patch(stored)
    taken = take_out(patch, [_place(stored, word) for word in words], stored.name)
    named = ", ".join(fact.subject for fact in taken.facts[:3])
    trailers = (("Patchkit-Reverts", stored.id), *(("Patchkit-Fact", f.text) for f in taken.facts))
    if taken.remaining is None:
        changes = Changes(removed=[stored.name])
    else:
        changes = Changes(patches={stored.name: taken.remaining.files()})
        trailers = (*trailers, ("Patchkit-Id", taken.remaining.id))
    return _Plan(
        changes,
        (stored.name,) if taken.remaining is None else (),
        (taken,),
        left={stored.id},
        subject=f"Take {named} out of {stored.name}",
        trailers=trailers,
    )


def _place(stored: StoredPatch, word: str) -> int:
    """The place of the fact with this id or on this line, counted from 0."""
    by_id = [i for i, fact in enumerate(stored.facts) if fact.id == word]
    if by_id:
        return by_id[0]
    if word.isdecimal() and 1 <= int(word) <= len(stored.facts):
        return int(word) - 1
    raise NotFound(
        f"{stored.name}: no fact with the id or on the line {word!r}; it has {len(stored.facts)} lines"
    )


def _plan_commit(repository: Repository, stack: Stack, commit: Commit) -> _Plan:
    """The opposite of what a commit did, where the patches are still as it left them."""
    if len(commit.parents) > 1:
        raise BadInput(f"{commit.id[:10]} is a merge; name the patches to take back instead")
    before = _files(repository, commit.parents[0]) if commit.parents else {}
    after, now = _files(repository, commit.id), _files(repository, "HEAD")
    for name in (*commit.added, *commit.changed, *commit.removed):
        if now.get(name) != after.get(name):
            raise BadInput(f"{name}: changed since {commit.id[:10]}; take it back by its name")
    if not (commit.added or commit.changed or commit.removed):
        raise BadInput(f"{commit.id[:10]}: changed no patches; use git revert for the rest")
    read = repository.store.read_all
    back = {
        name: dict(zip(before[name], read(list(before[name].values())), strict=True))
        for name in (*commit.changed, *commit.removed)
    }
    _refuse_unsound(commit, back)
    _refuse_old_base(repository, commit, back)
    return _Plan(
        changes=Changes(patches=back, removed=commit.added),
        removed=commit.added,
        restored=tuple(back),
        left={stack.named(name).id for name in (*commit.added, *commit.changed)},
        subject=f"Revert “{commit.subject}”",
        trailers=(("Patchkit-Reverts-Commit", commit.id),),
    )


def _refuse_unsound(commit: Commit, back: Mapping[str, Mapping[str, bytes]]) -> None:
    """A patch that could not be believed before the commit either is not put back."""
    for name, files in back.items():
        missing = next((file for file in (FACTS, DELTA) if file not in files), None)
        odd = odd_twin(read_patch_header(files[DELTA], name), files) if missing is None else None
        if missing or odd:
            why = f"misses {missing}" if missing else f"{odd} is not the one that {DELTA} was made with"
            raise BadInput(
                f"{name}: was not sound before {commit.id[:10]} either ({why}); bring back one that was: "
                f"git checkout COMMIT -- patches/{name}"
            )


def _refuse_old_base(repository: Repository, commit: Commit, back: Mapping[str, Mapping[str, bytes]]) -> None:
    """A patch comes back as it was, which is no good on another base."""
    base = repository.settings.base_fingerprint
    for name, files in back.items():
        if (made_on := read_patch_header(files[DELTA], name).base) == base:
            continue
        what = f"{name}: was made on the base {made_on[:19]}…, and {SETTINGS} names {base[:19]}… now"
        if commit.settings_changed:
            raise BadInput(f"{what}; take the move to it back as a whole: git revert {commit.id[:10]}")
        facts = f"git show {commit.parents[0][:10]}:./patches/{name}/{FACTS} > {FACTS}"
        raise BadInput(f"{what}; edit its facts anew: {facts} && patchkit commit {FACTS}")


def _refuse_twice(stack: Stack, changes: Changes) -> None:
    """What a patch that comes back says may have been said again since, by one that stays."""
    leaving = {*changes.patches, *changes.removed}
    staying = {key: held for key, held in stack.facts_in_force().items() if held[0] not in leaving}
    for name, files in changes.patches.items():
        for fact in load_canonical(files[FACTS], f"{name}/{FACTS}"):
            if fact.key in staying:
                other, held = staying[fact.key]
                same = "too" if normal(held.target) == normal(fact.target) else f"otherwise ({held.target!r})"
                raise BadInput(
                    f"{name}: {fact.text!r} would come back with it, and {other} says it {same}; "
                    f"take that back first: patchkit revert {other}"
                )


def _files(repository: Repository, revision: str) -> Mapping[str, Mapping[str, str]]:
    """Patch folder -> file name -> object id, at a commit."""
    files: dict[str, dict[str, str]] = {}
    for entry in repository.store.tree(revision).entries:
        parts = entry.path.split("/")
        if len(parts) == 3:
            files.setdefault(parts[1], {})[parts[2]] = entry.oid
    return files
