"""Answers that are kept: the same scores, no model where nothing is left to ask, and never a wrong file."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_helpers import Cli, cli, git_environment, home, knowledge, tiny_base

from patchkit.actions.asking import Asking
from patchkit.actions.workbench import Workbench
from patchkit.checkpoint import Checkpoint
from patchkit.evaluation import answers as module
from patchkit.evaluation.answers import Answers
from patchkit.evaluation.cases import Case
from patchkit.evaluation.metrics import look
from patchkit.evaluation.voice import Loaded
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a model was loaded."""
    found: list[str] = []
    real = Workbench.open.__func__  # type: ignore[attr-defined]

    def open_(cls: Any, *args: Any) -> Workbench:
        found.append("loaded")
        bench: Workbench = real(cls, *args)
        return bench

    monkeypatch.setattr(Workbench, "open", classmethod(open_))
    return found


def kept(knowledge: Path) -> list[Path]:
    return sorted((knowledge / ".git" / "patchkit" / "answers").iterdir())


def test_what_was_asked_is_not_asked_again(cli: Cli, knowledge: Path, loads: list[str]) -> None:
    there = kept(knowledge)
    assert len(there) == 3, "each commit asked its own stack, and the base"
    first = cli.ok("eval", "--json").json
    assert (len(loads), kept(knowledge)) == (1, there)
    assert cli.ok("eval", "--json").json == first
    assert len(loads) == 1, "nothing was left to ask"
    older = cli.ok("eval", "--compare", "base", "HEAD~1", "--json").json
    assert (len(loads), kept(knowledge)) == (2, there), "a stack of its own, asked for what it was not"
    assert older["scores"]["rewrite tokens"]["a"] is not None


def test_the_scores_are_those_of_a_model_that_was_asked_now(cli: Cli, knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    for _ in range(2):  # asked, then looked up
        found = {score.name: score for score in repository.evaluate(device="cpu").scores}
        for revision, side in (("HEAD~2", "a"), ("HEAD", "b")):
            voice = Loaded(*repository.load(revision, "cpu"))
            cases = [Case(fact) for _, fact in repository.stack().facts_in_force().values()]
            seen = look(voice, cases)
            tokens = sum(one.rewrite.target.hits / one.rewrite.target.tokens for one in seen) / len(seen)
            says = sum(bool(one.rewrite.right) for one in seen) / len(seen)
            assert getattr(found["rewrite tokens"], side).value == tokens
            assert getattr(found["rewrite says"], side).value == says


def test_another_base_config_or_number_of_threads_is_asked_anew(
    cli: Cli, knowledge: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.ok("eval")
    there = kept(knowledge)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    cli.ok("eval")
    assert len(loads) == 2
    assert len(set(kept(knowledge)) - set(there)) == 2
    base = knowledge.parent / "base of its own"
    shutil.copytree(tiny_base(), base)
    cli.ok("base", base)
    for name in ("config.json", "tokenizer_config.json"):
        there, path = kept(knowledge), base / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "added": 1}))
        cli.ok("eval")
        assert len(set(kept(knowledge)) - set(there)) == 2, name


