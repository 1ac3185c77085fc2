"""Runs Git: one environment, one line for each thing that can go wrong.

What writes goes through GitPython's command runner (never its index or reference setters: they
have no compare-and-swap, ignore filters and hooks, and fail on SHA-256 repositories). What reads starts Git
itself, since GitPython's import is a fifth of a short command's time. Reading takes no locks; writing fsyncs
objects, index and references. A failure is a `PatchkitError` whose line says what to do. A user's string
is passed only behind `--` or `--end-of-options`, or through standard input.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from patchkit.errors import (
    BadInput,
    Busy,
    Misconfigured,
    NotFound,
    NotWritten,
    PatchkitError,
    Unavailable,
    WouldOverwrite,
)
from patchkit.problem import one_line

__all__ = ["ACTION", "MINIMUM", "Git", "age_of", "locked"]

MINIMUM = (2, 36)  # the first with core.fsync and cat-file --batch-command

# core.fsmonitor names a program that Git runs: an unpacked folder's own .git/config may hold one.
# Without user.useConfigOnly Git makes up an identity from the machine's name. What `git log` prints is read
# as UTF-8, and the first commit brought something too.
_ALWAYS = (
    "core.fsmonitor=false",
    "user.useConfigOnly=true",
    "i18n.logOutputEncoding=UTF-8",
    "log.showRoot=true",
)
_WRITING = ("core.fsync=added,reference", "i18n.commitEncoding=UTF-8", "core.safecrlf=false")
# Replaced objects would not hash to their ids.
_READING = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_REPLACE_OBJECTS": "1", "LANGUAGE": "C", "LC_ALL": "C"}
# Git sets these for its hooks, and a person may: they name a repository, which need not be the folder's, and
# read pathspecs in another way. Those of `git rev-parse --local-env-vars`, less the settings of `git -c`.
_ELSEWHERE = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_CONFIG", "GIT_DIR", "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_INTERNAL_SUPER_PREFIX", "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_REPLACE_REF_BASE", "GIT_SHALLOW_FILE", "GIT_WORK_TREE",
    "GIT_GLOB_PATHSPECS", "GIT_ICASE_PATHSPECS", "GIT_LITERAL_PATHSPECS", "GIT_NOGLOB_PATHSPECS",
)  # fmt: skip
_ERROR = re.compile(r"^(?:fatal|error): ", re.MULTILINE)
_ERROR_LINE = re.compile(r"^(?:fatal|error): .*\n?", re.MULTILINE)
_ENVIRONMENT = threading.Lock()  # the process has one
# Commands whose lines in the reflog begin with this word, by which `patchkit undo` knows its own. Not
# `switch`: Git finds the branch before by the words that it writes there itself.
ACTION = "patchkit"
_LOGGED = ("commit", "merge")


class Git:
    """Git in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _writer(self) -> Any:
        return _gitpython().Git(os.fspath(self.folder))

    def read(
        self, command: str, *args: str, stdin: bytes | None = None, config: tuple[str, ...] = ()
    ) -> bytes:
        """Run a command that changes nothing; its standard output."""
        status, out, err = self._read(command, args, config, stdin)
        if status:
            raise self.failure(command, status, err)
        return out

    def ask(self, command: str, *args: str) -> bytes | None:
        """Like `read`; None where Git answers "no" (status 1, and no error: a trace or a warning is none)."""
        status, out, err = self._read(command, args)
        if status == 1 and not _ERROR.search(err):
            return None
        if status:
            raise self.failure(command, status, err)
        return out

    def check(self, command: str, *args: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a command whose status and messages are its answer (`git fsck`); both outputs as text."""
        status, out, err = self._read(command, args, env=env)
        return status, out.decode("utf-8", "replace") + err

    def write(
        self,
        command: str,
        *args: str,
        stdin: bytes | None = None,
        config: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> bytes:
        """Run a command that writes, durably; its standard output."""
        # The runner sets LC_ALL=C, which hooks would inherit: a hook in Python could not print UTF-8.
        own = {"LC_ALL": os.environ.get("LC_ALL", "")}
        if command in _LOGGED:
            own["GIT_REFLOG_ACTION"] = ACTION
        status, out, err = self._write(
            command, args, _ALWAYS + _WRITING + config, {**own, **(env or {})}, stdin
        )
        if status:
            raise self.failure(command, status, err)
        return out

    def start(self, command: str, *args: str) -> subprocess.Popen[bytes]:
        """Start a command that reads and talks over its pipes (`cat-file`)."""
        try:
            return subprocess.Popen(
                _line(command, args, _ALWAYS),
                cwd=self._place(),
                env={**_here(), **_READING},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise _cannot_run(error) from error

    def check_version(self) -> None:
        """`Unavailable` where Git is not there or too old."""
        found = re.search(rb"(\d+)\.(\d+)", self.read("version"))
        if found is None or (int(found[1]), int(found[2])) < MINIMUM:
            shown = found[0].decode() if found else "of an unknown version"
            raise Unavailable(
                f"Git {shown} is too old: patchkit needs {MINIMUM[0]}.{MINIMUM[1]}; install a newer Git"
            )

    def ensure_identity(self) -> None:
        """`Misconfigured` where Git has no author or committer for a commit (none is made up)."""
        for name in ("GIT_AUTHOR_IDENT", "GIT_COMMITTER_IDENT"):
            self.read("var", name)

    def failure(self, command: str, status: int, err: str) -> PatchkitError:
        """The error that a failed command's messages mean."""
        remote = _REMOTE_MEANINGS if command in _REMOTE_COMMANDS else ()
        # A hook of a commit may print anything.
        of_git = "".join(_ERROR_LINE.findall(err)) if command == "commit" else err
        for pattern, explain in (*remote, *_MEANINGS):
            if found := re.search(pattern, of_git):
                return explain(found, self.folder)
        said = [one_line(line) for line in err.splitlines() if line.strip()]
        what = "; ".join(said[-3:])[:400] or ("it was ended" if status < 0 else f"status {status}")
        return PatchkitError(f"git {command.replace('_', '-')} failed: {what}")

    def _read(
        self,
        command: str,
        args: tuple[str, ...],
        config: tuple[str, ...] = (),
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes, str]:
        try:
            done = subprocess.run(
                _line(command, args, _ALWAYS + config),
                cwd=self._place(),
                env={**_here(), **_READING, **(env or {})},
                input=b"" if stdin is None else stdin,
                capture_output=True,
            )
        except (OSError, ValueError) as error:
            raise _cannot_run(error) from error
        return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")

    def _write(
        self,
        command: str,
        args: tuple[str, ...],
        config: tuple[str, ...],
        env: Mapping[str, str],
        stdin: bytes | None,
    ) -> tuple[int, bytes, str]:
        options: dict[str, Any] = {
            "env": dict(env),
            "with_extended_output": True,
            "with_exceptions": False,
            "stdout_as_string": False,
            "strip_newline_in_stdout": False,
        }
        try:
            runner = getattr(self._writer(c=list(config)), command)
            with ExitStack() as stack:
                if stdin is not None:
                    options["istream"] = file = stack.enter_context(tempfile.TemporaryFile())
                    file.write(stdin)
                    file.seek(0)
                stack.enter_context(_only_here())
                status, out, err = runner(*args, **options)
        except (OSError, ValueError, _gitpython().exc.GitCommandNotFound) as error:
            raise _cannot_run(error) from error
        return status, out, err if isinstance(err, str) else err.decode("utf-8", "replace")

    def _place(self) -> Path | None:
        """Where Git runs; where the folder is gone, here, and Git says that this is no repository."""
        return self.folder if os.access(self.folder, os.X_OK) else None


def _line(command: str, args: tuple[str, ...], config: tuple[str, ...]) -> list[str]:
    options = [word for setting in config for word in ("-c", setting)]
    return ["git", *options, command.replace("_", "-"), *args]


def _here() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}


