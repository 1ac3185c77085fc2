"""What the tests of the documentation share: its pages, their blocks, and a model behind the short name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from patchkit.canonical import canonical_json, hash_bytes
from patchkit.models.wheels import MODELS

__all__ = [
    "BLOCKS",
    "PAGES",
    "ROOT",
    "SHORT_NAME",
    "TEXTS",
    "put_behind_the_short_name",
    "script",
    "sessions",
    "short_name_folder",
]

ROOT = Path(__file__).resolve().parents[1]
SHORT_NAME = "smollm2-135m"


def script(name: str) -> ModuleType:
    """docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sessions = script("sessions")
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [*PAGES, ROOT / "CHANGELOG.md"]
}
BLOCKS = {name: sessions.blocks(text) for name, text in TEXTS.items()}


def short_name_folder(cache: Path) -> Path:
    """Where the cache has the model of the short name."""
    return cache / "models" / f"{SHORT_NAME}-bfloat16"


def put_behind_the_short_name(cache: Path) -> None:
    """Have the checkpoint in `short_name_folder` taken for the real model, which it is not."""
    folder = short_name_folder(cache)
    model = MODELS[SHORT_NAME]
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hash_bytes(path.read_bytes())}
        for path in folder.iterdir()
    }
    source = {"model": model.name, "dtype": "bfloat16", "wheel": model.sha256}
    record = {**source, "files": files, "fingerprint": hash_bytes(canonical_json(files))}
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(record))
