"""Writes docs/commands.md from the commands' own help.

    python docs/generate.py

``tests/test_docs.py`` fails while the page is not what this prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from patchkit.commands import SECTIONS, cli

PAGE = Path(__file__).with_name("commands.md")
WIDTH = 88
_HEAD = """# Commands

Written by `python docs/generate.py` from each command's `--help`. Branches, tags, merges, pushes and the like
are Git's own: `git branch`, `git tag`. `-C DIR` stands before or after a command's name. What reads takes
`--json`; what changes takes `--dry-run`. Progress is shown at a terminal only, on standard error. `NO_COLOR`
turns colours off. Exit codes are in [exit-codes.md](exit-codes.md).

Completion in bash: `eval "$(_PATCHKIT_COMPLETE=bash_source patchkit)"`; likewise `zsh_source`, `fish_source`.

## patchkit
"""


def commands_page() -> str:
    """The page, as it should be."""
    parts = [_HEAD, _help(cli, "patchkit", None)]
    root = click.Context(cli, info_name="patchkit", **cli.context_settings)
    for title, names in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        for name in names:
            command = cli.get_command(root, name)
            assert command is not None
            parts += _documented(command, name, root)
    return "".join(parts)


def _documented(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    yield f"\n### patchkit {' '.join([*_names(parent), name])}\n{_help(command, name, parent)}"
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=parent)
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _documented(found, below, context)


def _names(context: click.Context | None) -> list[str]:
    """The names below `patchkit` on the way to a context."""
    if context is None or context.parent is None:
        return []
    return [*_names(context.parent), str(context.info_name)]


def _help(command: click.Command, name: str, parent: click.Context | None) -> str:
    settings = {**command.context_settings, "max_content_width": WIDTH, "terminal_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"\n```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(commands_page(), "utf-8")
    sys.exit(0)
