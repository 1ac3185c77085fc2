"""`patchkit verify` of a repository: signed by Git's own means, and any change after that is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
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
from patchkit.git.signatures import Signature, Signers
from patchkit.git.store import Changes
from patchkit.repository import Repository
from patchkit.settings import dump_settings

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


def test_quiet_still_says_why_it_is_not_verified(root: Path) -> None:
    believed = here("-C", root / "kb", "verify", "-q", *by(root, "ann"))
    assert (believed.code, believed.out, believed.err) == (0, "", "")
    unsigned = here("-C", root / "kb", "verify", "-q", *by(root, "bob"))
    assert (unsigned.code, unsigned.out) == (1, "")
    assert "2 of 2 commits not signed by one who is believed" in unsigned.err
    in_a_folder(root / "kb", "person-0-0", lambda lines: lines[::-1])
    altered = here("-C", root / "kb", "verify", "-q", *by(root, "ann"))
    assert (altered.code, altered.out) == (1, "")
    assert "facts.jsonl" in altered.err


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


def test_a_fingerprint_believes_its_own_key_and_no_other_in_that_commit(root: Path) -> None:
    """A merged tag that Bob signed stands in the header of the merge that Ann signed, above her signature."""
    kb, ann = root / "kb", ("--require-signed-by", fingerprint_of(root, "ann"))
    git(kb, "switch", "-q", "-c", "side")
    git(kb, "commit", "-q", "--allow-empty", "-m", "Bob's")
    git(kb, "-c", f"user.signingKey={root / 'keys' / 'bob'}", "tag", "-s", "-m", "Bob's", "bobs")
    git(kb, "switch", "-q", "main")
    git(kb, "commit", "-q", "--allow-empty", "-m", "Ann's")
    git(kb, "merge", "-q", "--no-ff", "-m", "Bob's tag", "bobs")
    assert git(kb, "cat-file", "commit", "HEAD").count("BEGIN SSH SIGNATURE") == 2
    assert verified(root, *ann)
    sign_as(kb, root / "keys" / "bob")
    apply_a_patch(kb)
    assert not verified(root, *by(root, "ann"))
    assert not verified(root, *ann)
    assert verified(root, *ann, "--require-signed-by", fingerprint_of(root, "bob"))


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


def rewrite(kb: Path, base: str | None = None, *, turned: bool = False) -> None:
    """Every patch written again, soundly: facts in another order, or on another base."""
    store = Repository.open(kb).store
    patches = {}
    repository = Repository.open(kb)
    for name, patch in ((stored.name, repository.patch(stored)) for stored in repository.stack().patches):
        deltas = patch.deltas
        if turned:
            deltas = {
                weight: delta if delta.B is None else replace(delta, B=delta.B.flip(1), A=delta.A.flip(0))
                for weight, delta in deltas.items()
            }
        facts = patch.facts[::-1] if turned else patch.facts
        patches[name] = replace(
            patch, facts=facts, deltas=deltas, base=base or patch.base, solution=None
        ).files()
    settings = dump_settings(replace(store.settings(), base_fingerprint=base)) if base else None
    store.record(Changes(patches=patches, settings=settings), "By hand")


def swap_the_base(kb: Path) -> None:
    """The checkpoint on this machine, the fingerprint in patchkit.toml and all patches, together."""
    shutil.rmtree(kb.parent / "base")
    small_base(kb.parent / "base", seed=1)
    rewrite(kb, Checkpoint.open(kb.parent / "base").fingerprint())


UNSIGNED = {
    "a patch reverted": revert_a_patch,
    "a patch applied": apply_a_patch,
    "a fact removed": lambda kb: fine(here("-C", kb, "revert", "person-0-0", "--fact", "2")),
    "facts in another order": lambda kb: rewrite(kb, turned=True),
    "another base": swap_the_base,
}


@pytest.mark.parametrize("change", UNSIGNED)
def test_what_nobody_signed_is_not_verified(change: str, root: Path) -> None:
    """Each leaves a tree that is sound in itself: it is for the signature alone that it is not verified."""
    assert verified(root, *by(root, "ann"))
    add_unsigned(root, UNSIGNED[change])
    done = here("-C", root / "kb", "verify", "--json", *by(root, "ann"), *by(root, "bob"))
    assert done.code == 1
    assert json.loads(done.out)["problems"] == []
    sign_as(root / "kb", root / "keys" / "ann")
    git(root / "kb", "commit", "-q", "--amend", "--no-edit", "-S")
    assert verified(root, *by(root, "ann"))


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


def test_a_part_of_the_history_is_not_verified(root: Path) -> None:
    """A shallow clone's first commit looks as if it had brought everything."""
    kb = root / "kb"
    add_unsigned(root, apply_a_patch)
    sign_as(kb, root / "keys" / "ann")
    git(kb, "commit", "-q", "--allow-empty", "-m", "Signed, on top of it")
    git(root, "clone", "-q", "--depth", "1", kb.as_uri(), "part")
    git(root / "part", "config", "patchkit.base", str(root / "base"))
    told = one_line(here("-C", root / "part", "verify", *by(root, "ann")), 65)
    assert "git fetch --unshallow" in told
    git(root / "part", "fetch", "-q", "--unshallow")
    assert here("-C", root / "part", "verify", *by(root, "ann")).code == 1