@contextmanager
def _only_here() -> Iterator[None]:
    """The same for GitPython's runner, which copies the process's environment and can only add to it."""
    with _ENVIRONMENT:
        kept = {name: os.environ.pop(name) for name in _ELSEWHERE if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(kept)


def age_of(path: Path) -> str:
    """How long ago a file was written, in words; "" where it is gone."""
    try:
        seconds = max(0.0, time.time() - path.lstat().st_mtime)
    except OSError:
        return ""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} old"
    return f"{seconds:.0f} seconds old"


def locked(path: Path) -> Busy:
    """A lock of Git's stands in the way."""
    age = age_of(path)
    told = f" ({age})" if age else ""
    return Busy(
        f"{path}: another Git command holds this lock{told}; wait for it, or if none is running: "
        f"rm -f -- {shlex.quote(str(path))}"
    )


def _gitpython() -> Any:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # else importing it without Git raises
    import git

    return git


def _cannot_run(error: Exception) -> PatchkitError:
    if isinstance(error, ValueError):
        return BadInput(f"Git cannot be given that text ({one_line(str(error))}); leave the character out")
    if isinstance(error, FileNotFoundError) or not isinstance(error, OSError):  # GitPython's own: not found
        return Unavailable("Git is not on the PATH; install Git, or put it on the PATH")
    return Unavailable(f"Git cannot be run ({one_line(str(error))}); mend the installation of Git")


