"""After plain Git commands `status` tells the truth and `build` follows: Git's work tree is the oracle.

What is in force is what Git checked out under patches/; what a build must hold are the base's tensors
with these folders' Σ B A, added in fractions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from git_helpers import git, git_environment
from proof_helpers import (
    expected_hashes,
    fine,
    here,
    made_patch,
    one_line,
    small_base,
    small_repository,
    tensor_hashes,
)

from patchkit.git.store import Changes
from patchkit.repository import Repository

__all__ = ["git_environment"]
pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_base(tmp_path / "base")


@pytest.fixture
def root(tmp_path: Path, base: Path) -> Path:
    """Patch 2 and then 3 on main, 5 on side, which left main after 2; a build of main."""
    repository = small_repository(tmp_path / "kb", base)
    add(repository, 2)
    git(repository.store.root, "branch", "side")
    add(repository, 3)
    git(repository.store.root, "switch", "-q", "side")
    add(repository, 5)
    git(repository.store.root, "switch", "-q", "main")
    fine(here("build", "-C", repository.store.root))
    return repository.store.root


def add(repository: Repository, number: int) -> None:
    patch = made_patch(repository.settings.base_fingerprint, number)
    repository.store.record(Changes(patches={patch.name: patch.files()}), f"Add {number}")


def follows(root: Path, base: Path, *numbers: int, behind: bool = True) -> None:
    """Git has these patches in its tree; status says so, and that the build is behind; then it follows."""
    folders = sorted(path for path in (root / "patches").iterdir() if path.is_dir())
    listed = git(root, "ls-tree", "-d", "--name-only", "HEAD:./patches").split()
    assert [folder.name for folder in folders] == sorted(listed)
    assert len(folders) == len(numbers)
    found = fine(here("status", "-C", root, "--json")).json
    assert (found["patches"], found["leftovers"], found["problems"]) == (len(numbers), [], [])
    if behind:
        assert [build["state"] for build in found["builds"]] == ["behind"]
    fine(here("build", "-C", root))
    assert tensor_hashes(Repository.open(root).build_folder) == expected_hashes(base, folders)
    found = fine(here("status", "-C", root, "--json")).json
    assert [build["state"] for build in found["builds"]] == ["up to date"]


PLAIN = {
    "revert": (["revert --no-edit HEAD"], (2,)),
    "revert of a revert": (["revert --no-edit HEAD", "revert --no-edit HEAD"], (2, 3)),
    "merge": (["merge -q --no-edit side"], (2, 3, 5)),
    "fast-forward": (["switch -q -c behind HEAD~1", "merge -q main"], (2, 3)),
    "squash": (["merge -q --squash side", "commit -q -m Squash"], (2, 3, 5)),
    "cherry-pick": (["cherry-pick side"], (2, 3, 5)),
    "checkout of a branch": (["checkout -q side"], (2, 5)),
    "a detached head": (["checkout -q --detach HEAD~1"], (2,)),
    "checkout of a path": (
        ["revert --no-edit HEAD", "checkout HEAD~1 -- patches", "commit -q -m Back"],
        (2, 3),
    ),
    "rebase": (["rebase -q main side"], (2, 3, 5)),
    "reset": (["reset -q --hard HEAD~1"], (2,)),
    "rm": (["rm -q -r patches", "checkout -q HEAD -- patches/.gitattributes", "commit -q -m All"], ()),
    "amend": (["commit -q --amend -m Reworded"], (2, 3)),
    "tag": (["tag -a -m One one HEAD~1", "switch -q --detach one"], (2,)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_after_plain_git_the_build_follows(root: Path, base: Path, name: str) -> None:
    commands, numbers = PLAIN[name]
    for command in commands:
        git(root, *command.split())
    follows(root, base, *numbers, behind=numbers != (2, 3))


def test_a_stash(root: Path, base: Path) -> None:
    file = min((root / "patches").glob("*/facts.jsonl"))
    before = file.read_bytes()
    file.write_bytes(b"mine\n")
    (half,) = fine(here("status", "-C", root, "--json")).json["leftovers"]
    assert half["message"] == "not committed"
    git(root, "stash", "-q")
    follows(root, base, 2, 3, behind=False)
    git(root, "stash", "pop", "-q")
    assert file.read_bytes() == b"mine\n" != before
    found = fine(here("status", "-C", root, "--json")).json
    assert (found["patches"], len(found["leftovers"])) == (2, 1)
    assert found["builds"][0]["state"] == "up to date"  # what is not committed is not in force


def test_clean_takes_nothing_that_is_needed(root: Path, base: Path) -> None:
    place = Repository.open(root).build_folder
    before = tensor_hashes(place)
    (root / "patches" / "stray").mkdir()
    (root / "patches" / "stray" / "x").write_text("x")
    assert fine(here("status", "-C", root, "--json")).json["leftovers"]
    git(root, "clean", "-q", "-x", "-d", "-f")
    follows(root, base, 2, 3, behind=False)
    assert tensor_hashes(place) == before


def test_a_shallow_clone(root: Path, base: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{root}", "shallow")
    fine(here("base", "-C", tmp_path / "shallow", base))
    fine(here("build", "-C", tmp_path / "shallow"))
    follows(tmp_path / "shallow", base, 2, 3, behind=False)
    git(root, "merge", "-q", "--no-edit", "side")
    git(tmp_path, "clone", "-q", "--depth", "2", f"file://{root}", "cut")
    assert "git fetch --unshallow" in one_line(here("status", "-C", tmp_path / "cut"), 65)
    git(tmp_path / "cut", "fetch", "-q", "--unshallow")
    fine(here("status", "-C", tmp_path / "cut"))


def test_a_worktree(root: Path, base: Path, tmp_path: Path) -> None:
    """It has its own stack; the base's place and the default build are shared, and status tells which."""
    git(root, "worktree", "add", "-q", str(tmp_path / "tree"), "side")
    follows(tmp_path / "tree", base, 2, 5)
    assert fine(here("status", "-C", root, "--json")).json["builds"][0]["state"] == "behind"
    follows(root, base, 2, 3)


