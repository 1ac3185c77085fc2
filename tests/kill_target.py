"""A process with everything imported that forks to run one command, and lets it be killed where it is told.

Started by test_kill.py. A job is one line of JSON: the arguments, changes of the environment, and
one of: "trace" (a file for strace's record of the system calls), "kill" ([system call, number]:
strace kills the process as it enters that call), "exit_at" (without strace: leave at the n-th
call of a patched function). Answers with the exit status, negative for a signal.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

CALLS = (
    "openat,open,creat,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,"
    "symlinkat,fsync,fdatasync,write,pwrite64,ftruncate,truncate,copy_file_range,sendfile,ioctl,fallocate,"
    "chmod,fchmod,fchmodat,utimensat"
)
PATCHED = (
    "open", "write", "pwrite", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate",
    "copy_file_range",
)  # fmt: skip
EXITED = 9


def serve() -> None:
    import torch

    import patchkit.actions.apply
    import patchkit.actions.build
    import patchkit.actions.commit
    import patchkit.actions.init
    import patchkit.actions.revert
    import patchkit.editing.memit  # noqa: F401
    from patchkit.commands import main

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _become(job, main)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _become(job: dict[str, Any], main: Callable[[list[str]], int]) -> None:
    code = 70
    try:
        os.environ.update(job["environment"])
        with open(job["output"], "wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if "trace" in job:
            _attach("-y", "-o", job["trace"], "-e", f"trace={CALLS}")
        elif "kill" in job:
            call, number = job["kill"]
            _attach("-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
        elif "exit_at" in job:
            _patch(job["exit_at"])
        code = main(job["arguments"])
        sys.stdout.flush()
    finally:
        os._exit(code)


def _attach(*options: str) -> None:
    """Have strace follow this process (its main thread, not the commands that it starts)."""
    ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: our child may, whatever Yama says
    tracer = subprocess.Popen(
        ["strace", *options, "-p", str(os.getpid())], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert tracer.stderr is not None
    told = tracer.stderr.readline()
    if b"attached" not in told:
        sys.stderr.write(told.decode("utf-8", "replace"))
        os._exit(71)


def _patch(count: int) -> None:
    """Leave, without any clean-up, at the count-th call of a function that changes files or starts Git."""
    import git

    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                if function is write and len(args[1]) > 1:  # half of the bytes reach the file
                    function(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os._exit(EXITED)
            return function(*args, **options)

        return call

    write = os.pwrite
    for name in PATCHED:
        setattr(os, name, wrap(getattr(os, name)))
    opened = wrap(io.open)
    for module in (builtins, io):
        module.open = opened  # type: ignore[attr-defined]
    execute = git.cmd.Git.execute
    git.cmd.Git.execute = wrap(execute)  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
