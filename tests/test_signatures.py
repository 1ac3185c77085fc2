"""`patchkit verify` of a repository: signed by Git's own means, and any change after that is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from git_helpers import git
from proof_helpers import (  # noqa: F401
    as_person,
    fine,
    here,
    made_patch,
    one_line,
    person,
    saved,
    small_base,
    small_repository,
)

from patchkit.checkpoint import Checkpoint
from patchkit.repository import Repository
from patchkit.signatures import Signature, Signers

pytestmark = [
    pytest.mark.usefixtures("person"),
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen"),
]


def ssh_key(place: Path, name: str) -> Path:
    place.mkdir(exist_ok=True)
    path = place / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
    return path


def sign_as(kb: Path, key: Path | None) -> None:
    git(kb, "config", "gpg.format", "ssh")
    git(kb, "config", "commit.gpgsign", "false" if key is None else "true")
    if key is not None:
        git(kb, "config", "user.signingKey", str(key))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, keys of Ann and Bob, and a repository whose every commit of a patch Ann signed. Read only."""
    root = tmp_path_factory.mktemp("signed")
    with as_person():
        base = small_base(root / "base")
        ann, _ = ssh_key(root / "keys", "ann"), ssh_key(root / "keys", "bob")
        small_repository(root / "kb", base)
        sign_as(root / "kb", ann)
        fingerprint = Checkpoint.open(base).fingerprint()
        for number in range(3):
            folder = saved(made_patch(fingerprint, number, 3), root / "made")
            if number < 2:
                fine(here("-C", root / "kb", "apply", folder))
        git(root / "kb", "pack-refs", "--all")
    return root


@pytest.fixture
def root(signed: Path, tmp_path: Path) -> Path:
    """A copy of all that, at its own place."""
    shutil.copytree(signed, tmp_path / "r", symlinks=True)
    kb = tmp_path / "r" / "kb"
    git(kb, "config", "user.signingKey", str(tmp_path / "r" / "keys" / "ann"))
    git(kb, "config", "patchkit.base", str(tmp_path / "r" / "base"))
    return tmp_path / "r"


def by(root: Path, name: str) -> tuple[str, str]:
    return "--require-signed-by", str(root / "keys" / f"{name}.pub")


def fingerprint_of(root: Path, name: str) -> str:
    told = subprocess.run(
        ["ssh-keygen", "-l", "-f", root / "keys" / f"{name}.pub"], check=True, capture_output=True, text=True
    )
    return told.stdout.split()[1]


def verified(root: Path, *options: str) -> bool:
    done = here("-C", root / "kb", "verify", "--json", *options)
    assert done.code in (0, 1), done.err
    assert json.loads(done.out)["verified"] is (done.code == 0)
    return done.code == 0


def test_patches_of_a_required_signer_are_verified(root: Path) -> None:
    """By a key's file, by its fingerprint, and by the name that Git's configuration has for it."""
    assert verified(root, *by(root, "ann"))
    assert verified(root, "--require-signed-by", fingerprint_of(root, "ann"))
    assert verified(root, *by(root, "bob"), *by(root, "ann"))
    assert not verified(root, *by(root, "bob"))
    assert not verified(root, "--require-signed-by", fingerprint_of(root, "bob"))
    assert not verified(root)  # Git knows nobody
    allowed = root / "allowed"
    allowed.write_text(f"ann@example.org {(root / 'keys' / 'ann.pub').read_text()}")
    git(root / "kb", "config", "gpg.ssh.allowedSignersFile", str(allowed))
    assert verified(root)
    assert verified(root, "--require-signed-by", "ann@example.org")
    assert verified(root, "--require-signed-by", str(allowed))
    assert not verified(root, "--require-signed-by", "bob@example.org")
    assert not verified(root, *by(root, "bob"))


def test_it_says_who_signed_what(root: Path) -> None:
    done = here("-C", root / "kb", "verify", "--json", *by(root, "ann"))
    found = json.loads(done.out)
    names = sorted(name for commit in found["commits"] for name in commit["patches"])
    assert names == sorted(stored.name for stored in Repository.open(root / "kb").stack().patches)
    assert {commit["fingerprint"] for commit in found["commits"]} == {fingerprint_of(root, "ann")}
    assert found["commit"] == git(root / "kb", "rev-parse", "HEAD")
    shown = here("-C", root / "kb", "verify", *by(root, "bob"))
    assert shown.code == 1
    assert "2 of 2 commits not signed by one who is believed" in shown.out


