"""Git's verbs under patchkit's name: the Git command to type, as the shell would read it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_helpers import Cli, cli, git_environment, home, knowledge, run_process
from git_helpers import git

from patchkit.commands import COMMANDS, VERBS

__all__ = ["cli", "git_environment", "home", "knowledge"]


def typed(cli: Cli, *words: str) -> list[str]:
    """The words of the command that is answered."""
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "is Git's own" in line
    return shlex.split(line.partition("type: ")[2])


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_each_is_answered_and_is_one_of_gits(cli: Cli, home: Path, verb: str) -> None:
    assert typed(cli, verb) == ["git", verb]
    assert verb not in COMMANDS
    git(home, "init", "-q")
    assert "is not a git command" not in git(home, verb, "-h", ok=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-d", "my branch"),
        ("--force", "--", "it's", "$HOME", "."),
        ("-C", "inside"),
        ("--help",),
        ("-n", "--json", "-q"),
        ("", "a;b", "*"),
    ],
    ids=repr,
)
def test_the_arguments_are_the_persons(cli: Cli, home: Path, arguments: tuple[str, ...]) -> None:
    assert typed(cli, "branch", *arguments) == ["git", "branch", *arguments]
    assert typed(cli, "-C", "a b", "add", *arguments) == ["git", "-C", "a b", "add", *arguments]


def test_what_a_terminal_would_act_on_is_shown(cli: Cli, home: Path) -> None:
    done = cli("tag", "a\x1b[31m\nb")
    assert done.code == 2
    assert "\x1b" not in done.err
    assert len(done.err.splitlines()) == 1


def test_they_are_no_commands_in_help_or_completion(cli: Cli, home: Path) -> None:
    shown = {line.split()[0] for line in cli.ok("--help").out.splitlines() if line.startswith("  ")}
    assert not shown & VERBS
    env = {"_PATCHKIT_COMPLETE": "bash_complete", "COMP_WORDS": "patchkit pu", "COMP_CWORD": "1"}
    assert [line.partition(",")[2] for line in run_process(at=home, env=env).out.split()] == ["pull"]
