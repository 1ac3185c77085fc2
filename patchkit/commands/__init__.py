"""The command line: one file a command, none of them imported before it is asked for.

``main`` is the one place that turns an error into a line and an exit code.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from gc import freeze, set_threshold

import click

from patchkit.errors import BadInput, NotWritten, PatchkitError, Unavailable

__all__ = ["main"]

atexit.register(freeze)  # or the interpreter, ending, looks through all of torch for garbage: two seconds

SECTIONS: dict[str, dict[str, str]] = {
    "Start": {
        "init": "Make a repository that stands on a base.",
        "clone": "Clone a repository, checked before it is checked out.",
        "base": "Show or set where the base lies on this machine.",
        "model": "Fetch and list models that need no hub.",
    },
    "Change": {
        "commit": "Edit facts into the model and commit them as a patch.",
        "revert": "Take back a patch, a commit, or one fact of a patch.",
        "apply": "Take in a patch folder from elsewhere.",
        "merge": "Merge another branch's facts into this one.",
        "refit": "Solve patches again for their targets, on this stack or a new base.",
        "undo": "Take back the last command of patchkit on this branch.",
    },
    "Look": {
        "status": "Say what is in force, and what is half done.",
        "log": "Show the commits that changed what the model knows.",
        "show": "Show one patch: facts, weights, results.",
        "diff": "Compare two stacks: facts, weights, and what the models say.",
        "blame": "Say which patch makes the model say something.",
        "bisect": "Find the commit that made or broke an answer.",
        "stack": "List the patches in force, or join some of them.",
        "facts": "Search the facts in force, or check a file of facts.",
        "report": "Write the stack as one HTML page.",
        "sql": "Ask the catalogue a question in SQL.",
        "path": "Print where patchkit keeps something.",
    },
    "Try": {
        "ask": "Ask the base and the stack side by side.",
        "eval": "Score a stack on facts, or sweep over edits of the base.",
        "locate": "Find the layers that hold facts, by causal tracing.",
        "tune": "Choose the recipe for the base by trials.",
        "editors": "List the editing methods.",
        "mend": "Train the hypernetwork of the editor mend.",
    },
    "Ship": {
        "build": "Write base and stack as an ordinary checkpoint folder.",
        "export": "Write patches as an adapter for another program.",
        "card": "Write the model card of the patches in force.",
        "import": "Take in another program's adapter as a patch.",
        "sign": "Sign an exported folder or a build.",
        "verify": "Hash everything, and read who signed it.",
    },
    "Keep": {
        "switch": "Go to a branch, and bring the build in line.",
        "pull": "Fetch, check what came, and go forward to it.",
        "fsck": "Hash everything again and find what was altered.",
        "gc": "Remove what this machine keeps and nothing refers to.",
        "reindex": "Derive the catalogue again from Git.",
    },
}
COMMANDS = {name: text for section in SECTIONS.values() for name, text in section.items()}


# Git's: they answer with the Git command to type, and are no commands in --help or completion.
VERBS = frozenset({
    "add", "am", "archive", "branch", "bundle", "checkout", "cherry-pick", "clean", "config", "describe",
    "fetch", "format-patch", "grep", "ls-files", "ls-remote", "mv", "notes", "push", "range-diff", "rebase",
    "reflog", "remote", "reset", "restore", "rm", "shortlog", "sparse-checkout", "stash", "submodule", "tag",
    "worktree",
})  # fmt: skip

READER_GONE = 141  # as a shell says it of what SIGPIPE ended


class LazyGroup(click.Group):
    """Finds ``patchkit.commands.NAME`` only when the command NAME is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in VERBS and cmd_name not in COMMANDS:
            from patchkit.commands.gits_own import answer

            return answer(cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"patchkit.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("-C", "directory", metavar="DIR", default=None, help="Work in the repository at DIR.")
@click.version_option(package_name="patchkit-llm", prog_name="patchkit")
@click.pass_context
def cli(ctx: click.Context, directory: str | None) -> None:
    """Git for what a language model knows.

    A batch of facts becomes a patch in a Git repository: put it on a base checkpoint, review it,
    ship it, and take it back to the bit.

    \b
      patchkit init smollm2-135m knowledge
      patchkit -C knowledge commit facts.jsonl
      patchkit -C knowledge ask "LeBron James plays the sport of"
      patchkit -C knowledge revert
    """
    ctx.obj = directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code and never lets a traceback out.

    ``PATCHKIT_TRACEBACK=1`` shows where an error came from.
    """
    set_threshold(10_000)  # most of what a short command makes lives until its end: few looks for garbage
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may be no UTF-8, a terminal may know no Δ
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        outcome = cli.main(args=arguments, prog_name="patchkit", standalone_mode=False)
        if sys.stdout is not None:  # closed, as under some schedulers
            sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail(_usage_line(error), error.exit_code, error)
    except (KeyboardInterrupt, click.Abort) as error:
        told = str(error.__cause__ or "") if isinstance(error, click.Abort) else str(error)
        _say(f"interrupted; {told or 'see patchkit status'}")
        return 130
    except PatchkitError as error:
        return _fail(error.message, error.exit_code, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except SystemExit as error:  # click's own ends: completion, and status 1 for a reader that went away
        return READER_GONE if error.code == 1 else int(error.code or 0)
    except UnicodeError as error:
        told = "a text or a name is not UTF-8, which prompts, messages and names of facts must be"
        return _fail(f"{told} ({getattr(error, 'reason', error)})", BadInput.exit_code, error)
    except OSError as error:
        return _fail(_os_line(error), NotWritten.exit_code, error)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
            told = "the device has too little memory for this; use a larger one, or --device cpu"
            return _fail(told, Unavailable.exit_code, error)
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _fail(
            f"internal error, please report it: {told} (PATCHKIT_TRACEBACK=1 shows where)", 70, error
        )


def _fail(message: str, exit_code: int, error: Exception) -> int:
    if os.environ.get("PATCHKIT_TRACEBACK"):
        raise error
    _say(message)
    return exit_code


def _say(message: str) -> None:
    from patchkit.commands.display import console, say

    out = console(stderr=True)
    for line in message.splitlines() or [""]:
        say(out, f"patchkit: {line}")


def _usage_line(error: click.ClickException) -> str:
    """What was typed wrongly, and where it is told how it is right."""
    said = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{said}; see {context.command_path} --help" if context else said


def _os_line(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    hint = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EROFS: "make the file system writable",
        errno.EACCES: "give yourself permission",
        errno.EPERM: "give yourself permission",
    }.get(error.errno or 0, "mend that")
    # What could not be written may be no more than the output of a commit that was made.
    said = (error.strerror or str(error)).lower()
    return f"{where}{said}; {hint}, see patchkit status, and run the command again if need be"
