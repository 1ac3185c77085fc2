"""`patchkit gc` removes what nothing refers to and was not used lately, says what, and nothing else goes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_helpers import snapshot
from fork_kills import killed_at
from git_helpers import git
from proof_helpers import (  # noqa: F401
    fine,
    here,
    made_patch,
    one_line,
    person,
    saved,
    small_base,
    small_repository,
)
from safetensors.torch import save_file

from patchkit.actions import gc as action
from patchkit.algebra.factors import Patch
from patchkit.algebra.parts import joined
from patchkit.checkpoint import Checkpoint
from patchkit.commands import gc as command
from patchkit.editing.recipe import Recipe
from patchkit.editing.written import contexts_name, text_name
from patchkit.files import is_temporary
from patchkit.patch import JOINT, SCALE
from patchkit.repository import Repository

pytestmark = pytest.mark.usefixtures("person")

DAY = 86400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = small_base(tmp_path / "base")
    small_repository(tmp_path / "kb", base)
    return tmp_path


def _fingerprint(root: Path) -> str:
    return Checkpoint.open(root / "base").fingerprint()


def _old(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    for each in [path, *path.rglob("*")]:
        os.utime(each, (then, then), follow_symlinks=False)
    return path


def _file(path: Path, data: bytes = b"data") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _gc(root: Path, *options: str) -> set[str]:
    found = json.loads(fine(here("-C", root / "kb", "gc", "--json", *options)).out)
    return {str(Path(each["path"]).name) for each in found["removed"]}


def _leave(root: Path, days: float) -> dict[str, Path]:
    private = root / "kb" / ".git" / "patchkit"
    made = {
        "kept": _file(private / "kept" / "0123456789ab" / "ann-01234567" / "delta.safetensors").parent.parent,
        "unfinished": _file(private / "unfinished" / "0123456789abcdef" / "targets-x.safetensors").parent,
        "statistics": _file(private / "statistics" / "fedcba9876543210" / "layer-9.safetensors").parent,
        "text": _file(private / "statistics" / "text-0123456789abcdef.json"),
        "damaged": _file(private / "catalogue.db.damaged-17"),
        "temporary": _file(private / "statistics" / f".patchkit-{'a' * 16}.tmp"),
        "stack's": _file(private / "stacks" / "x-01234567" / "kept" / "ba9876543210" / "f").parent,
    }
    for path in made.values():
        _old(path, days)
    return made


def test_what_nothing_refers_to_goes_when_it_is_old(root: Path) -> None:
    made = _leave(root, 20)
    names = {path.name for path in made.values()}
    before = snapshot(root / "kb")
    files = sorted((root / "kb" / ".git" / "patchkit").rglob("*"))
    assert _gc(root, "--dry-run") == names
    assert sorted((root / "kb" / ".git" / "patchkit").rglob("*")) == files
    assert _gc(root, "--grace", "21") == set()
    said = fine(here("-C", root / "kb", "gc", "--grace", "21"))
    assert "left as they are: 7 leftovers of less than 21 days (--grace)" in said.out
    assert all(path.exists() for path in made.values())
    said = fine(here("-C", root / "kb", "gc"))
    assert "removed 7 leftovers, 28 B" in said.out
    assert "git gc" in said.out
    assert not any(path.exists() for path in made.values())
    assert not list((root / "kb" / ".git" / "patchkit").rglob(".patchkit-*"))
    assert snapshot(root / "kb") == before


def test_what_was_used_within_the_hour_stays_whatever_is_asked(root: Path) -> None:
    made = _leave(root, 0.01)
    assert _gc(root, "--grace", "0") == set()
    said = fine(here("-C", root / "kb", "gc", "--grace", "0"))
    assert "left as they are: 7 leftovers of less than an hour, which may be in use" in said.out
    _old(made["kept"], 0.05)
    assert _gc(root, "--grace", "0") == {made["kept"].name}


def test_one_new_file_keeps_an_old_folder(root: Path) -> None:
    made = _leave(root, 20)
    _file(made["unfinished"] / "targets-y.safetensors")
    assert made["unfinished"].name not in _gc(root)
    assert made["unfinished"].exists()


def test_others_write_while_it_searches_and_what_they_use_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _leave(root, 20)
    patch = saved(made_patch(_fingerprint(root), 0), root / "made")
    really = action._Search.leftovers

    def meanwhile(search: action._Search) -> Iterator[action.Leftover]:
        yield from really(search)
        fine(here("-C", root / "kb", "apply", patch))
        made["unfinished"].touch()
        shutil.rmtree(made["kept"])

    monkeypatch.setattr(action._Search, "leftovers", meanwhile)
    names = {path.name for path in made.values()}
    assert _gc(root) == names - {made["unfinished"].name, made["kept"].name}
    assert made["unfinished"].exists()


def test_a_link_goes_and_what_it_leads_to_stays(root: Path) -> None:
    mine = _file(root / "mine" / "thesis.txt").parent
    link = root / "kb" / ".git" / "patchkit" / "kept" / "0123456789ab"
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    then = time.time() - 20 * DAY
    os.utime(link, (then, then), follow_symlinks=False)
    assert _gc(root) == {link.name}
    assert not os.path.lexists(link)
    assert (mine / "thesis.txt").exists()


def _statistics(root: Path, name: str, layers: dict[int, float], about: dict[str, object] | None) -> Path:
    folder = root / "kb" / ".git" / "patchkit" / "statistics" / name
    folder.mkdir(parents=True)
    for layer, value in layers.items():
        save_file({"C": torch.full((2, 2), value)}, folder / f"layer-{layer}.safetensors")
    if about is not None:
        (folder / "about.json").write_text(json.dumps(about))
    return _old(folder, 20)


def _marked(patch: Patch) -> Patch:
    return replace(patch, recipe={**patch.recipe, SCALE: 0.5, JOINT: ["0" * 64]})


@pytest.mark.parametrize(
    "became",
    [
        lambda patch: patch,
        _marked,
        lambda patch: joined([patch, made_patch(patch.base, 1)]),
        lambda patch: joined([made_patch(patch.base, 1), _marked(patch)]),
    ],
    ids=["plain", "scaled and solved together", "squashed", "all of it"],
)
def test_statistics_and_texts_that_something_names_stay(root: Path, became: Callable[[Patch], Patch]) -> None:
    kb = root / "kb"
    base = Checkpoint.open(root / "base").fingerprint()
    digest = hashlib.sha256()
    for value in (3.0, 4.0):
        digest.update(torch.full((2, 2), value).numpy().tobytes())
    recipe = {
        "layers": [5, 6],
        "lambda": 5.0,
        "statistics_tokens": 77,
        "statistics_digest": digest.hexdigest(),
    }
    made = made_patch(base, 0)
    patch = became(Patch(made.facts, made.deltas, made.base, "memit", recipe, (), made.solution))
    git(kb, "switch", "-q", "-c", "other")
    fine(here("-C", kb, "apply", saved(patch, root / "made")))
    git(kb, "switch", "-q", "main")  # the patch is on another branch
    settings = Recipe(layers=(0, 1), lambda_=5.0)
    noted = {"base": base, "tokens": 77, "length": 128}
    read = f"{base}+0123456789abcdef"  # and the files beside the weights, which nobody need have any more
    stay = [
        _statistics(root, "a" * 16, {5: 3.0, 6: 4.0}, None),  # by the patch's digest
        _statistics(root, "b" * 16, {5: 9.0, 6: 9.0}, noted),  # of the patch's settings
        _statistics(root, "c" * 16, {0: 1.0, 1: 1.0}, None),  # maybe patchkit.toml's
        _statistics(root, "d" * 16, {0: 1.0}, {**noted, "tokens": settings.statistics_tokens}),
        _old(_file(kb / ".git/patchkit/statistics" / text_name(settings, base)), 20),
        _old(_file(kb / ".git/patchkit/statistics" / text_name(Recipe.from_dict(recipe), base)), 20),
        _old(_file(kb / ".git/patchkit/statistics" / contexts_name(settings, base)), 20),
        _old(_file(kb / ".git/patchkit/statistics" / text_name(settings, read)), 20),
        _old(_file(kb / ".git/patchkit/statistics" / contexts_name(settings, read)), 20),
    ]
    other = f"sha256:{'0' * 64}+0123456789abcdef"
    go = [
        _statistics(root, "e" * 16, {5: 3.0, 6: 5.0}, None),
        _statistics(root, "f" * 16, {0: 1.0, 1: 1.0}, {**noted, "base": "sha256:" + "0" * 64}),
        _statistics(root, "1" * 16, {5: 3.0}, {**noted, "tokens": 78}),
        _old(_file(kb / ".git/patchkit/statistics" / text_name(settings, "sha256:" + "0" * 64)), 20),
        _old(_file(kb / ".git/patchkit/statistics" / contexts_name(settings.override(contexts=3), base)), 20),
        _old(_file(kb / ".git/patchkit/statistics" / text_name(settings, other)), 20),
    ]
    assert _gc(root) == {path.name for path in go}
    assert all(path.exists() for path in stay)
    git(kb, "branch", "-q", "-D", "other")
    assert _gc(root) == set()  # the reflog of HEAD still has it
    git(kb, "reflog", "expire", "--expire=now", "--all")
    assert _gc(root) == {stay[0].name, stay[1].name, stay[5].name}


def test_what_the_recipe_of_many_facts_reads_stays(root: Path) -> None:
    kb = root / "kb"
    with (kb / "patchkit.toml").open("a") as file:
        file.write("\n[recipe.many]\nfacts = 500\nstatistics_tokens = 99\ncontexts = 3\n")
    git(kb, "commit", "-q", "-am", "Large batches")
    settings = Repository.open(kb).recipe(facts=500)
    assert (settings.statistics_tokens, settings.contexts) == (99, 3)
    layers = dict.fromkeys(settings.layers, 1.0)
    noted = {"base": _fingerprint(root), "length": settings.statistics_length}
    stay = [
        _statistics(root, "a" * 16, layers, {**noted, "tokens": 99}),
        _old(_file(kb / ".git/patchkit/statistics" / contexts_name(settings, _fingerprint(root))), 20),
    ]
    go = _statistics(root, "b" * 16, layers, {**noted, "tokens": 98})
    assert _gc(root) == {go.name}
    assert all(path.exists() for path in stay)


def test_trees_that_nothing_reaches_leave_the_catalogue(root: Path) -> None:
    kb = root / "kb"
    base = Checkpoint.open(root / "base").fingerprint()
    fine(here("-C", kb, "apply", saved(made_patch(base, 0), root / "made")))
    fine(here("-C", kb, "reindex"))
    git(kb, "switch", "-q", "-c", "other")
    fine(here("-C", kb, "apply", saved(made_patch(base, 1), root / "made")))
    repository = Repository.open(kb)
    lost, fingerprint = repository.stack(), repository.settings.base_fingerprint
    with repository.catalogue.writing() as db:
        repository.catalogue.put_tree(db, lost.tree, fingerprint, lost.patches)
    git(kb, "switch", "-q", "main")
    held = repository.stack().tree

    def trees(*options: str) -> int:
        done = fine(here("-C", kb, "gc", "--json", *options))
        return int(json.loads(done.out)["catalogue_trees"])

    assert trees() == 0
    git(kb, "branch", "-q", "-D", "other")
    git(kb, "reflog", "expire", "--expire=now", "--all")
    assert trees("--dry-run") == 1
    assert repository.catalogue.recall(lost.tree, fingerprint) is not None
    assert trees() == 1
    assert repository.catalogue.recall(lost.tree, fingerprint) is None
    assert repository.catalogue.recall(held, fingerprint) is not None
    assert trees() == 0


def test_it_waits_for_a_running_writer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _leave(root, 20)
    repository = Repository.open(root / "kb")
    monkeypatch.setattr("patchkit.git.writers.PATIENCE", 0.05)
    from patchkit.git.writers import writers_lock

    with writers_lock(repository.store):
        line = one_line(here("-C", root / "kb", "gc"), 75)
    assert "another patchkit command is writing" in line
    assert all(path.exists() for path in made.values())


def test_killed_at_each_of_its_operations(root: Path) -> None:
    """What is in use stays whole, no leftover comes back half there, and the next run removes the rest."""
    fine(here("-C", root / "kb", "apply", saved(made_patch(_fingerprint(root), 0), root / "made")))
    kb, base = root / "kb", Repository.open(root / "kb").settings.base_fingerprint
    before = snapshot(kb)
    names = {path.name for path in _leave(root, 20).values()}
    for number in range(200):
        made = _leave(root, 20)
        killed = killed_at(
            lambda: Repository.open(kb), lambda repository: action.gc(repository), kb, number, commands=False
        )
        assert snapshot(kb) == before
        assert [p.header.base for p in Repository.open(kb).stack().patches] == [base]
        assert fine(here("-C", kb, "fsck")).code == 0
        assert all(name in names or is_temporary(name) for name in _gc(root))
        assert not any(path.exists() for path in made.values())
        if not killed:
            break
    assert not killed, "there were more operations than were tried"
    assert number > 14


def test_the_default_grace_is_the_actions() -> None:
    assert command.GRACE == action.GRACE
