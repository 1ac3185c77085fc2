"""Signatures of exported folders and builds, by sigstore's model-signing with elliptic-curve keys.

A signature is a file in the folder, ``model.sig``, that holds the SHA-256 of every other file in it, hidden
ones too, as a statement that model-signing's own `verify key` reads. Promises: verified is only a folder in
which no file was altered, added, taken away or left out of the statement, under one of the keys named.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchkit.builds.record import SIGNATURE
from patchkit.errors import BadInput, CheckFailed, Misconfigured, NotFound, Unavailable
from patchkit.files import reading, write_durably
from patchkit.problem import one_line

__all__ = ["sign_folder", "verify_folder"]

_END = r"""["'](?:, ["']|\]$)"""  # of an entry in a list that Python has printed
_MAX = 64 << 20  # bytes of a signature: some hundred for each file


def sign_folder(folder: Path, key: Path, password: Callable[[], str] | None = None) -> Path:
    """Sign every file in ``folder`` with the private ``key`` (PEM, NIST P-256, P-384 or P-521).

    Returns the signature's path; one that is there is replaced. ``password`` is asked for where the key is
    encrypted. `NotFound`, `BadInput` for a folder with symbolic links or a key that is none, `Misconfigured`
    where the key cannot be opened, `Unavailable` without model-signing.
    """
    signing = _library("signing")
    _check_folder(folder)
    _refuse_inside(folder, key)
    pem = _key(key, b"PRIVATE KEY", "a private key in PEM")
    secret = _secret(key, pem, password)
    place = folder / SIGNATURE
    config = signing.Config().set_hashing_config(_everything_but([place.absolute()]))
    with tempfile.TemporaryDirectory(prefix="patchkit-") as scratch:
        written = Path(scratch, SIGNATURE)
        try:
            config.use_elliptic_key_signer(private_key=key, password=secret)
        except OSError:
            raise
        except Exception as error:  # of cryptography's, which knows more keys than model-signing
            raise Misconfigured(
                f"{key}: cannot be opened as a key to sign with ({_told(error)}); it has to be on a curve of "
                "NIST's (P-256, P-384, P-521), and its password right"
            ) from error
        try:
            config.sign(folder.absolute(), written)
        except ValueError as error:
            raise BadInput(f"{folder}: cannot be signed ({_told(error)})") from error
        write_durably(place, written.read_bytes())
    return place


def verify_folder(folder: Path, keys: Sequence[Path]) -> Path:
    """The one of ``keys`` (public, PEM) under which every file in ``folder`` is as it was signed.

    `CheckFailed` names what differs, or says that none of the keys signed it.
    """
    verifying, hashing = _library("verifying"), _everything_but([])
    _check_folder(folder)
    for key in keys:
        _refuse_inside(folder, key)
        _key(key, b"PUBLIC KEY", "a public key in PEM")
    place = folder / SIGNATURE
    if place.is_symlink() or not place.is_file():
        raise CheckFailed(f"{folder}: is not signed (it holds no {SIGNATURE})")
    left_out = _left_out(place)
    for key in keys:
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        except Exception as error:  # of cryptography's, which knows more keys than model-signing
            raise BadInput(
                f"{key}: is no public key on a curve of NIST's (P-256, P-384, P-521) ({_told(error)})"
            ) from error
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning of old signatures
                config.set_hashing_config(hashing).verify(folder.absolute(), place)
        except OSError as error:
            told = error.strerror or error
            raise NotFound(f"{error.filename or folder}: cannot be read ({told})") from error
        except Exception as error:  # of its own, of cryptography and of protobuf
            if "mismatch: [" in str(error):
                raise CheckFailed(f"{folder}: {_differing(str(error))}") from error
            continue
        if unsigned := sorted(name for name in left_out if os.path.lexists(folder / name)):
            raise CheckFailed(f"{folder}: the signature leaves out {one_line(', '.join(unsigned))}")
        return key
    raise CheckFailed(f"{folder}: its signature is not by {_either(keys)}, or is damaged")


def _everything_but(paths: Sequence[Path]) -> Any:
    """SHA-256 of every file, those that are Git's in other folders too."""
    hashing = _library("hashing").Config().use_file_serialization(hashing_algorithm="sha256")
    return hashing.set_ignored_paths(paths=paths, ignore_git_paths=False)


def _left_out(signature: Path) -> list[str]:
    """The files that a signature's statement says it ignores, but for the signature's own. `CheckFailed`."""
    try:
        with reading(signature) as file:
            bundle = json.loads(file.read(_MAX))
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        ignored = statement["predicate"]["serialization"].get("ignore_paths", [])
        return [str(name) for name in ignored if str(name) != SIGNATURE]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckFailed(f"{signature}: cannot be read as a signature of model-signing") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise Unavailable(
            f"folders are signed by model-signing, which cannot be imported ({error.name}); "
            "install it: pip install model-signing pyopenssl"
        ) from error


def _refuse_inside(folder: Path, key: Path) -> None:
    """A private key would be shipped; a public one is its sender's word for themselves."""
    if key.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{key}: lies in the folder itself; keep keys elsewhere")


def _check_folder(folder: Path) -> None:
    """Nothing in it leads elsewhere, and nothing in it is hidden from who looks."""
    if not os.path.isdir(folder):
        raise NotFound(f"{folder}: is not a folder")
    for place, folders, names in os.walk(folder, onerror=_not_listed):
        for path in (Path(place, name) for name in (*folders, *names)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BadInput(
                    f"{path}: is no regular file, and what it leads to would not be signed; put a copy there"
                )


def _not_listed(error: OSError) -> None:
    raise BadInput(
        f"{error.filename}: cannot be listed ({error.strerror}), so that nobody knows what lies in it; "
        "give yourself permission"
    )


def _key(key: Path, mark: bytes, what: str) -> bytes:
    with reading(key) as file:
        data = file.read(1 << 16)
    if b"-----BEGIN " not in data or mark not in data:
        raise BadInput(
            f"{key}: is not {what}; make a pair: openssl ecparam -name prime256v1 -genkey -noout "
            "-out key.pem, and its public half: openssl ec -in key.pem -pubout -out key.pub.pem"
        )
    return data


def _secret(key: Path, pem: bytes, password: Callable[[], str] | None) -> bytes | None:
    if b"ENCRYPTED" not in pem:
        return None
    if password is None:
        raise Misconfigured(f"{key}: is encrypted, and no password was given")
    return os.fsencode(password())


def _either(keys: Sequence[Path]) -> str:
    names = [one_line(str(key)) for key in keys]
    return names[0] if len(names) == 1 else f"any of {', '.join(names)}"


def _differing(said: str) -> str:
    """The files that model-signing's message names; of their hashes nobody reads anything."""
    names = {
        "not signed": re.findall(rf"Extra files found in model .*?': (.*?){_END}", said),
        "missing": re.findall(rf"Missing files in model .*?': (.*?){_END}", said),
        "altered": re.findall(r"Hash mismatch for \\?'(.*?)\\?': Expected", said),
    }
    told = [f"{what}: {one_line(', '.join(found))}" for what, found in names.items() if found]
    return "; ".join(told) or one_line(said)


def _told(error: Exception) -> str:
    return one_line(" ".join(str(error).split()))[:300]
