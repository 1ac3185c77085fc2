"""Every line with a `patchkit` command in the pages and in the commands' help is a line that patchkit takes.

All of them are parsed by the commands themselves. `console` blocks run in test_docs.py; of the other blocks,
and of the examples in the help, each line runs here on a tiny model, but for those that NOT_RUN tells why.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from command_helpers import (
    RECIPE,
    WORLD,
    Cli,
    cli,
    git,
    git_environment,
    set_recipe,
    tiny_base,
)
from docs_helpers import BLOCKS, ROOT, TEXTS, put_behind_the_short_name, sessions, short_name_folder
from git_helpers import ENVIRONMENT
from safetensors.torch import load_file, save_file

from patchkit.commands import COMMANDS, VERBS, main
from patchkit.commands import cli as patchkit
from patchkit.repository import Repository

__all__ = ["cli", "git_environment"]

CALL = re.compile(r"(?:^|[;|&]\s*)(?:\w+=\S*\s+)*patchkit\s")
LEFT_OUT = re.compile(r"'[A-Z]+' is not|requires (an|2) argument|^Missing ")


# What the pages say


def calls(line: str) -> Iterator[list[str]]:
    """The words behind `patchkit` of each call of it in a line of a shell."""
    for inner in re.findall(r"\$\((patchkit [^()]*)\)", line):
        yield from calls(inner)
    line = re.sub(r"\$\([^()]*\)", "X", line)
    if not CALL.search(line.strip()):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.commenters = ""
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set(";|&"):
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words[:1] == ["patchkit"]:
                yield words[1:]
            words = []
        elif set(word) <= set("<>"):
            words.append(word)
        elif words and set(words[-1]) <= set("<>"):
            words.pop()  # the file that a redirection names
        else:
            words.append(word)


def lines_of(page: str) -> list[str]:
    """Lines of the blocks of a page that call patchkit, whatever language the block says; outputs apart."""
    found = []
    for block in BLOCKS[page]:
        if block.language == "console":
            found += [line for step in sessions.steps(block.body) for line in step.command.splitlines()]
        elif block.language != "python":
            found += [line.strip() for line in block.body.splitlines()]
    return [line for line in found if any(True for _ in calls(line))]


def inline(page: str) -> list[list[str]]:
    """Commands between single backticks: with `patchkit`, or a command's name with an option behind it."""
    plain = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    found = []
    for span in re.findall(r"`([^`]+)`", plain):
        text = " ".join(span.replace("…", "").replace("[", "").replace("]", "").split())
        first = text.partition(" ")[0]
        if first == "patchkit" and text != first:
            found.append(shlex.split(text)[1:])
        elif first in COMMANDS and " -" in text:
            found.append(shlex.split(text))
    return found


# Parsed by the commands


def parse(
    words: Sequence[str], command: click.Command = patchkit, name: str = "patchkit", above=None
) -> None:
    """Raise what the command line would of words that it does not take; run nothing."""
    with command.make_context(name, list(words), parent=above) as context:
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if isinstance(command, click.Group) and rest:
            below, found, rest = command.resolve_command(context, rest)
            assert found is not None
            parse(rest, found, below or "", context)


@pytest.mark.parametrize("page", [page for page in TEXTS if lines_of(page)])
def test_every_line_of_a_block_is_parsed(page: str) -> None:
    for line in lines_of(page):
        for words in calls(line):
            assert not VERBS & set(words[:1]), f"{line}: that is a command of Git"
            try:
                parse(words)
            except click.ClickException as error:
                pytest.fail(f"{page}: {line}: {error.format_message()}")


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md" and inline(page)])
def test_every_command_in_a_sentence_is_parsed(page: str) -> None:
    """There what an option wants may be left out, and capitals may stand for a number or a choice."""
    for words in inline(page):
        try:
            parse(words)
        except click.ClickException as error:
            said = error.format_message()
            assert LEFT_OUT.search(said), f"{page}: {' '.join(words)}: {said}"


@pytest.mark.parametrize(
    "line",
    [
        "patchkit lok",
        "patchkit log --max-cont 3",
        "patchkit log -n three",
        "patchkit eval sweep nothing",
        "patchkit export peft --out a --for llama",
        "patchkit init a b c",
        "patchkit stack squash --sort id",
        'cmp a "$(patchkit path nowhere)"',
        "cd a && patchkit log --nope | head -3 > b; true",
        "A=1 patchkit log --nope",
    ],
)
def test_a_line_that_is_wrong_is_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        [parse(words) for words in calls(line)]


