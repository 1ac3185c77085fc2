"""``patchkit sign``: sign an exported folder or a build."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from patchkit.commands.common import json_option, print_json, quiet_option
from patchkit.commands.display import console, say
from patchkit.errors import Misconfigured

__all__ = ["command"]

PASSWORD = "PATCHKIT_KEY_PASSWORD"


@click.command("sign", short_help="Sign an exported folder or a build.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The private key, in PEM."
)
@quiet_option
@json_option
def command(folder: Path, key: Path, quiet: bool, as_json: bool) -> None:
    """Sign every file in DIR (an export, or a build) with a private key, into DIR/model.sig.

    The signature is one of sigstore's model-signing, whose own command verifies it too. Keys are
    elliptic-curve keys (NIST P-256, P-384, P-521) in PEM. Of an encrypted key the password is asked
    for at a terminal, or taken from PATCHKIT_KEY_PASSWORD.

    Commits are signed by Git: git config commit.gpgsign true, with gpg.format ssh and
    user.signingKey, or a GPG key. Every command of patchkit that commits obeys that.

    \b
    Examples:
      openssl ecparam -name prime256v1 -genkey -noout -out key.pem
      openssl ec -in key.pem -pubout -out key.pub.pem
      patchkit sign adapter --key key.pem
    """
    from patchkit.shipping.signing import sign_folder

    place = sign_folder(folder, key, _password)
    if as_json:
        print_json({"folder": str(folder), "signature": str(place)})
    elif not quiet:
        say(console(), f"{place}: signs every other file in {folder}")


def _password() -> str:
    if (given := os.environ.get(PASSWORD)) is not None:
        return given
    if not sys.stdin.isatty():
        raise Misconfigured(f"the key is encrypted; give its password in {PASSWORD}")
    return str(click.prompt("Password of the key", hide_input=True, err=True))
