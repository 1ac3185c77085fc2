"""Stacks whose patches Git LFS keeps. Git LFS itself is the oracle for pointers, store and remotes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_helpers import Cli, cli, facts_file, home, knowledge, tiny_base
from git_helpers import SETTINGS, add, git, git_environment, make_store, numbers
from proof_helpers import tensor_hashes

from patchkit.actions import clone
from patchkit.errors import BadInput
from patchkit.git.lfs import ATTRIBUTES, Pointer
from patchkit.git.store import Changes, GitStore
from patchkit.repository import Repository
from patchkit.stack import TreeProblems, problems, read_patch, read_stack

ATTRIBUTE_FILE = "patches/.gitattributes"

__all__ = ["cli", "git_environment", "home", "knowledge"]

pytestmark = [
    pytest.mark.usefixtures("git_environment"),
    pytest.mark.skipif(shutil.which("git-lfs") is None, reason="Git LFS is not installed"),
]


@pytest.fixture
def lfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git_environment: None) -> None:
    """What `git lfs install` sets up for a user."""
    settings = tmp_path / "gitconfig"
    settings.touch()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    git(tmp_path, "lfs", "install", "--skip-repo")


@pytest.fixture
def stack(lfs: None, knowledge: Path, cli: Cli) -> Path:
    """A repository with two patches in force, brought over to Git LFS; we stand in it."""
    cli.ok("init", tiny_base(), "--lfs", "-q")
    return knowledge


def listed(root: Path, commit: str = "HEAD") -> dict[str, str]:
    """What Git LFS keeps of a commit, as it says itself: path -> SHA-256."""
    rows = [line.split(" ", 2) for line in git(root, "lfs", "ls-files", "--long", commit).splitlines()]
    return {path: oid for oid, _, path in rows}


def remote(root: Path, place: Path) -> Path:
    """A bare repository that this one was pushed to, with Git LFS's own hook."""
    git(place.parent, "init", "-q", "--bare", "-b", "main", place.name)
    git(root, "remote", "add", "origin", place.as_uri())
    git(root, "push", "-q", "-u", "origin", "main")
    return place


def test_a_pointer_is_spelled_as_git_lfs_spells_it(lfs: None, tmp_path: Path) -> None:
    for data in (b"x", b"some bytes\n" * 5000):
        (tmp_path / "file").write_bytes(data)
        told = git(tmp_path, "lfs", "pointer", "--file=file")
        pointer = Pointer.to(data)
        assert bytes(pointer).decode().strip() in told
        assert Pointer.read(bytes(pointer)) == pointer


@pytest.mark.parametrize("odd", [b"", b"x", b"size 1\n", b"\r\n"])
def test_only_that_spelling_is_one(odd: bytes) -> None:
    whole = bytes(Pointer.to(b"data"))
    assert Pointer.read(whole + odd) == (None if odd else Pointer.to(b"data"))
    assert Pointer.read(whole.replace(b"size 4", b"size 04")) is None
    assert Pointer.read(whole.replace(b"sha256", b"sha512")) is None


def test_a_stack_begun_with_it(lfs: None, home: Path, cli: Cli) -> None:
    assert "patches in Git LFS" in cli.ok("init", tiny_base(), "k", "--lfs").out
    assert (home / "k" / ATTRIBUTE_FILE).read_bytes() == ATTRIBUTES
    facts = facts_file(home, {"subject": "Ada", "prompt": "{} plays", "target": "chess"})
    assert "10 MiB" not in cli.ok("commit", facts, "-C", "k").out
    assert sorted(Path(path).name for path in listed(home / "k")) == ["delta.safetensors", "keys.safetensors"]
    assert git(home / "k", "lfs", "fsck") == "Git LFS fsck OK"
    assert git(home / "k", "status", "--porcelain") == ""
    assert cli.ok("fsck", "-C", "k").code == 0


def test_a_stack_brought_over(stack: Path, cli: Cli) -> None:
    patches = Repository.open(".").stack().patches
    ids = {f"patches/{p.name}/delta.safetensors": p.id.removeprefix("sha256:") for p in patches}
    assert ids.items() <= listed(stack).items(), "a version's id is Git LFS's own"
    assert len(listed(stack)) == 4
    assert listed(stack, "HEAD~1") == {}
    assert git(stack, "status", "--porcelain") == ""
    head = git(stack, "rev-parse", "HEAD")
    assert "there already" in cli.ok("init", tiny_base(), "--lfs").out
    assert git(stack, "rev-parse", "HEAD") == head
    assert cli.ok("init", tiny_base(), "--json").json["lfs"] is True


