"""What keeps a tree from being believed: each kind is found, named in one line, and has a way out."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from git_helpers import (  # noqa: F401
    BASE,
    OTHER_BASE,
    SETTINGS,
    add,
    commit_all,
    fact,
    git,
    git_environment,
    make_store,
    numbers,
    patch,
    take_out_as_told,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchkit import inspection
from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.facts import Fact, dump_facts
from patchkit.git.store import ATTRIBUTES, Changes, GitStore
from patchkit.problem import Problem
from patchkit.settings import Settings
from patchkit.stack import TreeProblems, conflicts, find_patch, problems, read_patch, read_stack

pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    return make_store(tmp_path / "kb")


def _found(store: GitStore, count: int = 1) -> list[Problem]:
    """The problems at HEAD, as many as there should be: one line each, with a remedy; nothing believes it."""
    found = problems(store)
    assert len(found) == count, [str(problem) for problem in found]
    for problem in found:
        line = str(problem)
        assert line.isprintable()
        assert problem.message
        assert problem.remedy
        assert set(problem.to_dict()) == {"path", "message", "remedy"}
    if count:
        with pytest.raises(TreeProblems) as error:
            read_stack(store)
        assert list(error.value.problems) == found
        assert error.value.exit_code == BadInput.exit_code
    return found


# -- a stack -----------------------------------------------------------------------------------


def test_the_patches_in_force_are_the_folders_of_the_tree(store: GitStore) -> None:
    one, two = numbers(1, 2), numbers(3)
    add(store, one, two)
    stack = read_stack(store)
    assert [p.name for p in stack.patches] == sorted((one.name, two.name))
    assert stack.commit == store.head()
    assert stack.tree == git(store.root, "rev-parse", "HEAD:patches")
    stored = stack.named(one.name)
    assert (stored.id, stored.facts, stored.header.base) == (one.id, one.facts, BASE)
    assert stored.size == sum(map(len, one.files().values()))
    assert stack.facts_in_force()[fact(3).key] == (two.name, fact(3))
    assert stack.get("nobody-00000000") is None
    with pytest.raises(NotFound, match="is not in force"):
        stack.named("nobody-00000000")
    assert read_patch(store, stored).files() == one.files()
    assert problems(store) == []


def test_an_empty_folder_or_none_is_an_empty_stack(store: GitStore) -> None:
    assert read_stack(store).patches == ()
    git(store.root, "rm", "-q", "-r", "patches")
    commit_all(store)
    assert read_stack(store).patches == ()
    assert read_stack(store).tree == ""


def test_an_older_commit_has_its_own_stack(store: GitStore) -> None:
    add(store, numbers(1))
    add(store, numbers(2))
    assert len(read_stack(store, "HEAD^").patches) == 1
    assert read_stack(store, "HEAD~2").patches == ()
    with pytest.raises(NotFound, match="names no commit"):
        read_stack(store, "HEAD~9")


def test_patches_by_date(store: GitStore) -> None:
    names = [add(store, numbers(n))[0] for n in (5, 3, 4)]
    ordered = read_stack(store).by_date(store.history())
    assert [p.name for p, _ in ordered] == names
    assert [c.added for _, c in ordered if c] == [(name,) for name in names]
    assert [p.name for p, _ in read_stack(store).by_date([])] == sorted(names)


def test_patches_are_found_by_name_or_slug_and_never_by_hex(store: GitStore) -> None:
    lebron = Fact("LeBron James", "{} plays the sport of", "basketball")
    again = Fact("LeBron James", "{} was born in", "Akron")
    cafe = Fact("Cafe", "{} is", "open")
    patches = [patch([f]) for f in (lebron, again, cafe)]
    add(store, *patches)
    stack = read_stack(store)
    name = patches[0].name
    for word in (name, f"patches/{name}", f"patches/{name}/", "cafe"):
        assert find_patch(stack, word).name == (patches[2].name if word == "cafe" else name)
    with pytest.raises(NotFound, match="names 2 patches; say which: lebron-james-") as error:
        find_patch(stack, "lebron-james")
    assert all(p.name in str(error.value) for p in patches[:2])
    with pytest.raises(NotFound, match=r"did you mean .*lebron-james-"):
        find_patch(stack, "lebron-jame")
    for word in (str(store.head()), str(store.head())[:7], patches[0].id):
        with pytest.raises(NotFound, match="that is a commit"):
            find_patch(stack, word)
    for word in ("zzz", "", "/", "\x1b[31m"):
        with pytest.raises(NotFound, match="no such patch is in force") as error:
            find_patch(stack, word)
        assert str(error.value).isprintable()


# -- what is wrong with a tree -----------------------------------------------------------------


def test_a_symbolic_link(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    path = store.folder / "patches" / name / "facts.jsonl"
    path.unlink()
    path.symlink_to("/etc/passwd")
    commit_all(store)
    (problem,) = _found(store)
    assert (problem.path, "symbolic link" in problem.message) == (f"patches/{name}/facts.jsonl", True)


def test_a_folder_that_is_a_link_or_patches_that_is_one(store: GitStore, tmp_path: Path) -> None:
    (store.folder / "patches" / "linked-00000000").symlink_to("/etc")
    commit_all(store)
    assert "symbolic link" in _found(store)[0].message
    git(store.root, "rm", "-q", "-r", "patches")
    (store.folder / "patches").symlink_to(tmp_path)
    commit_all(store)
    (problem,) = _found(store)
    assert (problem.path, "symbolic link" in problem.message) == ("patches", True)


def test_a_gitlink(store: GitStore) -> None:
    head = git(store.root, "rev-parse", "HEAD")
    git(store.root, "update-index", "--add", "--cacheinfo", f"160000,{head},patches/module-00000000")
    git(store.root, "commit", "-q", "-m", "Module")
    assert "another repository" in _found(store)[0].message


def test_a_pointer_of_git_lfs(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 944\n"
    write(store, name, {"delta.safetensors": pointer})
    commit_all(store)
    (problem,) = _found(store)
    assert problem.path == f"patches/{name}/delta.safetensors"
    assert "LFS pointer" in problem.message


def test_an_oversize_file_is_not_read(store: GitStore, monkeypatch) -> None:
    (name,) = add(store, numbers(1))
    monkeypatch.setitem(inspection.MAX_BYTES, "delta.safetensors", 100)
    assert "over the limit of 100" in _found(store)[0].message
    monkeypatch.setitem(inspection.MAX_BYTES, "delta.safetensors", 10_000)
    monkeypatch.setattr(inspection, "MAX_PATCHES", 0)
    assert "over 0 patches" in _found(store)[0].message
    assert name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"*.jsonl merge=union\n", "not patchkit's own"),
        (ATTRIBUTES + b"*.jsonl text\n", "not patchkit's own"),
        (None, "is missing"),
    ],
)
def test_attributes_that_are_not_ours(store: GitStore, content: bytes | None, says: str) -> None:
    add(store, numbers(1))
    path = store.folder / "patches" / ".gitattributes"
    path.unlink() if content is None else path.write_bytes(content)
    commit_all(store)
    (problem,) = _found(store)
    assert says in problem.message
    command = problem.remedy.partition(": ")[2]
    subprocess.run(command, shell=True, check=True, cwd=store.root)
    commit_all(store)
    _found(store, 0)


def test_attributes_inside_a_patch(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    write(store, name, {".gitattributes": ATTRIBUTES})
    commit_all(store)
    assert _found(store)[0].path == f"patches/{name}/.gitattributes"


@pytest.mark.parametrize(
    "file", ["readme.md", ".DS_Store", "delta.safetensors~", "a\x1b[31m", "ü", "deep/er/file"]
)
def test_a_file_that_no_patch_has(store: GitStore, file: str) -> None:
    (name,) = add(store, numbers(1))
    path = store.folder / "patches" / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    commit_all(store)
    assert (
        "is not a file of a patch" in _found(store)[0].message or "folder inside" in _found(store)[0].message
    )


def test_a_file_name_that_is_not_utf8_and_a_file_beside_the_patches(store: GitStore) -> None:
    place = os.fsencode(store.folder / "patches") + b"/\xff\xfe"
    Path(os.fsdecode(place)).write_bytes(b"x")
    (store.folder / "patches" / "notes.txt").write_text("x")
    commit_all(store)
    assert all("only patches lie here" in problem.message for problem in _found(store, 2))


@pytest.mark.parametrize(
    "name", ["Upper-00000000", "no-hash", "two--00000000x", "-00000000", "a_b-00000000", "x" * 60]
)
def test_a_folder_that_is_not_named_as_patches_are(store: GitStore, name: str) -> None:
    write(store, name, numbers(1))
    commit_all(store)
    assert all("not named as patches are" in problem.message for problem in _found(store, 3))


@pytest.mark.parametrize("file", ["facts.jsonl", "delta.safetensors"])
def test_a_patch_that_misses_a_file(store: GitStore, file: str) -> None:
    (name,) = add(store, numbers(1))
    (store.folder / "patches" / name / file).unlink()
    commit_all(store)
    assert _found(store)[0].message == f"misses {file}"


def test_keys_may_be_left_out(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    (store.folder / "patches" / name / "keys.safetensors").unlink()
    commit_all(store)
    _found(store, 0)
    assert set(read_stack(store).patches[0].files) == {"facts.jsonl", "delta.safetensors"}


def test_a_patch_for_another_base(store: GitStore) -> None:
    add(store, numbers(1))
    (name,) = add(store, numbers(2, base=OTHER_BASE))
    (problem,) = _found(store)
    assert problem.path == f"patches/{name}"
    assert "made for another base (sha256:bbbbb" in problem.message
    other = Settings("tiny", None, OTHER_BASE)
    assert len(problems(store, settings=other)) == 1
    assert problems(store, settings=other)[0].path != problem.path


@pytest.mark.parametrize("file", ["facts.jsonl", "keys.safetensors"])
def test_files_of_two_versions_mixed(store: GitStore, file: str) -> None:
    one = numbers(1, 2)
    (name,) = add(store, one)
    write(store, name, {file: one.without([0]).files()[file]})
    commit_all(store)
    (problem,) = _found(store)
    assert problem.path == f"patches/{name}/{file}"
    assert "mixed two versions" in problem.message
    git(store.root, *problem.remedy.partition("git ")[2].replace("COMMIT", "HEAD^").split())
    commit_all(store)
    _found(store, 0)


@pytest.mark.parametrize("at", [0, 1, 9, 60, 400, -1])
def test_a_delta_that_was_altered(store: GitStore, at: int) -> None:
    one = numbers(1)
    (name,) = add(store, one)
    data = bytearray(one.files()["delta.safetensors"])
    data[at] ^= 0x20
    write(store, name, {"delta.safetensors": bytes(data)})
    commit_all(store)
    if at in (-1,):  # a number: another version, which Git's history shows; its header agrees
        _found(store, 0)
        assert read_stack(store).patches[0].id != one.id
    else:
        assert _found(store)[0].path == f"patches/{name}"


def test_facts_that_are_not_canonical(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    write(store, name, {"facts.jsonl": numbers(1).files()["facts.jsonl"].replace(b": ", b":")})
    commit_all(store)
    assert "facts.jsonl" in str(_found(store)[0])


def test_the_same_key_twice(store: GitStore) -> None:
    one, two = patch([fact(1), fact(2)]), patch([fact(3), fact(1, "chess")])
    add(store, one, two)
    (problem,) = _found(store)
    first, second = sorted((one, two), key=lambda p: p.name)
    assert problem.path.startswith(f"patches/{second.name}/facts.jsonl:")
    assert first.name in problem.message
    assert "otherwise" in problem.message
    add(store, patch([fact(2)], seed=4))
    assert any("too" in p.message for p in _found(store, 2))
    for _ in range(2):
        take_out_as_told(store, problems(store)[0].remedy)
    assert problems(store) == []


def test_a_conflict_in_the_index(store: GitStore) -> None:
    one = numbers(1, 2)
    (name,) = add(store, one)
    git(store.root, "switch", "-q", "-c", "side")
    store.record(Changes(patches={name: one.without([0]).files()}), "Out")
    git(store.root, "switch", "-q", "main")
    store.record(Changes(patches={name: one.without([1]).files()}), "Out")
    git(store.root, "merge", "side", ok=False)
    (problem,) = problems(store)
    assert (problem.path, "in conflict" in problem.message) == (f"patches/{name}", True)
    assert problems(store, str(store.head())) == []


@pytest.mark.parametrize("gone", ["HEAD", "the other side"])
def test_a_conflict_with_a_side_that_took_the_patch_back(store: GitStore, gone: str) -> None:
    """Only what there is can be chosen, and each command of the line does what it says."""
    one = numbers(1, 2)
    (name,) = add(store, one)
    changes = [Changes(removed=[name]), Changes(patches={name: one.without([0]).files()})]
    git(store.root, "switch", "-q", "-c", "side")
    store.record(changes[gone == "HEAD"], "One way")
    git(store.root, "switch", "-q", "main")
    store.record(changes[gone != "HEAD"], "The other way")
    git(store.root, "merge", "side", ok=False)
    (problem,) = problems(store)
    assert f"{gone} took it back" in problem.message
    absent = "--ours" if gone == "HEAD" else "--theirs"
    assert absent not in problem.remedy
    for command in re.findall(r"git (?:rm|checkout|add) [^,;]*?'[^']*'", problem.remedy):
        subprocess.run(command, shell=True, check=True, cwd=store.root, capture_output=True)
        if not command.startswith("git checkout"):
            assert conflicts(store) == []
            assert (store.folder / "patches" / name).exists() == command.startswith("git add")
            git(store.root, "reset", "-q", "--hard")
            git(store.root, "merge", "side", ok=False)


def test_remedies_quote_a_path_with_spaces(tmp_path: Path) -> None:
    """In a subfolder, each remedy is one command that a shell takes as it is."""
    git(tmp_path, "init", "-q", "-b", "main")
    store = GitStore.init(tmp_path / "my kb")
    store.record(Changes(settings=SETTINGS), "Start")
    store = GitStore.find(store.folder)
    write(store, "a stray", {"notes.txt": b"mine\n"})
    commit_all(store)
    (problem,) = _found(store)
    subprocess.run(
        problem.remedy.partition(": ")[2], shell=True, check=True, cwd=tmp_path, capture_output=True
    )
    git(tmp_path, "commit", "-q", "-m", "As the line says")
    assert problems(store) == []
    (store.folder / "patches" / ".gitattributes").write_bytes(b"* merge=union\n")
    add(store, numbers(1))
    commit_all(store)
    (problem,) = _found(store)
    subprocess.run(problem.remedy.partition(": ")[2], shell=True, check=True, cwd=tmp_path)
    commit_all(store)
    assert problems(store) == []


def test_settings_that_are_missing_or_wrong(store: GitStore) -> None:
    add(store, numbers(1))
    (store.folder / "patchkit.toml").write_text("[base]\nsource = 3\n")
    commit_all(store)
    assert _found(store)[0].path == "patchkit.toml"
    (store.folder / "patchkit.toml").write_text("[base]\n[base\n")
    commit_all(store)
    assert str(_found(store)[0]).startswith("patchkit.toml:2: is not TOML")
    (store.folder / "patchkit.toml").unlink()
    (store.folder / "patchkit.toml").symlink_to("elsewhere")
    commit_all(store)
    assert "not a regular file" in _found(store)[0].message
    (store.folder / "patchkit.toml").unlink()
    commit_all(store)
    assert "is not in the tree" in _found(store)[0].message


def test_a_damaged_object_is_a_problem_of_its_patch(store: GitStore) -> None:
    (one, two) = add(store, numbers(1), numbers(2))
    entry = next(e for e in store.tree().entries if e.path == f"patches/{one}/delta.safetensors")
    path = store.common_dir / "objects" / entry.oid[:2] / entry.oid[2:]
    path.chmod(0o644)
    path.write_bytes(b"rot")
    found = _found(store)
    assert one in found[0].path
    assert two not in str(found[0])
    path.unlink()
    assert "missing from Git's objects" in _found(store)[0].message


def test_every_problem_is_listed_but_not_without_end(store: GitStore) -> None:
    for number in range(30):
        (store.folder / "patches" / f"note{number}").write_text("x")
    commit_all(store)
    with pytest.raises(TreeProblems) as error:
        read_stack(store)
    lines = str(error.value).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "... and 10 more problems"


# -- anything at all ---------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_tree_gives_a_traceback(store: GitStore, data: st.DataObject) -> None:
    """Trees of Git's own making, from random names, modes and contents."""
    blobs = [b"", b"x", SETTINGS, ATTRIBUTES, dump_facts([fact(1)]), *numbers(1).files().values()]
    names = st.sampled_from(
        ["facts.jsonl", "delta.safetensors", "keys.safetensors", ".gitattributes", "a b", "ü"]
    )
    folders = st.sampled_from(["", "person-1-00000000", numbers(1).name, "Bad", "deep/er"])
    modes = st.sampled_from(["100644", "100755", "120000"])
    content = st.one_of(st.sampled_from(blobs), st.binary(max_size=60))
    files = data.draw(st.lists(st.tuples(folders, names, modes, content), max_size=8))
    lines = []
    for folder, name, mode, blob in files:
        done = subprocess.run(
            ["git", "hash-object", "-w", "--stdin"],
            cwd=store.root,
            input=blob,
            capture_output=True,
            check=True,
        )
        path = "/".join(part for part in ("patches", folder, name) if part)
        lines.append(f"{mode} {done.stdout.decode().strip()}\t{path}")
    env = {**os.environ, "GIT_INDEX_FILE": str(store.git_dir / "other-index")}
    subprocess.run(["git", "read-tree", "--empty"], cwd=store.root, env=env, check=True)
    subprocess.run(
        ["git", "update-index", "--index-info"],
        cwd=store.root,
        env=env,
        input="\n".join(lines).encode(),
        check=False,
    )
    tree = subprocess.run(["git", "write-tree"], cwd=store.root, env=env, capture_output=True, text=True)
    commit = git(store.root, "commit-tree", "-m", "any", tree.stdout.strip())
    found = problems(store, commit)
    assert all(str(problem).isprintable() for problem in found)
    try:
        stack = read_stack(store, commit)
    except PatchkitError:
        assert found
    else:
        assert not found
        assert all(patch.facts for patch in stack.patches)


def test_a_thousand_patches_that_were_believed_are_read_quickly(tmp_path: Path) -> None:
    """Some 25 ms on an idle machine; the first reading, every byte hashed, about half a second."""
    from patchkit.catalogue import Catalogue

    store = make_store(tmp_path / "kb")
    for number in range(1000):
        write(store, numbers(number).name, numbers(number))
    commit_all(store)
    catalogue = Catalogue(store.private)
    start = time.perf_counter()
    first = read_stack(store, memory=catalogue)
    hashed = time.perf_counter() - start
    start = time.perf_counter()
    again = read_stack(store, memory=catalogue)
    remembered = time.perf_counter() - start
    assert remembered < 0.5
    assert remembered < hashed / 2
    assert again == first
    assert len(again.patches) == 1000
    for old, new in zip(first.patches, again.patches, strict=True):  # parsed when they are asked for
        assert (new.header, new.facts) == (old.header, old.facts)
