"""A `patchkit` that starts at once: one process has imported the libraries, and forks for each command.

Importing torch and transformers takes seconds, most of what a command on a tiny model takes; pages have
hundreds of commands. What is run is the same `main`, in a process of its own, with the caller's words,
folder, environment and streams. What a start itself promises (hash seeds, signals, threads) is tested on
processes that really start: `fresh`, `run_process`.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

CLIENT = """#!{python} -IS
import marshal, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    socket.send_fds(line, [b"3"], [0, 1, 2])
    line.sendall(marshal.dumps((os.getcwd(), sys.argv[1:], dict(os.environ))))
    line.shutdown(socket.SHUT_WR)
    sys.exit(int(line.recv(4) or 70))
"""


@contextlib.contextmanager
def warm_command(folder: Path) -> Iterator[Path]:
    """A folder for the front of a PATH, in which `patchkit` is a client of a process that waits."""
    address, tools = folder / "socket", folder / "bin"
    tools.mkdir(parents=True)
    client = tools / "patchkit"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)), encoding="utf-8")
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        with server:  # closing its standard input ends it
            yield tools


def serve(listener: socket.socket) -> None:
    """Fork for every caller, until standard input ends."""
    import click  # noqa: F401
    import git  # noqa: F401
    import peft  # noqa: F401
    import rich  # noqa: F401
    import sqlite_utils  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forked
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        line, _ = listener.accept()
        if os.fork() == 0:
            answer(line)
        line.close()


def answer(line: socket.socket) -> NoReturn:
    """In a fork: run one command in another, and tell its exit code to who called."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    parts = []
    while part := line.recv(1 << 16):
        parts.append(part)
    folder, words, environment = marshal.loads(b"".join(parts))
    if (child := os.fork()) == 0:
        line.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = ["patchkit", *words]
        from patchkit.commands import main

        sys.exit(main())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line.sendall(str(code % 256).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
