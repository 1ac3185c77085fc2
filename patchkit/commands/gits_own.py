"""Git's own verbs: `patchkit branch -d x` answers with the Git command to type."""

from __future__ import annotations

import shlex
from typing import Any

import click

from patchkit.errors import PatchkitError
from patchkit.problem import one_line

__all__ = ["GitsOwn", "answer"]


class GitsOwn(PatchkitError):
    """A wrong command line that is a right one for Git."""

    exit_code = 2


class _Answer(click.Command):
    """Takes whatever follows, each word as it is (click itself would lose a "--")."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["words"] = tuple(args)
        return []

    def invoke(self, ctx: click.Context) -> Any:
        where = ("-C", ctx.obj) if ctx.obj else ()
        typed = shlex.join(["git", *where, str(self.name), *ctx.params["words"]])
        shown = typed if typed.isprintable() else one_line(typed)
        raise GitsOwn(f"{self.name} is Git's own; type: {shown}")


def answer(verb: str) -> click.Command:
    """The command that says what to type instead."""
    return _Answer(verb, hidden=True, add_help_option=False)
