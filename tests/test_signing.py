"""`patchkit sign DIR` and `verify DIR`: every change to an exported folder is found, whatever it is."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from proof_helpers import as_person, fine, here, one_line, person  # noqa: F401
from shipping_helpers import edited

from patchkit.builds.record import SIGNATURE

pytestmark = pytest.mark.usefixtures("person")


def key_pair(place: Path, name: str, password: bytes | None = None) -> Path:
    """A pair in PEM; the private half's path. The public half lies beside it, NAME.pub.pem."""
    return write_pair(place, name, ec.generate_private_key(ec.SECP256R1()), password)


def write_pair(place: Path, name: str, key: Any, password: bytes | None = None) -> Path:
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (place / f"{name}.pem").write_bytes(private)
    (place / f"{name}.pub.pem").write_bytes(public)
    return place / f"{name}.pem"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a build and an adapter of it that Ann signed, and a second base. Read only."""
    root = tmp_path_factory.mktemp("signed")
    with as_person():
        knowledge = edited(root, "llama")
        fine(knowledge.export("--out", root / "adapter"))
        knowledge.build()
        edited(root / "other", "gpt2")
        for name in ("ann", "bob"):
            key_pair(root, name)
        for name in ("adapter", "build"):
            fine(here("sign", root / name, "--key", root / "ann.pem"))
    return root


@pytest.fixture
def root(signed: Path, tmp_path: Path) -> Path:
    """Copies of the adapter and the keys, to be altered."""
    shutil.copytree(signed / "adapter", tmp_path / "adapter")
    for path in signed.glob("*.pem"):
        shutil.copy(path, tmp_path)
    return tmp_path


def verify(folder: Path, key: Path, *options: object) -> tuple[int, str]:
    done = here("verify", folder, "--require-signed-by", key, *options)
    assert "Traceback" not in done.err
    return done.code, f"{done.out}{done.err}"


def test_a_signed_adapter_and_a_signed_build_are_verified(signed: Path) -> None:
    for name in ("adapter", "build"):
        code, said = verify(signed / name, signed / "ann.pub.pem", "--base", signed / "base")
        assert code == 0, said
    done = here("verify", signed / "adapter", "--require-signed-by", signed / "ann.pub.pem", "--json")
    found = json.loads(done.out)
    assert found["verified"]
    assert len(found["origin"]["patches"]) == 2
    assert here("verify", signed / "adapter", "--require-signed-by", signed / "bob.pub.pem").code == 1
    either = ("--require-signed-by", signed / "bob.pub.pem", "--require-signed-by", signed / "ann.pub.pem")
    assert here("verify", signed / "adapter", *either).code == 0


def test_model_signings_own_command_verifies_it(root: Path) -> None:
    """And not once it was altered: a program that knows nothing of patchkit."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", root / "adapter"]
    command += ["--signature", root / "adapter" / SIGNATURE, "--public_key", root / "ann.pub.pem"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    (root / "adapter" / "facts.jsonl").write_bytes(b"")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_the_base_it_was_made_for(signed: Path) -> None:
    code, said = verify(signed / "adapter", signed / "ann.pub.pem", "--base", signed / "other" / "base")
    assert code == 1
    assert "another base" in said
    code, _ = verify(signed / "build", signed / "ann.pub.pem", "--base", signed / "other" / "base")
    assert code == 1


def lines_changed(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], object]:
    def alter(folder: Path) -> object:
        file = folder / "facts.jsonl"
        return file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))

    return alter


def rewritten(name: str, old: str, new: str) -> Callable[[Path], object]:
    def alter(folder: Path) -> object:
        text = (folder / name).read_text()
        assert old in text
        return (folder / name).write_text(text.replace(old, new, 1))

    return alter


