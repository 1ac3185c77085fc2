"""The machine and its limits: matrix rate, disk, versions."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.report import Effort, Measured

__all__ = ["describe", "disk_rate", "matrix_rate", "measure", "one_thread", "peak_memory", "seconds_of"]

_PACKAGES = ("torch", "transformers", "peft", "safetensors")


def measure(effort: Effort) -> Measured:
    size = 1 << (22 if effort is Effort.QUICK else 29)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        disk = disk_rate(Path(folder), size)
    rows = [
        {"limit": "float32 matrix product, GFLOP/s", "measured": matrix_rate() / 1e9},
        {"limit": "float64 matrix product, GFLOP/s", "measured": matrix_rate(torch.float64) / 1e9},
        {"limit": "write and sync in place, MB/s", "measured": disk / 1e6},
    ]
    return Measured(rows)


def describe() -> dict[str, str | int]:
    """What the numbers belong to."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory, GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "patchkit": version("patchkit-llm"),
        **{name: version(name) for name in _PACKAGES},
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """All work in the calling thread, where torch's counters and profilers look."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def matrix_rate(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the best of the shapes that edits are made of, over half a second each."""
    shapes = ((512, 576, 1536), (512, 1536, 576), (1024, 1024, 1024))
    return max(_rate(torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)) for m, k, n in shapes)


def _rate(one: torch.Tensor, other: torch.Tensor) -> float:
    operations = 2 * one.shape[0] * one.shape[1] * other.shape[1]
    one @ other
    done, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + 0.5:
        one @ other
        done += 1
    return operations * done / (time.perf_counter() - begun)


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second to overwrite ``size`` bytes of a file in place and sync them."""
    path, data = folder / "rate", os.urandom(1 << 22)
    with open(path, "wb") as file:
        for _ in range(size // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    begun = time.perf_counter()
    with open(path, "r+b") as file:
        for _ in range(size // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - begun)


def scratch() -> str:
    """Where large files go: TMPDIR, else the system's; a memory file system would measure no disk."""
    return tempfile.gettempdir()


def peak_memory() -> int:
    """Peak resident bytes of this process since it began; `getrusage` would count its parent's too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seconds_of(work: Callable[[], object], times: int = 3) -> float:
    """The median of ``times`` runs."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _processor() -> str:
    if shutil.which("lscpu"):
        for line in os.popen("lscpu"):
            if line.startswith("Model name:"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