def test_a_graphics_card_has_the_same_answers_by_either_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for it says "cuda", a model that is on it "cuda:0"."""
    monkeypatch.setattr("patchkit.models.loading._present", lambda kind: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "the same kind")
    checkpoint = Checkpoint.open(tiny_base())

    def file(device: str) -> Path | None:
        return Asking(checkpoint, device, tmp_path, lambda *done: None).voice((), {}).answers.path

    assert file("cuda") == file("cuda:0") is not None
    assert len({file(device) for device in ("cpu", "cuda", "cuda:1", "mps")}) == 4


def test_a_damaged_file_is_found_and_written_anew(cli: Cli, knowledge: Path, loads: list[str]) -> None:
    first = cli.ok("eval", "--json").json
    (path,) = (path for path in kept(knowledge) if not module.read_answers(path)["about"]["patches"])
    data = path.read_bytes()
    flipped = data.replace(b'"scores":[[', b'"scores":[ [')
    for number, damage in enumerate((b"", flipped, data[:-9], b"0" * 64 + b"\n{}"), 2):
        path.write_bytes(damage)
        assert cli.ok("eval", "--json").json == first
        assert path.read_bytes() == data
        assert len(loads) == number
    path.write_bytes(flipped)
    done = cli("fsck")
    assert done.code == 1
    assert f"{path}: kept answers of an evaluation: is not as it was written" in done.err + done.out
    assert "asks the model again" in cli("fsck", "--repair").out
    assert not path.exists()
    path.mkdir()
    found = cli.ok("eval", "--json").json
    assert found["scores"] == first["scores"]
    assert "not kept" in found["notes"][0]


def test_answers_of_patches_that_are_gone_are_collected(cli: Cli, knowledge: Path) -> None:
    cli.ok("eval")
    folder = Path(cli.ok("path", "answers").out.strip())
    there = sorted(folder.iterdir())
    about = module.read_answers(there[0])["about"]
    lost = Answers(folder, {**about, "patches": ["0" * 64]})
    lost.scores["a", "b"] = (-1.0, 1, 0, 3)
    lost.keep()
    assert lost.path is not None
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    removed = cli.ok("gc", "--json").json["removed"]
    assert [(each["kind"], each["path"]) for each in removed] == [("answers", str(lost.path))]
    assert sorted(folder.iterdir()) == there


def test_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    found = Answers(tmp_path, {"model": "a"})
    found.scores["é", "\u2028"] = (-0.1 - 0.2, 3, 2, 7)
    found.scores["collapsed", "x"] = (float("nan"), 1, 0, 0)
    found.texts["é", 12] = "said\n\ufffd"
    found.keep()
    again = Answers(tmp_path, {"model": "a"})
    assert again.scores["é", "\u2028"] == (-0.1 - 0.2, 3, 2, 7)
    assert again.scores["collapsed", "x"][0] != again.scores["collapsed", "x"][0]
    assert again.texts == found.texts
    assert Answers(tmp_path, {"model": "b"}).scores == {}
    assert Answers(None, {"model": "a"}).texts == {}


def test_the_folder_is_bounded_and_what_was_used_lately_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str, size: int) -> None:
        found = Answers(tmp_path, {"model": name})
        found.texts[name, 1] = "x" * size
        found.keep()
        assert found.path is not None
        os.utime(found.path, ns=(int(name), int(name)))

    monkeypatch.setattr(module, "LIMIT", 2600)
    for name in ("1", "2", "3"):
        put(name, 600)
    assert Answers(tmp_path, {"model": "1"}).texts, "read now, so used now"
    put("4", 600)
    held = {name for name in "1234" if Answers(tmp_path, {"model": name}).texts}
    assert held == {"1", "3", "4"}
    put_large = Answers(tmp_path, {"model": "5"})
    put_large.texts["x", 1] = "x" * 4000
    put_large.keep()
    assert put_large.path is not None
    assert not put_large.path.exists(), "larger than the folder may be"


def _add(folder: str, start: int) -> None:
    for number in range(start, start + 40):
        found = Answers(Path(folder), {"model": "a"})
        found.scores[str(number), "x"] = (-1.0 * number, 1, 0, 0)
        found.keep()


def test_two_processes_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(str(tmp_path), start)) for start in (0, 1000)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    (path,) = tmp_path.iterdir()
    rows = module.read_answers(path)["scores"]
    assert len(rows) >= 40
    assert all(float.fromhex(row[2]) == -float(row[0]) for row in rows)


def test_a_folder_that_cannot_be_written_is_told_and_stops_nothing(cli: Cli, knowledge: Path) -> None:
    folder = knowledge / ".git" / "patchkit" / "answers"
    shutil.rmtree(folder)
    folder.write_text("in the way")
    found = cli.ok("eval", "--json").json
    assert found["scores"]
    assert any("not kept for another time" in note for note in found["notes"])
