"""The tests' own oracles and helpers, which the benchmarks measure against."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import command_helpers
import exact_helpers
import git_helpers
import reference_memit
import tiny_models

__all__ = ["command_helpers", "exact_helpers", "git_helpers", "reference_memit", "tiny_models"]
