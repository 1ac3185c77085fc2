"""Seconds by phase, for the line that says where the time went."""

from __future__ import annotations

import time
from collections.abc import Mapping

__all__ = ["Clock"]


class Clock:
    """Each lap adds what passed since the last one to its phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last lap was ``phase``."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def add(self, timings: Mapping[str, float]) -> None:
        """What passed since the last lap was these phases."""
        for phase, seconds in timings.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self._last = time.perf_counter()