def _untrusted(found: re.Match[str], folder: Path) -> PatchkitError:
    command = f"git config --global --add safe.directory {shlex.quote(found[1])}"
    return Misconfigured(
        f"{found[1]}: Git does not trust this repository, it belongs to another user; if you do: {command}"
    )


def _locked(found: re.Match[str], folder: Path) -> PatchkitError:
    return locked(Path(found[1]))


def _overtaken(found: re.Match[str], folder: Path) -> PatchkitError:
    return Busy(
        f"{folder}: another Git command moved {one_line(found[1])} meanwhile; look at it (git log), try again"
    )


def _config_locked(found: re.Match[str], folder: Path) -> PatchkitError:
    return locked(folder / f"{found[1]}.lock")


def _unwritable(found: re.Match[str], folder: Path) -> PatchkitError:
    return NotWritten(
        f"{folder}: Git cannot write there ({one_line(found[0])}); make room or give write access"
    )


def _damaged(found: re.Match[str], folder: Path) -> PatchkitError:
    return BadInput(f"{folder}: Git's own data is damaged ({one_line(found[0])}); look with: git fsck --full")


def _unsigned(found: re.Match[str], folder: Path) -> PatchkitError:
    return Misconfigured(
        f"Git cannot sign the commit ({one_line(found[0])}); mend user.signingKey or the program that signs, "
        "or commit unsigned: git config commit.gpgSign false"
    )


def _no_identity(found: re.Match[str], folder: Path) -> PatchkitError:
    return Misconfigured(
        "Git does not know who you are; say it: git config --global user.name NAME and "
        "git config --global user.email ADDRESS"
    )


def _no_repository(found: re.Match[str], folder: Path) -> PatchkitError:
    return NotFound(f"{folder}: is not in a Git repository; make one: patchkit init BASE")


def _bare(found: re.Match[str], folder: Path) -> PatchkitError:
    return Misconfigured(f"{folder}: is a bare repository or inside .git; use a clone with a work tree")


def _overwritten(found: re.Match[str], folder: Path) -> PatchkitError:
    path = one_line(found[1].strip().splitlines()[0])
    return WouldOverwrite(
        f"{path}: is not committed and would be overwritten; commit it, or put it aside with: git stash -u"
    )


def _unmerged(found: re.Match[str], folder: Path) -> PatchkitError:
    return Busy(
        f"{folder}: a merge or the like is not finished; finish it, or end it: patchkit status says how"
    )


