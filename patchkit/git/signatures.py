"""Who signed commits, as Git says it (`%G?`): SSH keys and GPG, by Git's own means.

Git itself reads a key's owner from `gpg.ssh.allowedSignersFile` and from GPG's keyring. Here signers can also
be named outright, by a file of public keys or by a fingerprint, so that a machine needs no configuration to
know whom it believes. Promises: a commit counts as signed by somebody only where Git found its signature
good; a revoked key is nobody's. Whether a key had expired Git asks of the date that the commit claims.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, NotFound
from patchkit.files import reading
from patchkit.git.store import GitStore
from patchkit.problem import one_line

__all__ = ["Signature", "Signers", "read_signatures"]

GOOD, UNKNOWN, UNSIGNED = "G", "U", "N"
_MEANING = {
    UNKNOWN: "good, by a key that nobody here is known to have",
    UNSIGNED: "not signed",
    "B": "the signature is bad: the commit was altered",
    "E": "the signature cannot be checked",
    "X": "the signature has expired",
    "Y": "the key has expired",
    "R": "the key was revoked",
}

_FIELDS = ("%H", "%G?", "%GS", "%GF", "%GP")
_SSH_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}=?")
_GPG_FINGERPRINT = re.compile(r"[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64}")
_PUBLIC_KEY = re.compile(r"(?:sk-)?(?:ssh|ecdsa)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*(?: .*)?")
_ADDRESS = re.compile(r"[^\s/@]+@[^\s/@]+")
_SSH_SIGNATURE = re.compile(rb"-----BEGIN SSH SIGNATURE-----([A-Za-z0-9+/=\s]+)-----END SSH SIGNATURE-----")
_ANYBODY = '* namespaces="git" '
_ALLOWED = "gpg.ssh.allowedSignersFile"


@dataclass(frozen=True)
class Signature:
    """What Git says of one commit's signature; ``grade`` is its letter."""

    commit: str
    grade: str
    signer: str
    """The name that the key stands for: of an SSH key its principal, of GPG "Name <address>"."""
    fingerprint: str
    primary: str
    """The fingerprint of a GPG key's primary key, which is its own or that of the key it belongs to."""

    @property
    def ssh(self) -> bool:
        """Whether an SSH key made it; else GPG's, or nobody's."""
        return self.fingerprint.startswith("SHA256:")

    @property
    def said(self) -> str:
        """In words: by whom it is signed, or what is wrong."""
        if self.grade == GOOD:
            return one_line(self.signer)
        return _MEANING.get(self.grade, _MEANING["E"])

    def to_dict(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "grade": self.grade,
            "signer": self.signer,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Signers:
    """Whom one believes; where nothing is named, whomever Git's configuration knows.

    ``keys``: lines of an allowed-signers file, see ssh-keygen(1). ``fingerprints``: of SSH and of GPG keys.
    ``names``: addresses by which Git's configuration knows SSH keys. A GPG key is known by no address here: a
    key that is trusted under one name can give itself others.
    """

    keys: tuple[str, ...] = ()
    fingerprints: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    @classmethod
    def named(cls, words: Sequence[str], root: Path) -> Signers:
        """From files of public keys or allowed signers, fingerprints (SHA256:…, or GPG's), and addresses.

        `NotFound` for a file that is not there, `BadInput` for a word that is none of them, and for a file
        inside ``root``: what is verified cannot say by whom.
        """
        keys: list[str] = []
        fingerprints, names = set(), set()
        for word in words:
            if _SSH_FINGERPRINT.fullmatch(word):
                fingerprints.add(word.rstrip("="))
            elif _GPG_FINGERPRINT.fullmatch(bare := word.replace(" ", "")):
                fingerprints.add(bare.upper())
            elif _ADDRESS.fullmatch(word):
                names.add(word)
            elif os.path.isfile(word):
                if Path(word).resolve().is_relative_to(root.resolve()):
                    raise BadInput(
                        f"{word}: lies in the repository that is verified, which cannot name its own "
                        "signers; keep it elsewhere"
                    )
                keys += _keys_in(Path(word))
            elif os.sep in word or word.endswith(".pub"):
                raise NotFound(f"--require-signed-by {one_line(word)[:200]}: there is no such file of keys")
            else:
                raise BadInput(
                    f"--require-signed-by {one_line(word)[:200]!r}: is no signer; name a file of SSH public "
                    "keys, a fingerprint (SHA256:… or GPG's), or the address that Git's configuration knows "
                    "an SSH key by"
                )
        return cls(tuple(keys), frozenset(fingerprints), frozenset(names))

    def __bool__(self) -> bool:
        return bool(self.keys or self.fingerprints or self.names)

    def believes(self, signature: Signature) -> bool:
        """Whether one of them made it, as Git's own configuration sees it."""
        if not self:
            return signature.grade == GOOD
        if signature.ssh:
            known = signature.signer in self.names or signature.fingerprint in self.fingerprints
            return signature.grade == GOOD and known
        named = {signature.fingerprint, signature.primary} & self.fingerprints
        return signature.grade in (GOOD, UNKNOWN) and bool(named)


def read_signatures(
    store: GitStore, commits: Sequence[str], signers: Signers
) -> Mapping[str, tuple[Signature, bool]]:
    """For each commit its signature, and whether one of ``signers`` made it.

    Keys that are named outright need not be known to Git: the signatures are read again as if Git knew these
    alone, so that a key that `gpg.ssh.revocationFile` lists stays revoked.
    """
    found = {
        commit: (signature, signers.believes(signature))
        for commit, signature in _as_git_says(store, commits, None).items()
    }
    keys = [*signers.keys, *_keys_of(store, found, signers.fingerprints)]
    for commit, signature in _as_git_says(store, commits, keys).items() if keys else ():
        if signature.ssh and signature.grade == GOOD:
            found[commit] = (signature, True)
    return found


def _keys_of(
    store: GitStore, found: Mapping[str, tuple[Signature, bool]], fingerprints: frozenset[str]
) -> list[str]:
    """The keys with these fingerprints, from the commits that they signed."""
    keys = {
        key
        for commit, (signature, _) in found.items()
        if signature.ssh and signature.fingerprint in fingerprints
        for key in _keys_signing(store.objects.read(commit, "commit"), signature.fingerprint)
    }
    return sorted(_ANYBODY + key for key in keys)


def _keys_signing(commit: bytes, fingerprint: str) -> Iterator[str]:
    """The public key with this fingerprint in a commit's SSH signatures, spelled as in a .pub file.

    Its header may hold signatures of others too: a merged tag's, and any that Git does not look at. The
    format is OpenSSH's PROTOCOL.sshsig.
    """
    for block in _SSH_SIGNATURE.finditer(commit.partition(b"\n\n")[0]):
        try:
            blob = base64.b64decode(b"".join(block[1].split()), validate=True)
            key = blob[14 : 14 + int.from_bytes(blob[10:14], "big")]  # after "SSHSIG" and the version
            name = key[4 : 4 + int.from_bytes(key[:4], "big")].decode("ascii")
        except ValueError:
            continue
        digest = base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
        if fingerprint.rstrip("=") == f"SHA256:{digest}":
            yield f"{name} {base64.b64encode(key).decode()}"


def _as_git_says(store: GitStore, commits: Sequence[str], keys: Sequence[str] | None) -> dict[str, Signature]:
    """``keys``: whom an SSH key belongs to; None: as Git's configuration has it."""
    if not commits:
        return {}
    with _allowing(store, keys) as config:
        out = store.git.read(
            "log",
            "--no-walk=unsorted",
            "--stdin",
            "-z",
            "--no-color",
            "--no-show-signature",
            "--encoding=UTF-8",
            "--format=" + "%x01".join(_FIELDS),
            stdin="".join(f"{commit}\n" for commit in commits).encode(),
            config=config,
        )
    rows = [row.split("\x01") for row in out.decode("utf-8", "replace").split("\0") if row]
    unclear = ("E", "", "", "")  # a name may hold anything, and then means nobody
    return {row[0]: Signature(row[0], *(row[1:] if len(row) == len(_FIELDS) else unclear)) for row in rows}


@contextmanager
def _allowing(store: GitStore, keys: Sequence[str] | None) -> Iterator[tuple[str, ...]]:
    """Git's configuration for these SSH keys. Without a file of signers it calls every SSH signature none."""
    if keys is None and store.git.ask("config", "--get", _ALLOWED) is not None:
        yield ()
        return
    with tempfile.NamedTemporaryFile("w", prefix="patchkit-", suffix=".signers", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in keys or ()))
        file.flush()
        yield (f"{_ALLOWED}={file.name}",)


def _keys_in(path: Path) -> list[str]:
    """The lines of an allowed-signers file; a public key alone is allowed whatever it is called."""
    with reading(path) as file:
        text = file.read(1 << 20).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = [_ANYBODY + line if _PUBLIC_KEY.fullmatch(line) else line for line in lines]
    if not found or not all(re.search(r"(?:ssh|ecdsa)-\S+ [A-Za-z0-9+/]+", line) for line in found):
        raise BadInput(
            f"{path}: holds no SSH public keys (one a line, as in id_ed25519.pub, or allowed signers); "
            "name a GPG key by its fingerprint"
        )
    return found