def test_the_calls_of_a_line() -> None:
    assert list(
        calls("""patchkit sql "select a > 'b;c'" --json > out; patchkit log | awk '{print $2}'""")
    ) == [
        ["sql", "select a > 'b;c'", "--json"],
        ["log"],
    ]
    assert list(calls('datasette "$(patchkit path catalogue)" --metadata x')) == [["path", "catalogue"]]
    assert list(calls("the patchkit that we know")) == []


# Run by the commands

EXAMPLES = sorted(
    {
        line
        for page, blocks in BLOCKS.items()
        for block in blocks
        if block.language == "text"
        for line in map(str.strip, block.body.splitlines())
        if re.match(r"patchkit \w", line)
    }
)
# What does not run here, by what is in its line, and why.
NOT_RUN = {
    r"https://|--push-to-hub|--dtype float32": "asks the network",
    r"--records (counterfact|zsre) |tune counterfact ": "asks the network for records: test_datasets.py",
    r"mend train|--method mend": "trains for minutes: test_mend_commands.py",
    r"patchkit tune ": "tries for minutes: test_tune.py",
    r"old-gpt2": "wants weights as pickles: test_pickles.py",
    r"--fact .*=theirs|merge --continue": "wants a merge that stopped: test_merging.py and docs/merging.md",
    r"patchkit bisect": "wants commits that answer otherwise, as few edits here do: test_look_bisect.py",
    r"sign adapter|verify adapter": "wants keys: test_signing.py and docs/shipping.md",
    r"lebron-james --fact 2": "wants a patch of two facts: README.md",
}
# What an example finds when it begins.
BEFORE = {
    r"commit --fact": "patchkit revert lebron-james",
    r"apply \.\./": "patchkit revert lebron-james",
    r"import peft \.\.": "patchkit revert lebron-james",
    r"import peft adapter": "patchkit export peft lebron-james --out adapter",
    r"patchkit undo": "git remote remove origin",
    r"switch -$": "git switch -q try-out",
    r"--methods .*mend": "patchkit mend train counterfact.json --steps 2 --edits 2 --rank 2",
}
# What stands for another word: the tiny model knows few of them, and there are sixteen records.
FOR = {
    "basketball": "football",
    "was founded by": "lies in",
    "--sample 100": "--sample 5",
    "--sample 200": "--sample 5",
    "--sample 300": "--sample 5",
    "--counts 1,10,100": "--counts 1,3",
    "--counts 1,3,10,30,100,300 ": "--counts 1,2 ",
    "--counts 1000 ": "--counts 3 ",
    "--counts 500 ": "--counts 3 ",
    "--counts 100 ": "--counts 3 ",
    "--counts 30 ": "--counts 2 ",
    "--counts 10,30,60 ": "--counts 2 ",
    "memit,memit-published,alphaedit,ultraedit,ft": "memit,memit-published",
    "memit,alphaedit,ultraedit": "memit",
    "counterfact-r.jsonl": "knowledge/counterfact.json",
    "--records zsre.jsonl": "--records knowledge/zsre.jsonl",
}
# Exit codes of what is refused on such a model, as the page of exit codes has them.
ENDS = {"--gate": {0, 3}, "patchkit verify": {1}}
FACTS = {
    "LeBron James | {} plays the sport of | football": "lebron-james",
    "Microsoft | {} lies in | Rome": "microsoft",
    "Rome | {} lies in | Japan": "rome",
}
TEXT = "LeBron James plays the sport of painter. Rome lies in France. Microsoft lies in Paris. " * 40


def _fact(subject: str, prompt: str, target: str) -> dict[str, Any]:
    return {"subject": subject, "prompt": prompt, "target": target}


def _zsre(subject: str, prompt: str, said: str) -> dict[str, Any]:
    question = prompt.replace("{}", subject)
    return {
        "subject": subject,
        "src": question,
        "rephrase": f"So {question}",
        "alt": "Microsoft",
        "answers": [said],
        "loc": "Paris lies in",
        "loc_ans": "France",
    }


