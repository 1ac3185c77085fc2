"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from hypothesis import settings

from patchkit.errors import NotWritten, Unavailable

pytest.register_assert_rewrite(
    "machine_commands", "machine_merge", "machine_model", "machine_plain", "machine_world"
)
settings.register_profile("patchkit", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("patchkit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model on a slow machine is slow, not stuck."""
    for item in items:
        if item.get_closest_marker("model") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M in bfloat16, in the user's cache; fetched if it is not there yet."""
    from patchkit.models.sources import get_model

    try:
        return get_model("smollm2-135m")
    except (NotWritten, Unavailable) as error:
        pytest.skip(f"the real model is missing; run patchkit model get smollm2-135m ({error})")


@pytest.fixture(scope="session")
def smollm2_statistics(smollm2: Path) -> Path:
    """The folder of the user's cache that has its statistics; so long that one process collects them."""
    from patchkit.checkpoint import Checkpoint
    from patchkit.editing.published import recipe_for
    from patchkit.editing.statistics import statistics_for
    from patchkit.models.loading import load_model
    from patchkit.models.sources import cache_folder

    folder = cache_folder() / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        model, tokenizer = load_model(smollm2, "cpu")
        base = Checkpoint.open(smollm2).as_read()
        statistics_for(model, tokenizer, recipe_for(model.config), folder=folder, base=base)
    return folder
