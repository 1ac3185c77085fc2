"""Fixtures that several test files share."""

from __future__ import annotations

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
