"""What a team meets and one person does not: merges, parts of a history, commands run from elsewhere."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_helpers import Cli, cli, facts_file, git, git_environment, home, knowledge, tiny_base
from safetensors.torch import load_file, save_file

from patchkit.errors import BadInput, NotFound
from patchkit.evaluation.cases import read_cases
from patchkit.facts import read_facts
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

FACTS = [
    {"subject": subject, "prompt": "{} lies in", "target": target}
    for subject, target in (("Rome", "Japan"), ("Ann", "Rome"), ("Dutch", "Rome"))
]


def one_by_one(cli: Cli, home: Path) -> list[str]:
    """Three patches of Alice's, each on the one before."""
    names = []
    for number, fact in enumerate(FACTS):
        path = facts_file(home, fact, name=f"{number}.jsonl")
        names.append(cli.ok("commit", path, "--set", "steps=2", "--json").json["patch"])
    return names


def newest(cli: Cli) -> tuple[list[str], str]:
    stack = [patch["name"] for patch in cli.ok("stack", "--json").json]
    return stack, cli.ok("show", "--json").json["name"]


@pytest.mark.parametrize("how", ["--no-ff", "squash"])
def test_a_merged_stack_has_the_order_and_the_authors_of_its_branch(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    git(knowledge, "switch", "-q", "-c", "side")
    for kind in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{kind}_NAME", "Alice")
    names = one_by_one(cli, home)
    before = newest(cli)
    assert before[0][-3:] == names
    for kind in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{kind}_NAME", "Bob")
    git(knowledge, "switch", "-q", "main")
    if how == "squash":
        git(knowledge, "merge", "-q", "--squash", "side")
        git(knowledge, "commit", "-q", "-m", "Take in what Alice did")
    else:
        cli.ok("merge", "side", "--no-ff")
    assert newest(cli) == before
    assert cli.ok("revert", "-n", "--json").json["removed"] == [names[-1]]
    assert "nothing to commit" in cli.ok("refit", "-n").out
    author = "Bob" if how == "squash" else "Alice"  # a squash is all that Git knows
    assert author in cli.ok("blame", "Dutch lies in").out


def test_in_a_part_of_the_history_only_patches_that_are_named_are_taken_back(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    git(home, "clone", "-q", "--depth", "1", knowledge.as_uri(), "shallow")
    before = git(home / "shallow", "rev-parse", "HEAD")
    for words in ((), ("HEAD",)):
        done = cli("-C", home / "shallow", "revert", *words)
        assert (done.code, len(done.err.splitlines())) == (65, 1)
        assert "git fetch --unshallow" in done.err
    assert git(home / "shallow", "rev-parse", "HEAD") == before
    done = cli.ok("-C", home / "shallow", "revert", "lebron-james", "-n", "--json").json
    assert len(done["removed"]) == 1


def test_what_came_before_a_shallow_clone_is_no_commit_s(cli: Cli, knowledge: Path, home: Path) -> None:
    """Git tells the whole tree as the change of the commit at which such a clone ends."""
    git(home, "clone", "-q", "--depth", "1", knowledge.as_uri(), "shallow")
    here = ("-C", home / "shallow")
    (end,) = cli.ok(*here, "log", "--json").json
    assert (end["cut"], end["added"], end["changed"], end["removed"]) == (True, [], [], [])
    for words in (("log",), ("log", "--graph"), ("log", "--facts")):
        assert "a shallow clone ends here" in cli.ok(*here, *words).out, words
    assert "there may be more" in cli(*here, "log", "--subject", "LeBron James").err
    assert "beyond the end of this shallow clone" in cli.ok(*here, "blame", "LeBron James").out
    assert "beyond the end of this shallow clone" in cli.ok(*here, "show", "lebron-james").out
    assert {row["date"] for row in cli.ok(*here, "stack", "--json").json} == {None}
    git(home / "shallow", "fetch", "-q", "--unshallow")
    for words in (("log", "--json"), ("blame", "LeBron James", "--json")):
        assert cli.ok(*here, *words).json == cli.ok("-C", knowledge, *words).json, words
    assert (
        cli.ok(*here, "show", "lebron-james", "--json").json["commit"]
        == cli.ok("log", "--json").json[1]["id"]
    )


def test_a_dry_run_of_a_build_refuses_the_folders_that_a_build_refuses(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    base = Path(shutil.copytree(tiny_base(), home / "base"))
    patch = next((knowledge / "patches").glob("lebron*"))
    (home / "full").mkdir()
    (home / "full" / "mine.txt").write_text("mine")
    for out in (home / "full", home / "full" / "mine.txt", base / "inside"):
        for command in (("--base", base, patch), ()):
            if not command and out.parent == base:
                continue
            asked = ("build", *command, "--out", out)
            dry, real = cli(*asked, "-n"), cli(*asked)
            assert dry.code == real.code in (65, 73)
            assert dry.err == real.err
    assert sorted(path.name for path in (home / "full").iterdir()) == ["mine.txt"]
    refused = cli("build", "--base", base, patch, "--rev", "HEAD~1", "--out", home / "new")
    assert refused.code == 2
    assert "--rev goes with a repository" in refused.err


def test_a_terminal_of_no_width_shows_tables_all_the_same(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cli.ok("stack").out
    monkeypatch.setenv("COLUMNS", "0")
    assert cli.ok("stack").out == wanted != ""


@pytest.mark.parametrize("revision", ["@{upstream}", "HEAD@{99}", "HEAD^{tree}", "^HEAD", "nope"])
def test_a_revision_that_names_no_commit_is_not_found(cli: Cli, knowledge: Path, revision: str) -> None:
    for command in (("stack", revision), ("ask", "--rev", revision, "Ann"), ("merge", revision)):
        done = cli(*command)
        assert (done.code, len(done.err.splitlines())) == (66, 1), done.err
        assert f"{revision!r} names no commit" in done.err


def test_a_merge_of_a_remote_branch_can_be_undone_and_what_was_pulled_stays(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(home, "clone", "-q", str(knowledge), "mine")
    monkeypatch.chdir(home / "mine")
    cli.ok("base", tiny_base(), "-q")
    git(home / "mine", "reset", "-q", "--hard", "HEAD~1")
    cli.ok("commit", facts_file(home, FACTS[2]), "--set", "steps=1", "-q")
    before = git(home / "mine", "rev-parse", "HEAD")
    cli.ok("merge", "@{upstream}", "-q")
    cli.ok("undo")
    assert git(home / "mine", "rev-parse", "HEAD") == before
    git(home / "mine", "reset", "-q", "--hard", "HEAD~1")
    cli.ok("pull", "-q")  # forward: what would be undone is on the remote
    assert cli("undo").code == 3


def test_the_way_out_that_fsck_tells_runs_in_any_folder(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (delta,) = (knowledge / "patches").glob("microsoft*/delta.safetensors")
    data = delta.read_bytes()
    delta.write_bytes(data[:100])
    monkeypatch.chdir(knowledge / "patches")
    found = [one for one in cli("fsck", "--json").json["problems"] if "put it back" in one["remedy"]]
    remedy = found[0]["remedy"].partition("put it back: ")[2]
    assert cli("fsck").code == 1
    subprocess.run(["sh", "-c", remedy], check=True, cwd=knowledge / "patches")
    assert delta.read_bytes() == data
    cli.ok("fsck")


def test_small_lies(cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.ok("log", "HEAD..HEAD").out.strip() == "no commit fits"
    git(knowledge, "branch", "side")
    both = cli("merge", "side", "--fact", "Ann=theirs", "--fact", "Ann=ours")
    assert both.code == 2
    assert "is given both sides" in both.err
    monkeypatch.setattr(sys, "stdin", None)
    for read in (read_facts, read_cases):
        with pytest.raises(NotFound, match="standard input: is closed"):
            read("-")


def without_keys(folder: Path, name: str) -> None:
    """The keys are gone by one commit, and come back by another; the patch is in force all the time."""
    keys = f"patches/{name}/keys.safetensors"
    git(folder, "rm", "-q", keys)
    git(folder, "commit", "-q", "-m", "Ship less")
    git(folder, "checkout", "-q", "HEAD~1", "--", keys)
    git(folder, "commit", "-q", "-m", "Keep the keys")


def test_a_patch_whose_keys_went_and_came_was_in_force_all_the_time(cli: Cli, knowledge: Path) -> None:
    before = cli.ok("stack", "--json").json
    oldest, newest = (row["name"] for row in before)
    without_keys(knowledge, oldest)
    assert cli.ok("stack", "--json").json == before
    back, gone, *_ = cli.ok("log", "--json").json
    for entry in (back, gone):
        assert (entry["added"], entry["changed"], entry["removed"]) == ([], [oldest], [])
    assert cli.ok("revert", "-n", "--json").json["removed"] == [newest]
    cli.ok("revert", back["id"])
    assert [row["name"] for row in cli.ok("stack", "--json").json] == [oldest, newest]
    assert not (knowledge / "patches" / oldest / "keys.safetensors").exists()


def test_two_trees_that_hold_one_version_with_its_keys_and_without_are_both_believed(
    cli: Cli, knowledge: Path
) -> None:
    name = cli.ok("stack", "--json").json[0]["name"]
    cli.ok("reindex", "-q")
    whole = cli.ok("stack", "--json").json[0]["size"]
    git(knowledge, "rm", "-q", f"patches/{name}/keys.safetensors")
    git(knowledge, "commit", "-q", "-m", "Ship less")
    cli.ok("reindex", "-q")
    cli.ok("commit", "--fact", "Ann | {} lies in | Rome", "--set", "steps=1", "-q")
    assert "catalogue" not in cli("fsck", "--full").err
    assert cli.ok("stack", "HEAD~2", "--json").json[0]["size"] == whole
    assert cli.ok("stack", "--json").json[0]["size"] < whole


def test_a_share_is_shown_the_first_time_too(cli: Cli, knowledge: Path) -> None:
    one, two = (row["name"] for row in cli.ok("stack", "--json").json)
    cli.ok("stack", "squash", one, two, "-q")
    first, second = cli.ok("show", "--json").json, cli.ok("show", "--json").json
    assert first == second
    assert all(weight["share"] > 0 for weight in first["weights"])


def test_a_model_that_broke_down_is_shown(cli: Cli, knowledge: Path) -> None:
    """A probability that is no number is kept as none."""
    repository = Repository.open(knowledge)
    stored = repository.stack().patches[0]
    state = {"rewrite": {"target": math.nan, "says": False, "text": ""}}
    repository.catalogue.record_results(
        stored.id, results=[{"before": state, "after": state}], summary={}, timings={}, environment={}
    )
    (row,) = (line for line in cli.ok("show", stored.name).out.splitlines() if stored.facts[0].target in line)
    assert row.split()[-2:] == ["–", "–"]


def test_a_folder_whose_name_is_no_text_is_remembered(cli: Cli, knowledge: Path, home: Path) -> None:
    place = os.fsdecode(os.fsencode(home) + b"/caf\xe9")
    cli.ok("build", "--out", place, "-q")
    cli.ok("build", "--out", place, "-q")
    cli.ok("status")
    os.rename(knowledge, f"{place} too")
    for command in ("build", "build", "status"):
        cli.ok("-C", f"{place} too", command)


def test_a_folder_of_patches_that_is_no_stack_s_is_not_taken_over(cli: Cli, home: Path) -> None:
    """Such as patch-package's and Debian's: Git would treat them as a stack's."""
    project = home / "project"
    (project / "patches").mkdir(parents=True)
    (project / "patches" / "fix.diff").write_text("--- a\n+++ b\n")
    git(home, "init", "-q", str(project))
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "Fix")
    for dry in ((), ("-n",)):
        done = cli("init", tiny_base(), project, *dry)
        assert (done.code, done.err.count("\n")) == (73, 1)
        assert "is there already, and is no stack's (patches/fix.diff" in done.err
    assert git(project, "status", "--porcelain") == ""
    assert not (project / "patchkit.toml").exists()
    cli.ok("init", tiny_base(), project / "knowledge", "-q")


def test_init_does_not_go_to_a_branch_that_was_not_checked_out_when_it_began(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchkit.actions import init as starting

    project = home / "project"
    git(home, "init", "-q", "-b", "main", str(project))
    git(project, "commit", "-q", "--allow-empty", "-m", "Start")
    resolve = starting.resolve_base

    def slow(*args: object, **options: object) -> object:
        git(project, "switch", "-q", "-c", "other")
        return resolve(*args, **options)

    monkeypatch.setattr(starting, "resolve_base", slow)
    done = cli("init", tiny_base(), project)
    assert (done.code, done.err.count("\n")) == (75, 1)
    assert "git switch back" in done.err
    assert git(project, "log", "--all", "--format=%s") == "Start"


def test_a_branch_with_a_patch_s_name_is_not_what_revert_means(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "branch", "lebron-james", "HEAD~1")
    cli.ok("revert", "lebron-james", "-q")
    head = git(knowledge, "rev-parse", "HEAD")
    done = cli("revert", "lebron-james")
    assert (done.code, git(knowledge, "rev-parse", "HEAD")) == (66, head)
    assert "no such patch is in force" in done.err
    for prompt in ("{} lies in", "{} plays the sport of"):
        cli.ok("commit", "--fact", f"Ann | {prompt} | Rome", "--set", "steps=1", "-q")
    git(knowledge, "branch", "ann")
    head = git(knowledge, "rev-parse", "HEAD")
    done = cli("revert", "ann")
    assert (done.code, git(knowledge, "rev-parse", "HEAD")) == (66, head)
    assert "ann: names 2 patches; say which" in done.err


@pytest.mark.parametrize("wrong", ["delta", "facts"])
def test_what_was_not_sound_before_a_commit_is_not_put_back_by_taking_it_back(
    cli: Cli, knowledge: Path, wrong: str
) -> None:
    name = next(row["name"] for row in cli.ok("stack", "--json").json)
    place = knowledge / "patches" / name
    if wrong == "delta":
        (place / "delta.safetensors").unlink()
    else:
        text = (place / "facts.jsonl").read_text()
        (place / "facts.jsonl").write_text(text.replace("football", "painter"))
    git(knowledge, "commit", "-q", "-am", "By hand")
    if wrong == "delta":
        git(knowledge, "rm", "-q", "-r", f"patches/{name}")
    else:
        git(knowledge, "checkout", "-q", "HEAD~1", "--", f"patches/{name}")
    git(knowledge, "commit", "-q", "-m", "Mend it")
    head = git(knowledge, "rev-parse", "HEAD")
    done = cli("revert", "HEAD")
    assert (done.code, done.err.count("\n")) == (65, 1)
    assert "was not sound before" in done.err
    assert git(knowledge, "rev-parse", "HEAD") == head


@pytest.mark.parametrize("steps", [0, -1])
def test_nothing_is_not_undone(knowledge: Path, steps: int) -> None:
    head = git(knowledge, "rev-parse", "HEAD")
    with pytest.raises(BadInput, match="name one or more"):
        Repository.open(knowledge).undo(steps)
    assert git(knowledge, "rev-parse", "HEAD") == head


def test_settings_with_another_system_s_line_ends_are_no_damage(cli: Cli, knowledge: Path) -> None:
    settings = knowledge / "patchkit.toml"
    settings.write_bytes(settings.read_bytes().replace(b"\n", b"\r\n"))
    git(knowledge, "commit", "-q", "-am", "Edit it elsewhere")
    cli.ok("fsck")
    settings.write_bytes(settings.read_bytes() + b"# more\r\n")
    assert "patchkit.toml: is not the file that is committed" in cli("fsck").err


def test_a_tag_may_have_a_second_name(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "tag", "-a", "v1.0", "-m", "One")
    git(knowledge, "tag", "latest", "v1.0")
    git(knowledge, "update-ref", "refs/remotes/origin/tags/v1.0", "v1.0")
    cli.ok("fsck")
    git(knowledge, "tag", "-d", "v1.0")
    assert "refs/tags/latest: is the tag v1.0" in cli("fsck").err


def test_the_same_facts_again_in_their_own_place_are_no_error(cli: Cli, knowledge: Path, home: Path) -> None:
    facts = facts_file(home, FACTS[0])
    cli.ok("commit", facts, "--set", "steps=2", "-q")
    head = git(knowledge, "rev-parse", "HEAD")
    done = cli.ok("commit", facts, "--set", "steps=2", "--replace")
    assert "the patch in force is this very one: there is nothing to commit" in done.out
    found = cli.ok("commit", facts, "--set", "steps=2", "--replace", "--json").json
    assert (found["unchanged"], found["commit"]) == (True, None)
    assert git(knowledge, "rev-parse", "HEAD") == head
    assert not list((knowledge / ".git" / "patchkit").glob("kept/*"))


def test_what_git_would_store_otherwise_is_said_before_the_edit(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's own repository keeps all safetensors in Git LFS, those of patches too."""
    (knowledge / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    git(knowledge, "add", ".gitattributes")
    git(knowledge, "-c", "filter.lfs.required=false", "commit", "-q", "-m", "As a hub's", ok=False)
    monkeypatch.setattr(Repository, "workbench", lambda *_: pytest.fail("loaded"))
    for words in (("commit", "--fact", "Ann | {} lies in | Rome"), ("refit",)):
        done = cli(*words)
        assert (done.code, done.err.count("\n")) == (78, 1)
        assert "asks for filter=lfs" in done.err


def test_a_sparse_checkout_without_the_patches_is_named(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "sparse-checkout", "set", "docs")
    assert not (knowledge / "patches" / "lebron-james-da1d451a").exists()
    head = git(knowledge, "rev-parse", "HEAD")
    for words in (("commit", "--fact", "Ann | {} lies in | Rome"), ("revert", "lebron-james")):
        done = cli(*words)
        assert (done.code, done.err.count("\n")) == (78, 1)
        assert "git sparse-checkout add patches" in done.err
    cli.ok("fsck")
    assert git(knowledge, "rev-parse", "HEAD") == head
    git(knowledge, "sparse-checkout", "add", "patches")
    cli.ok("revert", "lebron-james", "-q")


def test_init_says_in_which_repository_a_folder_lies(cli: Cli, home: Path) -> None:
    git(home, "init", "-q", str(home / "project"))
    done = cli.ok("init", tiny_base(), home / "project" / "knowledge")
    assert f"git     {home / 'project'}, in which it lies; all commits are made there" in done.out
    assert cli.ok("init", tiny_base(), home / "alone", "--json").json["root"] is None


def test_without_an_identity_no_base_is_fetched(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchkit.actions import init as starting

    monkeypatch.setattr(starting, "resolve_base", lambda *_, **__: pytest.fail("fetched"))
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert cli("init", "smollm2-135m", home / "new").code == 78
    assert not (home / "new").exists()


def test_a_dry_run_of_a_build_of_another_base_s_stack_is_refused_as_the_build_is(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    tuned = Path(shutil.copytree(tiny_base(), home / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in weights.items()},
        tuned / "model.safetensors",
        {"format": "pt"},
    )
    cli.ok("refit", "--base", tuned, "-q")
    for dry in ((), ("-n",)):
        done = cli("build", "--rev", "HEAD~1", "--out", home / "out", *dry)
        assert (done.code, done.err.count("\n")) == (65, 1), dry
        assert "was made for another base" in done.err


def test_a_switch_is_refused_dry_as_it_is_during_a_merge(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "branch", "other", "HEAD~1")
    git(knowledge, "switch", "-q", "-c", "side")
    git(knowledge, "commit", "-q", "--allow-empty", "-m", "Aside")
    git(knowledge, "switch", "-q", "main")
    git(knowledge, "merge", "-q", "--no-ff", "--no-commit", "side", ok=False)
    assert (knowledge / ".git" / "MERGE_HEAD").exists()
    assert cli("switch", "other", "-n").code == 75


def test_facts_are_not_checked_against_a_folder_that_is_not_there(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    facts = facts_file(home, FACTS[0])
    assert cli("facts", "check", "-C", home / "knowlege", facts).code == 66
    cli.ok("facts", "check", "-C", home, facts)


def test_a_page_that_cannot_be_written_is_said_before_anything_is_compared(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Repository, "diff", lambda *_, **__: pytest.fail("compared"))
    assert cli("diff", "--html", home / "no" / "d.html").code == 74
    (home / "mine.html").write_text("mine")
    assert cli("diff", "--html", home / "mine.html").code == 73


def test_a_clone_s_base_is_looked_for_where_its_other_paths_are(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    place = home / "place"
    shutil.copytree(tiny_base(), place / "models" / "tiny")
    shutil.copytree(knowledge, place / "origin")
    found = cli.ok("-C", place, "clone", "origin", "mine", "--base", "models/tiny", "--json").json
    assert found["place"] == str(place / "models" / "tiny")
