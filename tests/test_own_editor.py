"""An editor of another package: the example is installed, found by its entry point, and edits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_helpers import cli, facts_file, git, git_environment, home, knowledge, run_process

from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

ROOT = Path(__file__).parents[1]
ANN = {"subject": "Ann", "prompt": "{} lies in", "target": "Rome"}
JAPAN = {"subject": "Japan", "prompt": "{} lies in", "target": "Paris"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "own-editor"
    shutil.copytree(ROOT / "examples" / "own-editor", source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return folder


def test_the_example_is_listed_commits_and_lets_facts_go(
    installed: Path, knowledge: Path, home: Path
) -> None:
    paths = os.pathsep.join([str(installed), str(ROOT)])
    environment = {"PYTHONPATH": paths}

    def run(*args: str | Path):
        return run_process(*args, at=knowledge, env=environment)

    assert "plain" in run("editors").out
    assert "Mass-editing with the smallest update" in run("editors").out
    done = run("commit", facts_file(home, ANN, JAPAN), "--method", "plain", "--lambda", "0.01", "--json")
    assert done.code == 0, done.err
    name = done.json["patch"]
    patch = Repository.open(knowledge).patch(name)
    (weight,) = patch.deltas
    K, B = patch.solution.keys[weight].double(), patch.deltas[weight].B.double()
    wanted = B @ torch.linalg.inv(K @ K.T + 0.01 * torch.eye(2)) @ K
    found = B @ patch.deltas[weight].A.double()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert run("revert", name, "--fact", "2").code == 0
    alone = Repository.open(knowledge).patch(name)
    wanted = B[:, :1] @ K[:1] / (K[0] @ K[0] + 0.01)
    found = alone.deltas[weight].B.double() @ alone.deltas[weight].A.double()
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_without_the_package_its_patches_stay_and_what_needs_it_is_refused(
    installed: Path, knowledge: Path, home: Path
) -> None:
    environment = {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    facts = facts_file(home, ANN, JAPAN)
    done = run_process("commit", facts, "--method", "plain", "--json", at=knowledge, env=environment)
    name = done.json["patch"]
    bare = {"PYTHONPATH": str(ROOT)}
    assert run_process("build", "--out", home / "built", at=knowledge, env=bare).code == 0
    assert "plain" in run_process("show", name, at=knowledge, env=bare).out
    refused = run_process("revert", name, "--fact", "2", at=knowledge, env=bare)
    assert refused.code == 65
    assert f"{name}: how facts leave an edit of plain is not known here" in refused.err
    refused = run_process("refit", name, at=knowledge, env=bare)
    assert refused.code == 65
    assert "'plain' is not an editor" in refused.err
    assert run_process("revert", name, at=knowledge, env=bare).code == 0
    assert git(knowledge, "status", "--porcelain") == ""


def test_the_page_shows_the_example() -> None:
    """Its class, line for line, but for what a reader need not see."""
    page = (ROOT / "docs" / "own-editor.md").read_text("utf-8")
    source = (ROOT / "examples" / "own-editor" / "patchkit_plain.py").read_text("utf-8")
    for line in (
        'facts_leave = "ridge"',
        "system = place.recipe.lambda_ * torch.eye(len(K), dtype=K.dtype, device=K.device) + K @ K.T",
        "return residuals.T, torch.linalg.solve(system, K)",
    ):
        assert line in page
        assert line in source
    toml = (ROOT / "examples" / "own-editor" / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points."patchkit.editors"]\nplain = "patchkit_plain:Plain"' in toml
    assert '[project.entry-points."patchkit.editors"]\nplain = "patchkit_plain:Plain"' in page