def test_a_submodule(root: Path, base: Path, tmp_path: Path) -> None:
    """A repository of patches inside another: its own history, base's place and build."""
    top = tmp_path / "top"
    git(tmp_path, "init", "-q", "-b", "main", "top")
    git(top, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(root), "knowledge")
    git(top, "commit", "-q", "-m", "With knowledge")
    inner = top / "knowledge"
    fine(here("base", "-C", inner, base))
    fine(here("build", "-C", inner))
    follows(inner, base, 2, 3, behind=False)
    assert Repository.open(inner).build_folder.is_relative_to(top / ".git" / "modules" / "knowledge")
    git(inner, "checkout", "-q", "HEAD~1")
    follows(inner, base, 2)
    assert git(top, "status", "--porcelain") == "M knowledge"


def test_in_the_middle_of_a_rebase_status_says_so(root: Path, base: Path) -> None:
    """The same patch taken back on one side and solved otherwise on the other: a conflict."""
    name = made_patch(Repository.open(root).settings.base_fingerprint, 2).name
    git(root, "rm", "-q", "-r", f"patches/{name}")
    git(root, "commit", "-q", "-m", "Away")
    git(root, "switch", "-q", "side")
    again = made_patch(Repository.open(root).settings.base_fingerprint, 2, seed=1)
    for file, data in again.files().items():
        (root / "patches" / name / file).write_bytes(data)
    git(root, "commit", "-q", "-a", "-m", "Again")
    git(root, "rebase", "-q", "main", ok=False)
    done = here("status", "-C", root)
    assert done.code == 65
    assert "is in conflict: " in done.err  # Git may guess a rename, and name the patch that it guessed
    assert "a rebase is in progress" in done.out
    git(root, "rebase", "--abort")
    fine(here("status", "-C", root))
