"""``patchkit verify``: hash everything, and read who signed it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from patchkit.commands.common import directory_option, json_option, open_repository, print_json, quiet_option
from patchkit.commands.display import (
    BAD,
    GOOD,
    WARNING,
    Column,
    console,
    counted,
    progress_bars,
    say,
    table,
    text,
)
from patchkit.errors import CheckFailed, PatchkitError

if TYPE_CHECKING:
    from patchkit.actions.verify import Trusted, Verified, Vouched

__all__ = ["command"]


@click.command("verify", short_help="Hash everything, and read who signed it.")
@click.argument("target", required=False, metavar="[REV|DIR]")
@click.option(
    "--require-signed-by",
    "signers",
    multiple=True,
    metavar="WHO",
    help="Believe this signer alone (may be given again): a file of public keys, a fingerprint, an address.",
)
@click.option("--base", metavar="BASE", help="With DIR: it has to be made for this base.")
@directory_option
@quiet_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    target: str | None,
    signers: tuple[str, ...],
    base: str | None,
    directory: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether what is in force at REV (default: HEAD) is whole, and signed; or an exported folder DIR.

    \b
    A commit: Git's data, the patches and the base (where it is here) are hashed again. REV's commit
    has to be signed, and each commit that brought a patch in force. Without --require-signed-by
    whoever Git knows is believed (gpg.ssh.allowedSignersFile, GPG's keyring); with it nobody else:
    WHO is a file of SSH public keys or allowed signers outside the repository, a fingerprint
    (SHA256:… or GPG's), or the address that Git knows an SSH key by.

    \b
    A folder that `sign` signed: no file in it may be altered, added or gone. WHO is then the file of
    a public key in PEM, and --base says which base it has to be made for.

    Exit code 1 where it is not verified.

    \b
    Examples:
      patchkit verify
      patchkit verify v1.0 --require-signed-by ../release-keys.pub
      patchkit verify adapter --require-signed-by key.pub.pem --base smollm2-135m
    """
    if target is not None and os.path.isdir(target):
        if os.sep not in target and _names_a_commit(directory, target):
            raise click.UsageError(f"{target} is a commit and a folder; write ./{target} for the folder")
        _folder(Path(target), signers, base, quiet, as_json)
        return
    if base is not None:
        raise click.UsageError("--base goes with an exported folder; a commit names its own base")
    repository = open_repository(directory)
    with progress_bars(quiet or as_json) as progress:
        found = repository.verify(target or "HEAD", signers=signers, progress=progress)
    if as_json:
        print_json(found.to_dict())
    elif not quiet:
        show(console(), found)
        ctx.exit(0 if found.good else 1)
    if not found.good:
        raise CheckFailed("\n".join([*map(str, found.problems), _verdict(found)]))


def _names_a_commit(directory: str, word: str) -> bool:
    try:
        return bool(open_repository(directory).store.resolve(word))
    except PatchkitError:
        return False


def _folder(folder: Path, signers: tuple[str, ...], base: str | None, quiet: bool, as_json: bool) -> None:
    from patchkit.actions.verify import verify_shipped
    from patchkit.models.sources import resolve_base

    if not signers:
        raise click.UsageError(
            "a signature says nothing without the key to expect: --require-signed-by key.pub.pem"
        )
    place = None if base is None else resolve_base(base).folder
    try:
        found = verify_shipped(folder, [Path(signer) for signer in signers], place)
    except CheckFailed as error:
        if as_json:
            nobody = {"key": None, "origin": None}
            print_json({"folder": str(folder), "verified": False, "problems": [error.message], **nobody})
        raise
    if as_json:
        print_json(found.to_dict())
    elif not quiet:
        _show_folder(console(), found, base)


def _show_folder(out: Console, found: Trusted, base: str | None) -> None:
    say(out, f"{found.folder}: every file is as it was signed with {found.key}", GOOD)
    if found.origin is not None:
        made = f"for {base}" if base else f"for the base {found.origin.base}"
        say(out, f"{counted(len(found.origin.patches), 'patch')}, made {made}")


def show(out: Console, found: Verified) -> None:
    """The commits that count, one a row, or what is wrong with the bytes; then the verdict."""
    for problem in found.problems:
        say(out, f"✗ {problem}", BAD)
    if found.vouched:
        columns = [Column(""), Column("commit"), Column("brought", 2), Column("signed by", 3, wraps=True)]
        out.print(table(out, columns, [_row(one) for one in found.vouched]))
    if not found.base:
        say(out, "the base is not on this machine, and was not hashed: patchkit base PATH", WARNING)
    say(out, _verdict(found), GOOD if found.good else BAD)


def _verdict(found: Verified) -> str:
    short, count = found.commit[:8], counted(len(found.vouched), "commit")
    if found.good:
        return f"{short}: whole, and {count} that count signed"
    if found.problems:
        return f"{short}: not verified, {counted(len(found.problems), 'problem')}"
    bad = sum(not one.believed for one in found.vouched)
    return f"{short}: not verified, {bad} of {count} not signed by one who is believed"


def _row(one: Vouched) -> tuple[str | Text, ...]:
    mark = Text("✓", style=GOOD) if one.believed else Text("✗", style=BAD)
    signature = one.signature
    key = f" ({signature.fingerprint})" if signature.fingerprint else ""
    brought = ", ".join(one.patches) or one.subject
    return mark, signature.commit[:8], text(brought), text(f"{signature.said}{key}")