def test_git_itself_agrees(root: Path) -> None:
    """The same commits through `git verify-commit`, with the same file of signers."""
    allowed = root / "allowed"
    allowed.write_text(f"ann@example.org {(root / 'keys' / 'ann.pub').read_text()}")
    commits = json.loads(here("-C", root / "kb", "verify", "--json", *by(root, "ann")).out)["commits"]
    for commit in commits:
        told = git(
            root / "kb", "-c", f"gpg.ssh.allowedSignersFile={allowed}", "verify-commit", commit["commit"]
        )
        assert fingerprint_of(root, "ann") in told


def test_a_merge_is_signed_as_every_commit_is(root: Path) -> None:
    """patchkit's own merge obeys `commit.gpgsign`, and brings in what the other branch signed."""
    kb = root / "kb"
    git(kb, "switch", "-q", "-c", "side")
    apply_a_patch(kb)
    git(kb, "switch", "-q", "main")
    revert_a_patch(kb)
    fine(here("-C", kb, "merge", "side"))
    assert len(git(kb, "rev-list", "--parents", "-1", "HEAD").split()) == 3
    assert verified(root, *by(root, "ann"))
    assert "-----BEGIN SSH SIGNATURE-----" in git(kb, "cat-file", "commit", "HEAD")


# What was done to it afterwards


def add_unsigned(root: Path, change: Callable[[Path], object]) -> None:
    sign_as(root / "kb", None)
    change(root / "kb")


def revert_a_patch(kb: Path) -> None:
    fine(here("-C", kb, "revert", "person-0-0"))


def apply_a_patch(kb: Path) -> None:
    fine(here("-C", kb, "apply", next((kb.parent / "made").glob("person-2-0-*"))))


