"""Ends a fork of this process in the middle of an action, as a power cut or a kill would."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

KILLED = 77
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_Ready = TypeVar("_Ready")


def killed_at(
    prepare: Callable[[], _Ready],
    action: Callable[[_Ready], object],
    inside: Path,
    number: int,
    *,
    commands: bool = True,
) -> bool:
    """Do the action in a fork that ends itself at its `number`-th file operation below `inside` (from 0) or
    start of a command; whether it did. An action that fails is a failure of the test."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # its threads are not in a fork, and it would wait for them
            ready = prepare()
            _arm(os.fspath(inside), number, commands)
            action(ready)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED


def _arm(inside: str, left: int, commands: bool) -> None:
    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(KILLED)

    def hook(event: str, args: tuple[object, ...]) -> None:
        path = os.fspath(args[0]) if args and isinstance(args[0], (str, os.PathLike)) else ""
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        named = (event in _EVENTS or writes) and str(path).startswith(inside)
        if named or (commands and event == "subprocess.Popen"):
            count()

    sys.addaudithook(hook)