def test_what_is_verified_does_not_name_its_signers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a file of keys in it, nor by one that is called like an address."""
    kb = root / "kb"
    shutil.copy(root / "keys" / "bob.pub", kb / "bob.pub")
    told = one_line(here("-C", kb, "verify", "--require-signed-by", kb / "bob.pub"), 65)
    assert "cannot name its own signers" in told
    shutil.copy(root / "keys" / "ann.pub", root / "ann@example.org")
    monkeypatch.chdir(root)
    assert not verified(root, "--require-signed-by", "ann@example.org")
    assert verified(root, "--require-signed-by", "./ann@example.org")


def test_a_revoked_key_is_nobodys(root: Path) -> None:
    """However it is named: `gpg.ssh.revocationFile` lists it."""
    git(root / "kb", "config", "gpg.ssh.revocationFile", str(root / "keys" / "ann.pub"))
    assert not verified(root, *by(root, "ann"))
    assert not verified(root, "--require-signed-by", fingerprint_of(root, "ann"))
    git(root / "kb", "config", "gpg.ssh.revocationFile", str(root / "keys" / "bob.pub"))
    assert verified(root, *by(root, "ann"))
    assert verified(root, "--require-signed-by", fingerprint_of(root, "ann"))


def test_a_key_that_had_expired_when_the_commit_was_made(root: Path) -> None:
    allowed = root / "allowed"
    key = (root / "keys" / "ann.pub").read_text()
    allowed.write_text(f'ann@example.org valid-before="20200101" {key}')
    assert not verified(root, "--require-signed-by", str(allowed))
    allowed.write_text(f'ann@example.org valid-after="20200101" {key}')
    assert verified(root, "--require-signed-by", str(allowed))


def test_without_the_base_it_says_that_nobody_hashed_it(root: Path) -> None:
    shutil.rmtree(root / "base")
    done = here("-C", root / "kb", "verify", "--json", *by(root, "ann"))
    assert (done.code, json.loads(done.out)["base"]) == (0, "not here")
    assert "was not hashed" in here("-C", root / "kb", "verify", *by(root, "ann")).out


def test_a_folder_that_is_called_like_a_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "kb")
    (root / "kb" / "main").mkdir()
    (root / "kb" / "HEAD").mkdir()
    assert verified(root, *by(root, "ann"))
    told = one_line(here("verify", "main", *by(root, "ann")), 2)
    assert "write ./main" in told


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
def test_only_a_good_signature_is_believed(grade: str, believed: bool, tmp_path: Path) -> None:
    ssh = Signature("c" * 40, grade, "ann@example.org", "SHA256:" + "A" * 43, "")
    gpg = Signature("c" * 40, grade, "Ann <ann@example.org>", "A" * 40, "B" * 40)
    assert Signers().believes(ssh) is believed
    assert Signers().believes(gpg) is believed
    address = Signers.named(["ann@example.org"], tmp_path)
    assert address.believes(ssh) is believed
    assert not address.believes(gpg), "a GPG key can give itself any name"
    # named outright, a GPG key need not be trusted; an SSH key is looked at again by itself
    assert Signers.named(["b" * 40], tmp_path).believes(gpg) is (grade in "GU")
    assert Signers.named(["SHA256:" + "A" * 43], tmp_path).believes(ssh) is believed
    assert not Signers.named(["b@example.org", "c" * 40], tmp_path).believes(gpg)


def test_a_word_that_is_no_signer_is_one_line(root: Path) -> None:
    told = one_line(here("-C", root / "kb", "verify", "--require-signed-by", "ann"), 65)
    assert "no signer" in told
    (root / "empty.pub").write_text("# nothing\n")
    told = one_line(here("-C", root / "kb", "verify", "--require-signed-by", root / "empty.pub"), 65)
    assert "holds no SSH public keys" in told
    told = one_line(here("-C", root / "kb", "verify", "--require-signed-by", "ssh-ed25519 " + 300 * "A"), 65)
    one_line(here("-C", root / "kb", "verify", "v9" * 200), 66)
    one_line(here("-C", root / "kb", "verify", "v9"), 66)
    one_line(here("-C", root / "kb", "verify", "--base", root / "base"), 2)


@pytest.mark.skipif(shutil.which("gpg") is None, reason="needs gpg")
def test_gpg(root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit signed with GPG: believed by its fingerprint, and by nobody else's."""
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
    assert not verified(root, *ann, "--require-signed-by", "gil@example.org")
    assert not verified(root, *ann)
    assert not verified(root, *ann, "--require-signed-by", "A" * 40)
    assert not verified(root, *ann, "--require-signed-by", "eve@example.org")
    subprocess.run(
        ["gpgconf", "--kill", "gpg-agent"], check=False, env={**os.environ, "GNUPGHOME": str(home)}
    )


def test_another_commit_is_judged_by_itself(root: Path) -> None:
    """What lies in the work tree is not of it."""
    kb = root / "kb"
    git(kb, "tag", "v1")
    git(kb, "commit", "-q", "--allow-empty", "-S", "-m", "Later")
    (kb / "patchkit.toml").write_text((kb / "patchkit.toml").read_text() + "# altered\n")
    assert not verified(root, *by(root, "ann"))
    done = here("-C", kb, "verify", "v1", "--json", *by(root, "ann"))
    assert (done.code, json.loads(done.out)["problems"]) == (0, [])