def in_a_folder(kb: Path, name: str, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """The facts of a patch by hand, committed by plain Git."""
    file = next((kb / "patches").glob(f"{name}-*")) / "facts.jsonl"
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    git(kb, "commit", "-q", "-a", "-m", "By hand")


def swap_the_base(kb: Path) -> None:
    file = kb / "patchkit.toml"
    text = file.read_text()
    at = text.index("sha256:") + len("sha256:")
    file.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    git(kb, "commit", "-q", "-a", "-m", "By hand")


UNSIGNED = {
    "a patch reverted": revert_a_patch,
    "a patch applied": apply_a_patch,
    "a fact removed": lambda kb: in_a_folder(kb, "person-0-0", lambda lines: lines[1:]),
    "facts in another order": lambda kb: in_a_folder(kb, "person-0-0", lambda lines: lines[::-1]),
    "another base": swap_the_base,
}


@pytest.mark.parametrize("change", UNSIGNED)
def test_what_nobody_signed_is_not_verified(change: str, root: Path) -> None:
    assert verified(root, *by(root, "ann"))
    add_unsigned(root, UNSIGNED[change])
    assert not verified(root, *by(root, "ann"))
    assert not verified(root, *by(root, "ann"), *by(root, "bob"))


def test_what_another_signed_is_not_verified(root: Path) -> None:
    sign_as(root / "kb", root / "keys" / "bob")
    apply_a_patch(root / "kb")
    assert not verified(root, *by(root, "ann"))
    assert verified(root, *by(root, "ann"), *by(root, "bob"))


def test_a_patch_that_nobody_signed_stays_so_under_a_signed_commit(root: Path) -> None:
    add_unsigned(root, apply_a_patch)
    sign_as(root / "kb", root / "keys" / "ann")
    git(root / "kb", "commit", "-q", "--allow-empty", "-m", "Signed, on top of it")
    found = json.loads(here("-C", root / "kb", "verify", "--json", *by(root, "ann")).out)
    (bad,) = [commit for commit in found["commits"] if not commit["believed"]]
    assert [name[:10] for name in bad["patches"]] == ["person-2-0"]


def test_facts_in_another_order_are_no_sound_patch_even_signed(root: Path) -> None:
    """The header in delta.safetensors holds their hash, so a careless signature does not help."""
    in_a_folder(root / "kb", "person-0-0", lambda lines: lines[::-1])
    found = json.loads(here("-C", root / "kb", "verify", "--json", *by(root, "ann")).out)
    assert not found["verified"]
    assert "facts.jsonl" in found["problems"][0]["message"] + found["problems"][0]["path"]


def test_a_signature_moved_to_another_commit_is_bad(root: Path) -> None:
    kb = root / "kb"
    text = git(kb, "cat-file", "commit", "HEAD")
    forged = subprocess.run(
        ["git", "hash-object", "-t", "commit", "-w", "--stdin"],
        cwd=kb,
        input=text.replace("<ada@example.org>", "<eve@example.org>") + "\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert forged != git(kb, "rev-parse", "HEAD")
    git(kb, "reset", "-q", "--hard", forged)
    shown = here("-C", kb, "verify", *by(root, "ann"))
    assert shown.code == 1
    assert "the commit was altered" in " ".join(shown.out.split())


def test_another_base_on_this_machine_is_not_verified(root: Path) -> None:
    shutil.rmtree(root / "base")
    small_base(root / "base", seed=1)
    assert not verified(root, *by(root, "ann"))


def files_of(kb: Path) -> list[Path]:
    """Git's data that counts, and the work tree's patches."""
    named = [kb / ".git" / name for name in ("HEAD", "packed-refs", "index")]
    objects = (kb / ".git" / "objects").glob("??/*")
    return sorted([*named, *objects, *(path for path in (kb / "patches").rglob("*") if path.is_file())])


def test_a_flipped_byte_is_not_verified(root: Path) -> None:
    """One byte in every file; `test_gitcheck` and `test_fsck` flip each of them."""
    for number, path in enumerate(files_of(root / "kb")):
        before = path.read_bytes()
        at = (7919 * (number + 1)) % len(before)
        path.chmod(0o644)
        path.write_bytes(before[:at] + bytes([before[at] ^ 0xFF]) + before[at + 1 :])
        done = here("-C", root / "kb", "verify", "--json", *by(root, "ann"))
        assert done.code != 0, f"{path} at {at}"
        assert "Traceback" not in done.err
        path.write_bytes(before)
    assert verified(root, *by(root, "ann"))


# Whom one believes


@pytest.mark.parametrize(
    ("grade", "believed"),
    [
        ("G", True),
        ("U", False),
        ("X", False),
        ("Y", False),
        ("R", False),
        ("B", False),
        ("E", False),
        ("N", False),
    ],
)
def test_only_a_good_signature_is_believed(grade: str, believed: bool) -> None:
    signature = Signature("c" * 40, grade, "Ann <ann@example.org>", "A" * 40, "B" * 40)
    assert Signers().believes(signature, from_keys=False) is believed
    assert Signers.named(["ann@example.org"]).believes(signature, from_keys=False) is believed
    # named outright, a key need not be known to Git
    assert Signers.named(["b" * 40]).believes(signature, from_keys=False) is (grade in "GU")
    assert not Signers.named(["b@example.org", "c" * 40]).believes(signature, from_keys=False)


def test_a_word_that_is_no_signer_is_one_line(root: Path) -> None:
    told = one_line(here("-C", root / "kb", "verify", "--require-signed-by", "ann"), 65)
    assert "no signer" in told
    (root / "empty.pub").write_text("# nothing\n")
    told = one_line(here("-C", root / "kb", "verify", "--require-signed-by", root / "empty.pub"), 65)
    assert "holds no SSH public keys" in told
    one_line(here("-C", root / "kb", "verify", "v9"), 66)
    one_line(here("-C", root / "kb", "verify", "--base", root / "base"), 2)


@pytest.mark.skipif(shutil.which("gpg") is None, reason="needs gpg")
def test_gpg(root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit signed with GPG: believed by its fingerprint, by its address, and by nobody else's."""
    home = tmp_path_factory.mktemp("gpg")
    home.chmod(0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    make = ["gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", "Gil <gil@example.org>"]
    subprocess.run([*make, "ed25519", "sign"], check=True, capture_output=True)
    listed = subprocess.run(
        ["gpg", "--batch", "--with-colons", "--list-keys"], check=True, capture_output=True, text=True
    ).stdout
    fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))
    kb = root / "kb"
    git(kb, "config", "gpg.format", "openpgp")
    git(kb, "config", "user.signingKey", fingerprint)
    apply_a_patch(kb)
    ann = by(root, "ann")
    assert verified(root, *ann, "--require-signed-by", fingerprint)
    assert verified(root, *ann, "--require-signed-by", "gil@example.org")
    assert not verified(root, *ann)
    assert not verified(root, *ann, "--require-signed-by", "A" * 40)
    assert not verified(root, *ann, "--require-signed-by", "eve@example.org")
    subprocess.run(
        ["gpgconf", "--kill", "gpg-agent"], check=False, env={**os.environ, "GNUPGHOME": str(home)}
    )