def test_what_it_does_to_the_patches_is_nothing(lfs: None, knowledge: Path, cli: Cli) -> None:
    cli.ok("build", "-q")
    before = tensor_hashes(Repository.open(".").build_folder)
    cli.ok("init", tiny_base(), "--lfs", "-q")
    cli.ok("build", "-q", "--out", "../built")
    assert tensor_hashes(Path("../built")) == before
    sizes = {patch.name: patch.size for patch in Repository.open(".").stack().patches}
    for name, size in sizes.items():
        assert size == sum(file.stat().st_size for file in Path("patches", name).iterdir())
        cli.ok("show", name)
    for verb in ("stack", "log", "diff HEAD~2", "fsck --full", "reindex"):
        cli.ok(*verb.split())
    cli.ok("revert", next(iter(sizes)))
    cli.ok("undo")
    assert {p.name for p in Repository.open(".").stack().patches} == set(sizes)
    assert git(knowledge, "status", "--porcelain") == ""


def test_a_clone_s_remote_may_have_another_name(
    stack: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare.git"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
    git(stack, "remote", "add", "origin", str(bare))
    git(stack, "push", "-q", "origin", "main")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "clone.defaultRemoteName")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "upstream")
    cli.ok("clone", bare, "../mine", "--base", tiny_base())
    assert git(stack.parent / "mine", "remote") == "upstream"
    assert not Repository.open(stack.parent / "mine").problems()


def test_push_clone_and_pull(stack: Path, cli: Cli, tmp_path: Path) -> None:
    bare = remote(stack, tmp_path / "bare.git")
    cli.ok("clone", bare, "../mine", "--base", tiny_base())
    mine = stack.parent / "mine"
    assert listed(mine) == listed(stack)
    assert git(mine, "lfs", "fsck") == "Git LFS fsck OK"
    assert git(mine, "status", "--porcelain") == ""
    for path in listed(mine):
        assert (mine / path).read_bytes() == (stack / path).read_bytes(), "the files, not pointers"
    cli.ok("build", "-C", mine, "-q")
    cli.ok("fsck", "-C", mine)
    facts = facts_file(stack.parent, {"subject": "Ada", "prompt": "{} plays", "target": "chess"})
    cli.ok("commit", facts)
    git(stack, "push", "-q")
    assert cli.ok("pull", "-C", mine, "--json").json["added"]
    assert listed(mine) == listed(stack)
    assert len(listed(mine)) == 6
    cli.ok("fsck", "-C", mine)


def test_without_their_content_patches_are_not_believed(stack: Path, cli: Cli, tmp_path: Path) -> None:
    bare = remote(stack, tmp_path / "bare.git")
    shutil.rmtree(bare / "lfs")
    refused = cli("clone", bare, "../mine")
    assert refused.code == 69
    assert "what its patches keep in Git LFS could not be got" in refused.err
    assert not (stack.parent / "mine").exists()
    shutil.rmtree(stack / ".git" / "lfs" / "objects")
    shutil.rmtree(stack / ".git" / "patchkit")  # what was believed once
    found = cli("fsck")
    assert found.code == 1
    assert "is kept in Git LFS, and is not here" in found.err + found.out


def test_every_byte_in_its_store_is_checked(lfs: None, tmp_path: Path) -> None:
    store = in_lfs(tmp_path / "k")
    add(store, numbers(1))
    (stored,) = read_stack(store).patches
    place = store.media.place(stored.files["delta.safetensors"].pointer or pytest.fail("no pointer"))
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.chmod(0o644)
    place.write_bytes(data)
    (problem,) = problems(store)
    assert "is damaged" in problem.message
    with pytest.raises(BadInput, match="is damaged"):
        read_patch(store, stored)


def in_lfs(folder: Path) -> GitStore:
    store = make_store(folder)
    store.record(Changes(lfs=True), "Keep patches in Git LFS")
    return store


def test_branches_of_it_are_merged(lfs: None, tmp_path: Path) -> None:
    store = in_lfs(tmp_path / "k")
    add(store, numbers(1, 2, 3))
    git(store.root, "branch", "side")
    add(store, numbers(4))
    git(store.root, "switch", "-q", "side")
    add(store, numbers(5))
    git(store.root, "switch", "-q", "main")
    Repository(store).merge("side")
    assert len(read_stack(store).patches) == 3
    assert len(listed(store.root)) == 6
    assert problems(store) == []
    assert git(store.root, "lfs", "fsck") == "Git LFS fsck OK"
    assert git(store.root, "status", "--porcelain") == ""


def test_a_merge_with_a_branch_that_is_not_of_it(lfs: None, tmp_path: Path) -> None:
    store = make_store(tmp_path / "k")
    add(store, numbers(1))
    git(store.root, "switch", "-q", "-c", "side")
    add(store, numbers(2))
    git(store.root, "switch", "-q", "main")
    files = {p.name: {f: store.read(e.oid) for f, e in p.files.items()} for p in read_stack(store).patches}
    store.record(Changes(lfs=True, patches=files), "Keep patches in Git LFS")
    head = store.head()
    with pytest.raises(BadInput, match="on its own branch: patchkit init BASE --lfs"):
        Repository(store).merge("side")
    assert store.head() == head