def _elsewhere(found: re.Match[str], folder: Path) -> PatchkitError:
    return Busy(
        f"{one_line(found[1])}: is checked out in the worktree {one_line(found[2])}; work there, "
        "or on another branch"
    )


def _no_remote(found: re.Match[str], folder: Path) -> PatchkitError:
    return NotFound(f"there is no Git repository there; look at the address ({one_line(found[0])})")


def _far(found: re.Match[str], folder: Path) -> PatchkitError:
    return Unavailable(f"cannot be reached ({one_line(found[0])}); look at the network and the address")


def _forbidden(found: re.Match[str], folder: Path) -> PatchkitError:
    kind = next(group for group in found.groups() if group)
    return BadInput(f"Git may not, or cannot, use {one_line(kind)!r} addresses; name an https or ssh URL")


# Of commands that reach elsewhere these are looked for first: of others the same words mean this machine.
_REMOTE_COMMANDS = ("clone", "fetch", "ls_remote")
_REMOTE_MEANINGS = (
    (
        r"transport '(\w+)' not allowed|remote helper for '(\w+)'|'remote-(\w+)' is not a git command",
        _forbidden,
    ),
    (r"'.*' does not appear to be a git repository|repository '.*' (?:does not exist|not found)", _no_remote),
    (r"[Cc]ould not resolve.*|unable to access '\w+://.*|Could not read from remote.*", _far),
    (r"unable to look up .*", _far),
    (r"Connection (?:refused|timed out|reset).*|unable to connect.*|could not read (?:User|Pass).*", _far),
    (r"Authentication failed.*|hung up unexpectedly|early EOF|Network is unreachable", _far),
)
# The first that fits is what is said. Git runs with LANGUAGE=C, so that its messages are these.
_MEANINGS = (
    (r"detected dubious ownership in repository at '(.+)'", _untrusted),
    (r"[Nn]ot a git repository", _no_repository),
    (r"must be run in a work tree", _bare),
    (r"[Uu]nable to create '(.+?\.lock)': File exists", _locked),
    (r"cannot lock ref '(.+?)': (?:is at \w+ but expected|reference already exists)", _overtaken),
    (r"could not lock config file (.+): File exists", _config_locked),
    (r"Please tell me who you are|empty ident name|no email was given|no name was given", _no_identity),
    (r"unable to auto-detect email address|auto-detection is disabled", _no_identity),
    (r"\w+ failed to sign the data|.* for ssh signing|cannot run \S*(?:gpg|ssh-keygen).*", _unsigned),
    (r"gpg\.ssh\.defaultKeyCommand.*|Load key .*|Couldn't (?:load public key|sign message).*", _unsigned),
    (r"No private key found.*|[Ff]ailed (?:writing|reading) ssh signing.*", _unsigned),
    (r"No space left on device|Read-only file system|Permission denied|Disk quota exceeded", _unwritable),
    (r"(?:couldn't|could not|unable to|failed to) write.*|write error.*|Out of diskspace", _unwritable),
    (r"Input/output error|File too large|insufficient permission", _unwritable),
    (r"unexpected line in \S*packed-refs|is not a GIT packfile|packfile \S+ .*|bad ref .*", _damaged),
    (r"index file corrupt|bad signature 0x\w+|bad index (?:file sha1|version).*", _damaged),
    (
        r"(?:loose object|object) \w+ .*is corrupt|hash mismatch.*|unable to (?:read|unpack) \w+ ?\w+",
        _damaged,
    ),
    (r"inflate: .*|bad object \w+|could not parse .*|garbage at end of .*|packfile .* cannot .*", _damaged),
    (r"missing (?:blob|tree|commit) .*|invalid object .*|Could not read \w+", _damaged),
    (r"files would be (?:overwritten|removed) by \w+:\n(.+)", _overwritten),
    (r"resolve your current index first|cannot switch branch (?:while|in the middle)", _unmerged),
    (r"'(.+)' is already (?:checked out|used by worktree) at '(.+)'", _elsewhere),
)
