"""The same facts on the same base give the same patch, id, tree and build, wherever and whenever."""

from __future__ import annotations

from pathlib import Path

import pytest
from git_helpers import git
from proof_helpers import FACTS, SMALL_RECIPE, environment, file_hashes, fine, fresh, tiny_base

# A clock that stands ten years on: nothing of a patch may know the time.
LATER = """
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + 315_360_000
time.time_ns = lambda: _time_ns() + 315_360_000 * 10**9
"""


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_whole_commit_twice(tmp_path: Path, kind: str) -> None:
    """Two repositories and processes; hash seed, time zone, `time`'s clock, folder, author and name differ,
    and the locale where the machine has the other."""
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "sitecustomize.py").write_text(LATER)
    plain = environment(PYTHONHASHSEED="0", LC_ALL="C.UTF-8", TZ="UTC")
    other = environment(
        PYTHONHASHSEED="4242",
        LC_ALL="tr_TR.UTF-8",
        LANGUAGE="de",
        TZ="Pacific/Auckland",
        PYTHONPATH=f"{tmp_path / 'later'}:{environment()['PYTHONPATH']}",
        GIT_AUTHOR_NAME="Grace",
        GIT_COMMITTER_EMAIL="grace@example.org",
        COLUMNS="40",
    )
    results = []
    for place, env in ((tmp_path / "one", plain), (tmp_path / "another place" / "ünder", other)):
        place.mkdir(parents=True)
        tiny_base(place / "base", kind)
        (place / "facts.jsonl").write_text(FACTS, encoding="utf-8")
        fine(fresh("init", place / "base", place / "kb", env=env))
        said = fine(
            fresh("commit", "../facts.jsonl", "--json", *SMALL_RECIPE, env=env, cwd=place / "kb")
        ).json
        fine(fresh("-C", place / "kb", "build", "--out", place / "out", env=env))
        results.append(
            {
                "id": said["id"],
                "patch": said["patch"],
                "measured": [fact["after"] for fact in said["facts"]],
                "tree": git(place / "kb", "rev-parse", "HEAD^{tree}"),
                "files": file_hashes(place / "kb" / "patches"),
                "settings": (place / "kb" / "patchkit.toml").read_bytes(),
                "build": file_hashes(place / "out", without=()),
            }
        )
        assert results[-1]["build"]["model.safetensors"] != file_hashes(place / "base")["model.safetensors"]
    assert results[0] == results[1]
    commits = [git(tmp_path / place, "rev-parse", "HEAD") for place in ("one/kb", "another place/ünder/kb")]
    assert commits[0] != commits[1]  # the time and the author are the commit's
