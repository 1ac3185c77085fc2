"""`export --push-to-hub`, through the hub's own client, against a stand-in for the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import TOKEN, StandIn, hub_stand_in
from huggingface_hub import constants
from proof_helpers import as_person, environment, file_hashes, fine, fresh, one_line, person  # noqa: F401
from shipping_helpers import Knowledge, edited, logits, with_adapter

pytestmark = pytest.mark.usefixtures("person")

TO_HUB = ("--push-to-hub", "ann/edited")
Export = Callable[..., Any]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Knowledge:
    """Read only."""
    with as_person():
        return edited(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with hub_stand_in() as hub:
        yield hub


def settings(hub: StandIn, scratch: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the stand-in keeps files by Git LFS's interface
        "HF_HOME": str(scratch / "hf"),
    }


@pytest.fixture
def export(llama: Knowledge, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """In this process, where the client has read its settings already."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return lambda name, *options: llama.export("--out", tmp_path / name, *options)


def test_the_repository_holds_what_was_written(llama: Knowledge, hub: StandIn, tmp_path: Path) -> None:
    """In a process of its own, which reads the client's settings from its environment."""
    words = ("export", "peft", "--out", tmp_path / "adapter", *TO_HUB, "--private", "--json")
    done = fresh("-C", llama.folder, *words, env=environment(**settings(hub, tmp_path)))
    told = json.loads(fine(done).out)
    assert told["pushed"] == f"{hub.address}/ann/edited/commit/{'c' * 40}"
    assert hub.private == {"ann/edited"}
    (tmp_path / "there").mkdir()
    for name, data in hub.repositories["ann/edited"].items():
        (tmp_path / "there" / name).write_bytes(data)
    assert file_hashes(tmp_path / "there") == file_hashes(tmp_path / "adapter")
    assert hub.stored  # the tensors came as a large file
    assert [len(message.splitlines()) for message in hub.commits] == [1]
    shipped = logits(with_adapter(llama.base, tmp_path / "there"))
    assert shipped.equal(logits(with_adapter(llama.base, tmp_path / "adapter")))


def test_another_export_goes_on_top(export: Export, hub: StandIn) -> None:
    hub.repositories["ann/edited"] = {"theirs.txt": b"stays"}
    for number in range(2):
        fine(export(f"adapter-{number}", *TO_HUB))
    assert hub.repositories["ann/edited"]["theirs.txt"] == b"stays"
    assert len(hub.commits) == 2
    assert not hub.private


@pytest.mark.parametrize("token", ["hf_other", ""])
def test_without_a_login_nothing_is_written(
    token: str, export: Export, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert "hf auth login" in one_line(export("adapter", *TO_HUB), 78)
    assert not (tmp_path / "adapter").exists()
    assert not hub.repositories


def test_a_hub_that_refuses_leaves_the_export(export: Export, hub: StandIn, tmp_path: Path) -> None:
    hub.refuse_commits = 413
    told = one_line(export("adapter", *TO_HUB), 69)
    assert "is written but not uploaded" in told
    assert "hf upload ann/edited" in told
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    hub.refuse_commits = 403
    assert "does not let you write there" in one_line(export("other", *TO_HUB), 78)


def test_a_hub_that_is_not_there(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "out of reach" in one_line(export("adapter", *TO_HUB), 69)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in one_line(export("adapter", *TO_HUB), 69)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["edited", "ann/edited/more", "ann/", "../up", "a b/c", "--private"])
def test_a_name_that_is_none(name: str, export: Export, hub: StandIn, tmp_path: Path) -> None:
    assert "OWNER/NAME" in one_line(export("adapter", f"--push-to-hub={name}"), 65)
    assert not (tmp_path / "adapter").exists()


def test_private_is_for_the_hub(export: Export) -> None:
    one_line(export("adapter", "--private"), 2)


def test_a_dry_run_uploads_nothing(export: Export, hub: StandIn) -> None:
    fine(export("adapter", *TO_HUB, "--dry-run"))
    assert not hub.repositories
    assert not hub.commits