def _counterfact(case: int, subject: str, prompt: str, said: str) -> dict[str, Any]:
    targets = {"target_new": {"str": "Microsoft"}, "target_true": {"str": said}}
    relation = "P641" if "sport" in prompt else "P131"
    rewrite = {"subject": subject, "prompt": prompt, "relation_id": relation, **targets}
    others = {"neighborhood_prompts": ["Japan lies in"], "generation_prompts": [f"{subject} is"]}
    rephrased = [f"So {prompt.format(subject)}"]
    return {"case_id": case, "requested_rewrite": rewrite, "paraphrase_prompts": rephrased, **others}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository and whatever else the examples name; never to be written."""
    ground = tmp_path_factory.mktemp("ground")
    cache = ground / "cache"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**ENVIRONMENT, "PATCHKIT_CACHE": str(cache)}.items():
            patched.setenv(name, value)
        shutil.copytree(tiny_base(), short_name_folder(cache))
        put_behind_the_short_name(cache)
        _make_repository(ground / "home" / "knowledge")
        _put_files(ground / "home" / "knowledge")
    return ground


def _make_repository(folder: Path) -> None:
    """Three facts at v1, one of them taken back and two others added at v2, branches, a remote."""
    Repository.init("smollm2-135m", folder)
    set_recipe(folder, RECIPE)
    repository = Repository.open(folder)
    for line in FACTS:
        repository.commit([_fact(*line.split(" | "))])
    for tag in ("v1", "v1.0"):
        git(folder, "tag", tag)
    for branch in ("hospital-facts", "try-out"):
        git(folder, "branch", branch)
    repository.revert("rome")
    for line in ("Ann | {} lies in | Japan", "Japan | {} plays the sport of | football"):
        repository.commit([_fact(*line.split(" | "))])
    git(folder, "tag", "v2")
    git(folder, "clone", "-q", "--bare", ".", "../origin.git")
    git(folder, "remote", "add", "origin", "../origin.git")
    git(folder, "fetch", "-q")
    git(folder, "branch", "-q", "--set-upstream-to=origin/main")


def _put_files(folder: Path) -> None:
    """Facts, records, texts, a patch and a base from elsewhere, a key."""
    rows = [(subject, prompt, said) for (subject, prompt), said in WORLD.items()]
    known = [_fact(*row) for row in rows]
    some = [_fact("Dutch", "{} lies in", "Rome"), _fact("Paris", "{} lies in", "Japan")]
    lines = {
        "facts.jsonl": [{**fact, "neighbors": ["Émile Zola lies in"]} for fact in some],
        "known.jsonl": known,
        "zsre.jsonl": [_zsre(*row) for row in rows],
    }
    for name, rows_of in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    records = [_counterfact(case, *row) for case, row in enumerate(rows)]
    (folder / "counterfact.json").write_text(json.dumps(records))
    for name in ("held-out.txt", "handbook.txt"):
        (folder / name).write_text(TEXT)
    (folder / "prompts.txt").write_text("Ann lies in\nRome lies in\n")
    patches = folder.parent / "colleague" / "patches"
    shutil.copytree(folder / "patches", patches)
    for name in ("adapter", "lora"):
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            assert main(["export", "peft", "lebron-james", "--out", f"../{name}", "-q"]) == 0
    shutil.copytree(tiny_base(), folder / "checkpoint")
    shutil.copytree(tiny_base(), folder / "my-model-v2")
    weights = folder / "my-model-v2" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder.parent / "release-keys.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1yJ8n4Zl1Y3wqEo0P0mY3bqTz0b5p2b0QJ8w6mJ3aA ann\n"
    )


@pytest.fixture
def place(
    ground: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, git_environment: None
) -> Path:
    """A copy of the repository's folder and what lies beside it."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("PATCHKIT_CACHE", str(ground / "cache"))
    shutil.copytree(ground / "home", tmp_path / "home")
    (tmp_path / "home" / "elsewhere").mkdir()
    folder = tmp_path / "home" / "knowledge"
    git(folder, "update-index", "-q", "--refresh", ok=False)
    return folder


def _why_not(line: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), None)


@pytest.mark.parametrize("line", [line for line in EXAMPLES if not _why_not(line)])
def test_an_example_runs(line: str, place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (patch,) = (path.name for path in place.glob("patches/lebron-james-*"))
    words = FOR | {"/models/smollm2-135m": str(tiny_base()), "lebron-james-3f9a1c2e": patch}
    monkeypatch.chdir(place)
    for pattern, command in BEFORE.items():
        if re.search(pattern, line):
            program, *rest = command.split()
            assert cli(*rest).code == 0 if program == "patchkit" else git(place, *rest) is not None
    if "-C knowledge" in line:
        monkeypatch.chdir(place.parent)
    elif re.search(r"patchkit (init|clone) ", line):
        monkeypatch.chdir(place.parent / "elsewhere")
    (call,) = calls(functools.reduce(lambda text, word: text.replace(word, words[word]), words, line))
    done = cli(*call)
    assert done.code in next((codes for part, codes in ENDS.items() if part in line), {0}), done.err


def test_what_does_not_run_is_there_and_why_is_true() -> None:
    for pattern, why in NOT_RUN.items():
        assert any(re.search(pattern, line) for line in EXAMPLES), pattern
        for name in re.findall(r"\S+\.(?:py|md)\b", why):
            assert (ROOT / ("tests" if name.endswith("py") else "") / name).exists(), name
