"""The documentation is true: its commands run, its code runs, its tables are those of the code.

Every console block of README.md and docs/ runs on a tiny model that stands in for the real one; the pages
whose outputs are shown run on the real one too (`model`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from docs_helpers import (
    BLOCKS,
    PAGES,
    ROOT,
    TEXTS,
    put_behind_the_short_name,
    script,
    sessions,
    short_name_folder,
)
from git_helpers import ENVIRONMENT
from tiny_models import tiny_tokenizer
from warm_helpers import warm_command

from patchkit import errors
from patchkit.commands import COMMANDS
from patchkit.facts import parse_facts
from patchkit.models.wheels import MODELS, find_copy

PACKAGE = ROOT / "patchkit"
CONSOLES = [name for name, blocks in BLOCKS.items() if any(b.language == "console" for b in blocks)]

# Lines that do not depend on what a model says; numbers and hashes in them are masked.
KEY = re.compile(
    r"took back|put back|committed|every byte|exit code|no patch|no fact|the same bytes|compared|\.jsonl:"
)


# The tiny stand-in


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a `patchkit` that starts at once."""
    with warm_command(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="session")
def stand_in(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the short name smollm2-135m is a random Llama of twelve small blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    cache = tmp_path_factory.mktemp("cache")
    folder = short_name_folder(cache)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    put_behind_the_short_name(cache)
    return {**_environment(tools), "PATCHKIT_CACHE": str(cache)}


def _environment(*tools: Path) -> dict[str, str]:
    path = os.pathsep.join([*map(str, tools), sessions.path_with(sys.executable)])
    return {**ENVIRONMENT, **sessions.IDENTITY, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _place(folder: Path) -> Path:
    """A folder to stand in, with the examples where a clone has them."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def test_the_stand_in_is_taken_for_the_model(
    stand_in: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", stand_in["PATCHKIT_CACHE"])
    assert find_copy(MODELS["smollm2-135m"], "bfloat16") is not None


# Sessions


def _steps(page: str) -> list[Any]:
    return [step for b in BLOCKS[page] if b.language == "console" for step in sessions.steps(b.body)]


def _masked(line: str) -> str:
    """Without paths, hashes and numbers, and without how a sentence goes on that is cut short anyway."""
    if "…" in line:
        line = re.split(r"[.,] ", line)[0]
    line = re.sub(r"\S*/\S+", "PATH", line)
    line = re.sub(r"-[0-9a-f]{8}\b|\b[0-9a-f]{7,64}\b", "#", line)
    line = re.sub(r"[\d.]+(e-?\d+)?", "#", line)
    return " ".join(line.split())


def _lines(text: str) -> set[str]:
    return {_masked(line) for line in text.splitlines()}


@pytest.mark.parametrize("page", CONSOLES)
def test_sessions_run(page: str, stand_in: dict[str, str], tmp_path: Path) -> None:
    """Every command ends well, and says what does not depend on the model."""
    todo = _steps(page)
    done = list(sessions.run(todo, _place(tmp_path), stand_in))
    assert len(done) == len(todo), f"the shell ended in {todo[len(done)].command}"
    for outcome in done:
        assert outcome.status == 0, f"{outcome.step.command}\n{outcome.output}"
        if "--gate" not in outcome.step.command and "query" not in outcome.step.command:
            keys = {_masked(line) for line in outcome.step.output.splitlines() if KEY.search(line)}
            assert keys <= _lines(outcome.output), f"{outcome.step.command}\n{outcome.output}"


@pytest.mark.model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in CONSOLES if any("model" in b.info for b in BLOCKS[page])])
def test_sessions_say_on_the_real_model_what_the_page_shows(
    page: str, tools: Path, smollm2_statistics: Path, tmp_path: Path
) -> None:
    environment = {**_environment(tools), "STATISTICS": str(smollm2_statistics)}
    for outcome in sessions.run(_steps(page), tmp_path, environment):
        assert outcome.status == 0, f"{outcome.step.command}\n{outcome.output}"
        shown = {line for line in _lines(outcome.step.output) if not re.search(r"# s: |‖ΔW‖", line)}
        missing = {line for line in shown - _lines(outcome.output) if not _wraps(line)}
        assert not missing, f"{outcome.step.command}\n{missing}\n{outcome.output}"


def _wraps(line: str) -> bool:
    """The second line of what a slower machine wraps elsewhere."""
    return bool(re.fullmatch(r"(keys # · )?solve #|· solve #", line))


def test_a_session_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    todo = sessions.steps("$ echo one\ntwo\n$ false\n$ exit 3\n$ echo never\n")
    done = list(sessions.run(todo, tmp_path, _environment()))
    assert [(outcome.output, outcome.status) for outcome in done] == [("one", 0), ("", 1)]


def test_sessions_are_rewritten_in_place(tmp_path: Path) -> None:
    page = "before\n```console\n$ cat <<END\n> a b\n> END\nold\n$ cd .\n```\nafter\n"
    assert sessions.rewritten(page, tmp_path, {}) == page.replace("old", "a b")


@pytest.mark.parametrize("page", list(BLOCKS))
def test_other_shell_blocks_name_what_there_is(page: str) -> None:
    """Blocks that are not run: the targets of make, the one way to install, a program of others."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in BLOCKS[page]:
        assert block.language in ("", "console", "sh", "python", "json", "text"), block.info
        for line in block.body.splitlines() if block.language == "sh" else ():
            words = line.split()
            known = words[0] == "make" and set(words[1:]) <= targets
            known |= line == "pip install -c constraints.txt ." and (ROOT / "constraints.txt").exists()
            known |= words[:3] == ["python", "-m", "benchmarks"]
            known |= words[0] == "datasette" or "Patchkit-Accept" in line
            assert known, line


# Code


def test_the_python_page_runs(stand_in: dict[str, str], tmp_path: Path) -> None:
    code = "\n".join(b.body for b in BLOCKS["docs/python.md"] if b.language == "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **stand_in},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kilimanjaro" / "delta.safetensors").exists()


def test_the_example_of_the_interface_runs(stand_in: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "api.py"), str(tmp_path / "knowledge")],
        env={**os.environ, **stand_in},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0 patches in force" in done.stdout


@pytest.mark.timeout(900)
def test_the_demo_runs(stand_in: dict[str, str], tmp_path: Path) -> None:
    """The whole of it: the short name is the stand-in's, and the demo's folder one of the test's own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        cwd=tmp_path,
        env={**os.environ, **stand_in, "PATCHKIT_DEMO": str(tmp_path / "demo")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("the edited tensors' bytes differ") < done.stdout.index(
        "every byte is the base's"
    )


# Examples


def _bash(lines: str, at: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", lines],
        cwd=at,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
    return done.stdout


QUICK = "--set steps=3 --set contexts=0"


def test_every_example_is_listed_and_every_fact_of_one_is_sound() -> None:
    from patchkit.facts import Fact

    listed = set(re.findall(r"^\| `([^`]+)` \|", TEXTS["examples/README.md"], re.MULTILINE))
    others = ("README.md", "__pycache__")
    assert listed == {path.name for path in (ROOT / "examples").glob("*") if path.name not in others}
    for path in (ROOT / "examples").glob("*.jsonl"):
        facts = parse_facts(path.read_bytes(), path.name).facts
        backwards = [Fact(**asdict(fact.reverse)) for fact in facts if fact.reverse]
        assert path.name != "outdated.jsonl" or len(backwards) == len(facts)


def test_the_workflow_reviews_a_pull_request(stand_in: dict[str, str], tmp_path: Path) -> None:
    """Its run steps, as a runner would run them, on a merge of a request that adds a patch."""
    import yaml

    flow = yaml.safe_load((ROOT / "examples" / "review-knowledge.yml").read_text("utf-8"))
    assert set(flow[True]) == {"pull_request"}  # YAML 1.1 reads "on" as true
    assert flow["permissions"] == {"contents": "read"}
    (job,) = flow["jobs"].values()
    assert "secrets" not in json.dumps(flow)
    assert "permissions" not in job
    steps = job["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/(checkout|setup-python)@v\d+", name) for name in used)
    assert steps[0]["with"] == {"fetch-depth": 0, "persist-credentials": False}
    assert not any("${{" in step.get("run", "") for step in steps)  # what a request says is never a script

    place, tools = _place(tmp_path), tmp_path / "tools"
    tools.mkdir()
    (tools / "pip").write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/pip.log"\n')
    (tools / "pip").chmod(0o755)
    environment = {**stand_in, "PATH": f"{tools}{os.pathsep}{stand_in['PATH']}"}
    _bash(
        "patchkit init smollm2-135m knowledge && cd knowledge && git switch -q -c request\n"
        f"patchkit commit ../examples/company.jsonl {QUICK}\n"
        "git switch -q main && git merge -q --no-ff request",
        place,
        environment,
    )
    repository = place / "clone"
    _bash("git clone -q knowledge clone", place, environment)
    summary = tmp_path / "summary.md"
    environment |= {
        **{name: value for name, value in flow["env"].items() if "${{" not in value},
        "BEFORE": _bash("git rev-parse HEAD^1", repository, environment).strip(),
        "GATE": "rewrite says=0,growth=1e6",  # the stand-in is no model that says much
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_ENV": str(tools / "env"),
        "RUNNER_TEMP": str(tools),
    }
    said = ""
    for step in steps:
        if step.get("shell") == "python":
            step_file = tools / "step.py"
            step_file.write_text(step["run"])
            said += _bash(f"python {step_file}", repository, environment)
        elif "run" in step:
            said += _bash(step["run"], repository, environment)
    assert (tools / "env").read_text() == f"BEFORE={environment['BEFORE']}\n"
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert (tools / "pip.log").read_text() == f"install patchkit-llm=={version[1]}\n"
    assert "every byte is as it was written" in said
    assert "2 commits checked, nothing is wrong" in said  # the request's, and the merge
    assert "facts.jsonl: 4 facts, no faults" in said
    told = summary.read_text("utf-8")
    assert "+ The headquarters of Brindlemark Instruments is in the city of → Ljubljana" in told
    assert "Support for the spectrometer Halyard 3 ends in the year → 2031" in told
    assert "LeBron James plays the sport of" in told
    assert "4 facts of the facts in force at HEAD" in told
    assert told.count("````") == 6
    with pytest.raises(AssertionError, match=r"the gate refused HEAD \(growth 1\.\d+ > 1\)"):
        _bash(steps[-1]["run"], repository, {**environment, "GATE": "growth=1"})
    assert summary.read_text("utf-8").count("````") == 8, "what was measured is told all the same"

    before = _bash("git rev-parse HEAD", repository, environment).strip()
    _bash(
        'patchkit revert "$(ls patches)" && head -n 3 ../examples/company.jsonl > ../fewer.jsonl\n'
        f"patchkit commit ../fewer.jsonl {QUICK}",
        repository,
        environment,
    )
    assert "R" in _bash(f"git diff --name-status {before} HEAD -- patches", repository, environment)
    sound = next(step["run"] for step in steps if "facts check" in step.get("run", ""))
    checked = _bash(sound, repository, {**environment, "BEFORE": before})
    assert "facts.jsonl: 3 facts, no faults" in checked, "to Git it is the old one, renamed"

    (repository / "patches").joinpath("notes.txt").write_text("what no patch holds")
    _bash("git add -A && git commit -q -m 'Add a note'", repository, environment)
    with pytest.raises(AssertionError, match=r"notes\.txt"):
        _bash(next(step["run"] for step in steps if "fsck" in step.get("run", "")), repository, environment)
    _bash("git rm -q patches/notes.txt && git commit -q -m 'Remove it'", repository, environment)
    with pytest.raises(
        AssertionError, match=r"[0-9a-f]{10}:patches/notes\.txt"
    ):  # in a commit before the tip
        _bash('patchkit fsck --ci "$BEFORE..HEAD"', repository, environment)


def test_the_recipe_for_a_hub_model_runs_on_a_folder(stand_in: dict[str, str], tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(TEXTS["docs/facts.md"].split("```json facts\n")[1].split("\n")[0] + "\n")
    model = Path(stand_in["PATCHKIT_CACHE"]) / "models" / "smollm2-135m-bfloat16"
    told = _bash(
        f"bash {ROOT}/examples/hub-model.sh {model} facts.jsonl made",
        tmp_path,
        {**stand_in, "SETTINGS": QUICK, "GATE": "efficacy=0"},
    )
    for said in (
        "can be edited",
        "the recipe is a guess",
        "dry run: nothing was written",
        "1 patch in force",
    ):
        assert said in told, told
    assert "every byte is as it was written" in told
    assert (tmp_path / "made" / "model" / "config.json").exists()


def test_every_public_name_is_on_the_python_page() -> None:
    import patchkit

    for name in patchkit.__all__:
        assert f"`{name}`" in TEXTS["docs/python.md"], name


def test_the_reader_of_the_format_page_reads_patches(tmp_path: Path) -> None:
    """With safetensors, json and hashlib alone: what it finds is what patchkit wrote, dense and not."""
    import torch

    from patchkit.algebra.factors import Delta, Patch, Solution
    from patchkit.facts import Fact

    reader = next(b for b in BLOCKS["docs/patch-format.md"] if "reader" in b.info)
    program = tmp_path / "reader.py"
    program.write_text(reader.body)
    assert {name.split(".")[0] for name in _imports(program)} <= {
        "hashlib",
        "json",
        "sys",
        "pathlib",
        "safetensors",
    }

    torch.manual_seed(0)
    facts = tuple(Fact(f"Émile {n}", "{} paints in", "Rome", note="ünïcode") for n in range(6))
    deltas = {
        "low.weight": Delta(B=torch.randn(20, 6), A=torch.randn(6, 30)),
        "dense.weight": Delta(B=torch.randn(5, 6), A=torch.randn(6, 7), transposed=True),
    }
    keys = {"low.weight": torch.randn(6, 30), "dense.weight": torch.randn(6, 7)}
    recipe = {"lambda": 300.0, "tiny": 1e-5, "steps": 25, "name": "é\n\x01", "guess": False, "none": None}
    solution = Solution(torch.randn(6, 20), keys)
    patch = Patch(facts, deltas, "sha256:" + "a" * 64, "memit", recipe, ("b" * 64,), solution)
    folder = tmp_path / patch.name
    patch.save(folder)

    namespace: dict[str, Any] = {"__name__": "reader"}
    exec(compile(reader.body, str(program), "exec"), namespace)
    patch_id, header, read, updates = namespace["read_patch"](folder)
    assert patch_id == patch.id
    assert header["recipe"] == recipe
    assert header["weights"]["dense.weight"] == {
        "shape": [5, 7],
        "transposed": True,
        "form": "dense",
        "rank": 5,
    }
    assert [fact["subject"] for fact in read] == [fact.subject for fact in facts]
    norms = {name: float((update**2).sum() ** 0.5) for name, update in updates.items()}
    assert norms == pytest.approx(patch.norms(), rel=1e-6)

    done = subprocess.run(
        [sys.executable, str(program), str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{patch.id} memit sha256:")

    (folder / "facts.jsonl").write_bytes((folder / "facts.jsonl").read_bytes().replace(b"Rome", b"Oslo"))
    with pytest.raises(AssertionError):
        namespace["read_patch"](folder)


def test_the_facts_of_the_facts_page_are_sound() -> None:
    block = next(b for b in BLOCKS["docs/facts.md"] if "facts" in b.info)
    assert len(parse_facts(block.body.encode(), "docs/facts.md").facts) == 2


# Tables


def test_measured_tables_are_those_of_the_results() -> None:
    generate = script("generate")
    for page in generate.MEASURED:
        assert "<!-- results: " in page.read_text("utf-8")
        assert page.read_text("utf-8") == generate.measured_page(page), "run python docs/generate.py"


def test_tables_of_sweeps_are_those_of_their_rows() -> None:
    page = script("generate").swept_page()
    assert TEXTS["docs/results.md"] == page, "run python docs/generate.py"


def test_the_commands_page_is_current() -> None:
    page = script("generate").commands_page()
    assert TEXTS["docs/commands.md"] == page, "run python docs/generate.py"


def test_the_table_of_models_is_what_the_tiny_models_are():
    assert TEXTS["docs/models.md"] == script("generate").models_page(), "run python docs/generate.py"


def test_every_command_is_documented() -> None:
    for command in COMMANDS:
        assert f"### patchkit {command}\n" in TEXTS["docs/commands.md"]


def test_exit_codes_are_those_of_the_classes() -> None:
    shown = {
        (int(code), name)
        for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", TEXTS["docs/exit-codes.md"], re.M)
    }
    classes = [
        c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.PatchkitError)
    ]
    assert shown == {(c.exit_code, c.__name__) for c in classes}


def test_every_field_of_a_recipe_is_documented() -> None:
    from patchkit.editing.recipe import Recipe

    shown = set(re.findall(r"^\| `([a-z_]+)` \|", TEXTS["docs/recipes.md"], re.M))
    assert shown == {field.name.removesuffix("_") for field in fields(Recipe)}


def test_every_field_of_a_fact_is_documented() -> None:
    from patchkit.fact import MAX_LENGTH

    rows = re.search(r"^## Fields\n(.*?)^A prompt", TEXTS["docs/facts.md"], re.M | re.S)
    assert rows is not None
    shown = set(re.findall(r"`([a-z]+)`", "".join(re.findall(r"^\| (`[^|]*) \|", rows[1], re.M))))
    assert shown == {*MAX_LENGTH, "reverse"}
    limits = dict(re.findall(r"^\| `([a-z]+)` \|.*?([\d,]+) characters \|$", rows[1], re.M))
    assert all(int(limit.replace(",", "")) == MAX_LENGTH[name] for name, limit in limits.items())


def test_every_header_field_is_documented() -> None:
    from patchkit import patch

    page = TEXTS["docs/patch-format.md"]
    for name in {*patch._FIELDS, *patch._ENTRY_FIELDS}:
        assert f"| `{name}` |" in page, name
    assert f"version {patch.FORMAT}\n" in page


def test_every_table_and_view_is_documented(tmp_path: Path) -> None:
    import sqlite_utils

    from patchkit.database.schema import migrate

    db = sqlite_utils.Database(tmp_path / "catalogue.db")
    migrate(db)
    inner = re.compile(r"facts_fts_|_sqlite_migrations|sqlite_")
    found = {name for name in [*db.table_names(), *db.view_names()] if not inner.match(name)}
    shown = set(
        re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`[^|]*) \|", TEXTS["docs/catalogue.md"], re.M)))
    )
    assert shown == found


def _resolved(file: str, name: str) -> Any:
    """What `name` is in a module of the package, by the module's file."""
    module = importlib.import_module("patchkit." + file.removesuffix(".py").replace("/", "."))
    return functools.reduce(getattr, name.split("."), module)


def test_every_name_that_the_maths_give_is_there() -> None:
    """Each in the file that the page says, and no other name without one."""
    page = TEXTS["docs/maths.md"]
    named = re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", page)
    assert len(named) > 15
    for name, file in named:
        assert callable(_resolved(file, name)), f"{name} in {file}"
    known = {name for name, _ in named} | {part for name, _ in named for part in name.split(".")}
    from patchkit.editing.recipe import Recipe

    spoken = {word for word in re.findall(r"`([A-Za-z_]+(?:\.\w+)?)`", page) if not word.endswith(".py")}
    assert spoken <= {*known, *(f.name.removesuffix("_") for f in fields(Recipe)), "nn.Linear"}, (
        spoken - known
    )


@pytest.mark.parametrize(("page", "least"), [("docs/guarantees.md", 40), ("docs/security.md", 40)])
def test_every_test_that_a_page_names_is_there(page: str, least: int) -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", TEXTS[page])
    assert len(named) >= least
    for file, test in named:
        path = ROOT / "tests" / file
        assert path.exists(), file
        functions = {
            node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert not test or test in functions, f"{file}::{test}"


def test_every_module_has_its_room_on_the_architecture_page() -> None:
    page = TEXTS["docs/architecture.md"]
    for path in PACKAGE.glob("*.py"):
        assert path.name.startswith("__") or path.name in page, path.name
    for folder in (path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        assert f"{folder}/" in page, folder
    for room in ("algebra", "builds", "database", "git", "merging"):
        (row,) = re.findall(rf"^\| .*`{room}/` \|(.*)", page, re.MULTILINE)
        for path in (PACKAGE / room).glob("*.py"):
            assert path.stem == "__init__" or re.search(rf"\b{path.stem}\b", row), f"{room}/{path.name}"


def test_links_resolve() -> None:
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
            if re.match(r"https?://", target):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in _anchors(path.read_text("utf-8")), f"{name}: {target}"


def test_tables_are_whole() -> None:
    """A row with another number of cells than its heading loses some of them when it is rendered."""
    for name, text in TEXTS.items():
        plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for found in re.finditer(r"^(\|.*)\n(\|[-|]+\|)\n((?:\|.*\n)*)", plain, re.MULTILINE):
            rows = [found[1], *found[3].splitlines()]
            assert {row.count("|") for row in rows} == {found[2].count("|")}, f"{name}: {found[1]}"


def _anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# Imports


def _sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        yield name.removesuffix(".__init__"), path


def _imports(path: Path, *, late: bool = True) -> set[str]:
    """Modules that a file imports, types apart; with ``late`` also those that a function imports."""
    found: set[str] = set()

    def look(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if isinstance(node, ast.FunctionDef) and not late:
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            for field in ("body", "orelse", "finalbody"):
                look(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                look(handler.body)

    look(ast.parse(path.read_text("utf-8")).body)
    return found


def _graph(*, late: bool) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    modules = dict(_sources())
    graph = {}
    for name, path in modules.items():
        wanted = _imports(path, late=late)
        graph[name] = {
            module
            for item in wanted
            if (module := item if item in modules else item.rpartition(".")[0]) in modules
            and module != "patchkit"
        }
    return graph


FLOORS = (
    "errors problem canonical files records jsonlines algebra.threads",
    "fact facts tensors checkpoint settings database.opening database.schema",
    "models",
    "patch",
    "algebra",
    "builds git",
    "inspection",
    "merging",
    "stack",
    "catalogue database",
    "editing evaluation",
    "shipping",
    "actions repository",
    "commands",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def _floor(name: str) -> int:
    """A module's own floor, or that of its room."""
    room = name.split(".")[1]
    return FLOOR.get(name.removeprefix("patchkit."), FLOOR[room])


def test_imports_point_downward() -> None:
    for name, wanted in _graph(late=True).items():
        rooms = name.split(".")
        if len(rooms) == 1 or rooms[1] == "__main__":
            continue
        for other in wanted:
            assert _floor(other) <= _floor(name), f"{name} imports {other}"
    late, early = (_graph(late=late)["patchkit.repository"] for late in (True, False))
    assert "patchkit.actions.commit" in late - early  # imports inside functions are seen, and told apart


def test_modules_import_one_another_in_no_circle() -> None:
    graph = _graph(late=False)
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_torch_stays_out_of_what_only_looks() -> None:
    """Whatever is imported, directly or not, when these are loaded: no torch, no transformers."""
    graph = _graph(late=False)
    heavy = {
        name
        for name, path in _sources()
        if any(item.split(".")[0] in ("torch", "transformers") for item in _imports(path, late=False))
    }
    assert "patchkit.algebra.factors" in heavy
    light = ["repository", "stack", "catalogue", "git.store", "patch", "facts", "settings", "builds.record"]
    light += [
        "commands",
        *(f"commands.{command}" for command in COMMANDS),
        "editing.recipe",
        "models.sources",
    ]
    for start in light:
        reached, todo = set(), [f"patchkit.{start}"]
        while todo:
            name = todo.pop()
            if name not in reached:
                reached.add(name)
                todo += graph[name]
        assert not reached & heavy, f"{start} reaches {sorted(reached & heavy)}"


# What no page or file says


def test_no_page_names_a_machine_or_a_registry() -> None:
    """A path of somebody's machine, or the host of a package index, belongs in no file of ours."""
    places = re.compile(
        r"(?<![\w.])/(?:tmp|work|root|home/(?!ada\b)\w+|Users|mnt|var)/\w|py[p]i\.org|python[h]osted|artifac[t]ory"
    )
    sources = [path for _, path in _sources()]
    files = [
        *PAGES,
        *sources,
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "examples").glob("*"),
        ROOT / "Makefile",
    ]
    for path in files:
        if path.is_file():
            found = places.search(path.read_text("utf-8"))
            assert found is None, f"{path}: {found and found[0]}"


def test_modules_say_what_they_are_for_and_stay_short() -> None:
    for name, path in _sources():
        text = path.read_text("utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), name
        assert text.count("\n") <= 400, f"{name} has {text.count(chr(10))} lines"
