"""What an installation puts on a machine: the package and nothing beside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_package_alone_and_all_of_it(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"patchkit"}
    inside = {path.relative_to(ROOT) for path in (ROOT / "patchkit").rglob("*") if path.is_file()}
    ours = {path.as_posix() for path in inside if "__pycache__" not in path.parts}
    assert {Path(name).suffix for name in ours} >= {".py", ".jinja", ".typed"}
    assert {name for name in names if name.startswith("patchkit/")} == ours


def test_benchmarks_run_from_a_checkout() -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