def leave_one_out(folder: Path) -> object:
    """The statement says that it ignores a file, which is altered; the signature is over the statement."""
    bundle = json.loads((folder / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["serialization"]["ignore_paths"].append("facts.jsonl")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return (folder / SIGNATURE).write_text(json.dumps(bundle))


ALTERED: dict[str, Callable[[Path], object]] = {
    "a fact removed": lines_changed(lambda lines: lines[1:]),
    "facts in another order": lines_changed(lambda lines: lines[::-1]),
    "a fact said twice": lines_changed(lambda lines: [lines[0], *lines]),
    "another base named": rewritten("patchkit-export.json", "sha256:", "sha256:0"),
    "another scale": rewritten("adapter_config.json", '"lora_alpha": 5', '"lora_alpha": 10'),
    "a file removed": lambda folder: (folder / "README.md").unlink(),
    "a file added": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
    "a hidden file added": lambda folder: (folder / ".gitattributes").write_bytes(b"x"),
    "a file in a new folder": lambda folder: ((folder / "a").mkdir(), (folder / "a/b").write_bytes(b"")),
    "a file renamed": lambda folder: (folder / "README.md").rename(folder / "readme.md"),
    "files exchanged": lambda folder: (folder / "README.md").write_bytes(
        (folder / "facts.jsonl").read_bytes()
    ),
    "no signature": lambda folder: (folder / SIGNATURE).unlink(),
    "an empty signature": lambda folder: (folder / SIGNATURE).write_bytes(b""),
    "a file left out": leave_one_out,
    "a signature of nothing": lambda folder: (folder / SIGNATURE).write_text("{}"),
    "no text": lambda folder: (folder / SIGNATURE).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("change", ALTERED)
def test_an_altered_folder_is_not_verified(change: str, root: Path) -> None:
    assert verify(root / "adapter", root / "ann.pub.pem")[0] == 0
    ALTERED[change](root / "adapter")
    code, said = verify(root / "adapter", root / "ann.pub.pem")
    assert code == 1, said


def test_every_flipped_byte_is_not_verified(root: Path) -> None:
    """64 places in each file, the signature's own included: there what reads the same may stay."""
    folder, key = root / "adapter", root / "ann.pub.pem"
    from patchkit.errors import CheckFailed
    from patchkit.shipping.signing import verify_folder

    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        step = max(1, len(before) // 64)
        for at in range(0, len(before), step):
            altered = before[:at] + bytes([before[at] ^ 0x01]) + before[at + 1 :]
            if path.name == SIGNATURE and _reads(altered) == _reads(before):
                continue
            path.write_bytes(altered)
            with pytest.raises(CheckFailed):
                verify_folder(folder, [key])
        path.write_bytes(before)
    verify_folder(folder, [key])


def _reads(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return data


def test_a_signed_build_is_a_build_like_any_other(signed: Path) -> None:
    """`fsck` finds nothing in it, and does not ask to move the signature away."""
    done = here("-C", signed / "kb", "fsck")
    assert done.code == 0, done.out


def test_a_base_s_own_signature_is_not_that_of_a_build(tmp_path: Path) -> None:
    """It cannot hold there, and would come back in the place of the build's own."""
    with as_person():
        knowledge = edited(tmp_path, "llama")
        (tmp_path / "base" / "model.sig").write_text("of the base", encoding="utf-8")
        knowledge.build()
        assert not (tmp_path / "build" / "model.sig").exists()
        key_pair(tmp_path, "ann")
        fine(here("sign", tmp_path / "build", "--key", tmp_path / "ann.pem"))
        signature = (tmp_path / "build" / "model.sig").read_bytes()
        assert here("-C", tmp_path / "kb", "fsck").code == 0
        knowledge.build()
        fine(here("-C", tmp_path / "kb", "fsck", "--repair"))
        assert (tmp_path / "build" / "model.sig").read_bytes() == signature
        assert verify(tmp_path / "build", tmp_path / "ann.pub.pem")[0] == 0


def test_a_program_reads_why_a_folder_is_not_verified(root: Path) -> None:
    (root / "adapter" / "extra.txt").write_text("more")
    done = here("verify", root / "adapter", "--require-signed-by", root / "ann.pub.pem", "--json")
    found = json.loads(done.out)
    assert (done.code, found["verified"], found["folder"]) == (1, False, str(root / "adapter"))
    assert found["problems"][0] in done.err


def test_each_file_that_differs_is_named(root: Path) -> None:
    folder = root / "adapter"
    (folder / "README.md").write_bytes(b"x")
    (folder / "adapter_config.json").write_bytes(b"x")
    (folder / "facts.jsonl").unlink()
    (folder / f"{200 * 'a'}.txt").write_bytes(b"x")
    said = " ".join(verify(folder, root / "ann.pub.pem")[1].split())
    for name in ("README.md", "adapter_config.json", "missing: facts.jsonl", f"not signed: {200 * 'a'}.txt"):
        assert name in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is hidden from root")
def test_a_folder_that_cannot_be_listed_hides_nothing(root: Path) -> None:
    (root / "adapter" / "dark").mkdir(mode=0o311)
    (root / "adapter" / "dark" / "evil").write_bytes(b"x")
    told = one_line(here("verify", root / "adapter", "--require-signed-by", root / "ann.pub.pem"), 65)
    assert "cannot be listed" in told
    one_line(here("sign", root / "adapter", "--key", root / "ann.pem"), 65)


def test_keys_of_other_kinds_are_refused_by_name(root: Path) -> None:
    for name, key in (
        ("ed25519", ed25519.Ed25519PrivateKey.generate()),
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("koblitz", ec.generate_private_key(ec.SECP256K1())),
    ):
        write_pair(root, name, key)
        assert "P-256" in one_line(here("sign", root / "adapter", "--key", root / f"{name}.pem"), 78)
        public = root / f"{name}.pub.pem"
        assert "P-256" in one_line(here("verify", root / "adapter", "--require-signed-by", public), 65)


def test_an_export_file_that_says_nothing_sound(root: Path) -> None:
    """Signed all the same: it is one line and no traceback."""
    for patches in ("null", "5", '{"a": 1}'):
        named = '"source": null, "revision": null, "commit": null'
        text = f'{{"format": 1, "base": "x", {named}, "patches": {patches}}}'
        (root / "adapter" / "patchkit-export.json").write_text(text)
        fine(here("sign", root / "adapter", "--key", root / "ann.pem"))
        told = one_line(here("verify", root / "adapter", "--require-signed-by", root / "ann.pub.pem"), 65)
        assert "patchkit-export.json" in told


def test_a_link_is_not_signed_and_not_verified(root: Path) -> None:
    (root / "adapter" / "linked").symlink_to(root / "ann.pem")
    one_line(here("sign", root / "adapter", "--key", root / "ann.pem"), 65)
    one_line(here("verify", root / "adapter", "--require-signed-by", root / "ann.pub.pem"), 65)


def test_what_the_signer_left_out_is_not_verified(root: Path) -> None:
    """Signed by model-signing's own command, which can be told to ignore files."""
    folder = root / "adapter"
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "sign",
        "key",
        folder,
        "--signature",
        folder / SIGNATURE,
    ]
    command += ["--private_key", root / "ann.pem", "--ignore-paths", folder / "facts.jsonl"]
    subprocess.run(command, capture_output=True, check=True)
    code, said = verify(folder, root / "ann.pub.pem")
    assert code == 1
    assert "leaves out facts.jsonl" in " ".join(said.split())


def test_keys_in_the_folder_itself_are_refused(root: Path) -> None:
    """The private one would be shipped, and the public one would be its sender's word for themselves."""
    for name in ("ann.pem", "ann.pub.pem"):
        shutil.copy(root / name, root / "adapter" / name)
    before = (root / "adapter" / SIGNATURE).read_bytes()
    told = one_line(here("sign", root / "adapter", "--key", root / "adapter" / "ann.pem"), 65)
    assert "lies in the folder itself" in told
    assert (root / "adapter" / SIGNATURE).read_bytes() == before
    told = one_line(
        here("verify", root / "adapter", "--require-signed-by", root / "adapter" / "ann.pub.pem"), 65
    )
    assert "lies in the folder itself" in told


def test_signing_again_after_a_change(root: Path) -> None:
    (root / "adapter" / "README.md").write_text("ours\n")
    fine(here("sign", root / "adapter", "--key", root / "bob.pem"))
    assert verify(root / "adapter", root / "bob.pub.pem")[0] == 0
    assert verify(root / "adapter", root / "ann.pub.pem")[0] == 1


def test_an_encrypted_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_pair(root, "eve", b"open sesame")
    one_line(here("sign", root / "adapter", "--key", key), 78)
    monkeypatch.setenv("PATCHKIT_KEY_PASSWORD", "wrong")
    one_line(here("sign", root / "adapter", "--key", key), 78)
    monkeypatch.setenv("PATCHKIT_KEY_PASSWORD", "open sesame")
    fine(here("sign", root / "adapter", "--key", key))
    assert verify(root / "adapter", root / "eve.pub.pem")[0] == 0


def test_wrong_input_is_one_line_and_signs_nothing(root: Path) -> None:
    (root / "adapter" / SIGNATURE).unlink()
    one_line(here("sign", root / "nowhere", "--key", root / "ann.pem"), 66)
    one_line(here("sign", root / "adapter", "--key", root / "nowhere.pem"), 66)
    one_line(here("sign", root / "adapter", "--key", root / "ann.pub.pem"), 65)
    (root / "rubbish.pem").write_text("-----BEGIN PRIVATE KEY-----\nrubbish\n-----END PRIVATE KEY-----\n")
    one_line(here("sign", root / "adapter", "--key", root / "rubbish.pem"), 78)
    assert not (root / "adapter" / SIGNATURE).exists()
    one_line(here("verify", root / "adapter"), 2)
    one_line(here("verify", root / "adapter", "--require-signed-by", root / "ann.pem"), 65)


def test_without_model_signing_it_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for name in [name for name in sys.modules if name.startswith("model_signing.")]:
        monkeypatch.delitem(sys.modules, name)
    told = one_line(here("sign", root / "adapter", "--key", root / "ann.pem"), 69)
    assert "pip install model-signing" in told