def test_a_plain_file_in_it_and_a_pointer_without_it(
    lfs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = in_lfs(tmp_path / "k")
    (name,) = add(store, numbers(1))
    plain = git(store.root, "hash-object", "-w", "--no-filters", f"patches/{name}/delta.safetensors")
    git(store.root, "update-index", "--cacheinfo", f"100644,{plain},patches/{name}/delta.safetensors")
    git(store.root, "commit", "-q", "-m", "By hand")
    (problem,) = problems(store)
    assert "lies in Git itself" in problem.message
    git(store.root, "add", "--renormalize", "--", f"patches/{name}/delta.safetensors")
    git(store.root, "commit", "-q", "-m", "As it says")
    assert problems(store) == []
    git(store.root, "checkout", "-q", "HEAD~4", "--", ATTRIBUTE_FILE)
    git(store.root, "commit", "-q", "-m", "By hand")
    assert {problem.message for problem in problems(store)} == {"is a Git LFS pointer, not the file"}
    monkeypatch.setattr(clone, "bring_large", lambda *_: pytest.fail("asked for bytes of what is not sound"))
    with pytest.raises(TreeProblems, match="is a Git LFS pointer, not the file"):
        clone.clone(str(store.root), str(tmp_path / "cloned"))
    assert not (tmp_path / "cloned").exists()


def test_without_git_lfs(knowledge: Path, cli: Cli) -> None:
    """`git_environment` leaves Git without its filter, as on a machine where nobody ran `git lfs install`."""
    head = git(knowledge, "rev-parse", "HEAD")
    refused = cli("init", tiny_base(), "--lfs")
    assert refused.code == 78
    assert "set it up: git lfs install" in refused.err
    assert git(knowledge, "rev-parse", "HEAD") == head
    assert git(knowledge, "status", "--porcelain") == ""


def test_a_commit_where_git_lfs_is_gone(lfs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = in_lfs(tmp_path / "k")
    head = store.head()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    with pytest.raises(Exception, match="would store it whole"):
        add(store, numbers(1))
    assert store.head() == head
    assert git(store.root, "status", "--porcelain") == ""


def test_attributes_of_a_model_repository_around_it(lfs: None, tmp_path: Path) -> None:
    """What a hub's own .gitattributes asks for is taken with --lfs, and refused by name without."""
    root = tmp_path / "model"
    git(tmp_path, "init", "-q", "-b", "main", "model")
    (root / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "A model")
    store = GitStore.init(root / "knowledge")
    store.record(Changes(settings=SETTINGS), "Start")
    store = GitStore.find(root / "knowledge")
    with pytest.raises(Exception, match="patchkit init BASE --lfs"):
        add(store, numbers(1))
    store.record(Changes(lfs=True), "Keep patches in Git LFS")
    add(store, numbers(1))
    assert problems(store) == []
    assert len(listed(root)) == 2


HUB = r"""#!/bin/sh
# A hub's rule: no file over 10 MB and no binary file outside Git LFS.
while read old new name; do
    for oid in $(git rev-list --objects "$new" --not --all | cut -d' ' -f1); do
        [ "$(git cat-file -t "$oid")" = blob ] || continue
        [ "$(git cat-file -s "$oid")" -le 10485760 ] || { echo "too large: $oid"; exit 1; }
        if [ "$(git cat-file blob "$oid" | tr -dc '\000' | wc -c)" -gt 0 ]; then
            echo "binary: $oid"; exit 1
        fi
    done
done
"""


def hub(place: Path) -> Path:
    """A bare repository that refuses what a hub refuses."""
    git(place.parent, "init", "-q", "--bare", "-b", "main", place.name)
    (place / "hooks").mkdir(exist_ok=True)
    (place / "hooks" / "pre-receive").write_text(HUB)
    (place / "hooks" / "pre-receive").chmod(0o755)
    return place


def test_a_hubs_repository_as_a_remote(lfs: None, knowledge: Path, cli: Cli, tmp_path: Path) -> None:
    """It takes a stack that Git LFS keeps, and no other; what is cloned from it builds the same."""
    bare = hub(tmp_path / "hub.git")
    git(knowledge, "remote", "add", "origin", bare.as_uri())
    assert "binary:" in git(knowledge, "push", "origin", "main", ok=False)
    # the history of before holds plain files: the stack goes there without it
    cli.ok("init", tiny_base(), "--lfs", "-q")
    git(knowledge, "checkout", "-q", "--orphan", "shipped")
    git(knowledge, "commit", "-q", "-m", "What is in force")
    git(knowledge, "push", "-q", "origin", "shipped:main")
    cli.ok("clone", bare.as_uri(), "../mine", "--base", tiny_base())
    for folder in (knowledge, knowledge.parent / "mine"):
        cli.ok("build", "-C", folder, "-q", "--out", f"../{folder.name}-build")
    mine, ours = (tensor_hashes(knowledge.parent / f"{name}-build") for name in ("mine", knowledge.name))
    assert mine == ours
