"""What can go wrong, in one place: every error that a user may meet and its exit code.

An error's message is one line that names the file and line or the patch, says what is wrong
and how to go on. ``docs/exit-codes.md`` is this table in prose; a test keeps the two equal.
"""

from __future__ import annotations

from copy import copy
from typing import Self

__all__ = [
    "BadInput",
    "Busy",
    "CheckFailed",
    "Misconfigured",
    "NotFound",
    "NotWritten",
    "PatchkitError",
    "Refused",
    "Unavailable",
    "WouldOverwrite",
]


class PatchkitError(Exception):
    """An error that is said in one line and ends the command with ``exit_code``."""

    exit_code = 70

    @property
    def message(self) -> str:
        return str(self)

    def retold(self, text: str) -> Self:
        """The same error in these words; some are made of more than a text."""
        again = copy(self)
        again.args = (text,)
        return again


class CheckFailed(PatchkitError):
    """A check ran to its end and found damage (``fsck``), or an export that fails its ``--probe``."""

    exit_code = 1


class Refused(PatchkitError):
    """A gate or rule refused the edit, whose work is kept aside, or the stack."""

    exit_code = 3


class BadInput(PatchkitError):
    """Facts, a patch, a checkpoint, a setting or a tree that cannot be believed."""

    exit_code = 65


class NotFound(PatchkitError):
    """A file, patch, fact, commit, repository or base that is not there."""

    exit_code = 66


class Unavailable(PatchkitError):
    """Something outside patchkit is missing: Git, a hub, an optional package."""

    exit_code = 69


class WouldOverwrite(PatchkitError):
    """The output is there already and is not patchkit's to replace."""

    exit_code = 73


class NotWritten(PatchkitError):
    """The disk is full, read-only or failing."""

    exit_code = 74


class Busy(PatchkitError):
    """Another writer holds the repository, or left a lock behind."""

    exit_code = 75


class Misconfigured(PatchkitError):
    """Git has no identity, distrusts the folder, or ``patchkit.toml`` is wrong."""

    exit_code = 78
