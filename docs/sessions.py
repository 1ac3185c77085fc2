"""Runs the terminal sessions that README.md and the pages of docs/ show.

    python docs/sessions.py README.md docs/tutorial.md

runs each page's ``console`` blocks in order, in one shell and a temporary folder, and puts what the
commands print in place of what the page says they print. ``tests/test_docs.py`` runs the same
blocks and compares. Lines that begin with "$ " are commands, "> " goes on with one. Statistics of
the base are collected once, in the user's cache.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
COLUMNS = "92"
_END = "\x1e"  # separates commands in the shell's output; no command prints it
# A new repository would collect statistics of the base for minutes: $STATISTICS is a folder that has them.
_PREAMBLE = r"""
patchkit() {
    command patchkit "$@" || return
    if [ "$1" = init ] && [ -n "$STATISTICS" ]; then
        mkdir -p "$STATISTICS" && ln -s "$STATISTICS" "$(command patchkit path statistics -C "$3")"
    fi
}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind the fence, its text, where the text stands in the page."""

    info: tuple[str, ...]
    body: str
    start: int
    end: int

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""


@dataclass(frozen=True)
class Step:
    """A command (its lines as shown, joined as a shell reads them) and the lines that it prints."""

    shown: str
    command: str
    output: str


@dataclass(frozen=True)
class Outcome:
    """What a step's command really did."""

    step: Step
    output: str
    status: int


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    return [
        Block(tuple(found["info"].split()), found["body"], found.start("body"), found.end("body"))
        for found in FENCE.finditer(page)
    ]


def steps(body: str) -> list[Step]:
    """The commands of a console block, each with its output."""
    found: list[tuple[list[str], list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(([line], []))
        elif line.startswith("> ") and found and not found[-1][1]:
            found[-1][0].append(line)
        elif found:
            found[-1][1].append(line)
        else:
            raise ValueError(f"a console block begins with output: {line!r}")
    return [
        Step("\n".join(shown), "\n".join(line[2:] for line in shown), "\n".join(output).rstrip("\n"))
        for shown, output in found
    ]


def run(todo: list[Step], folder: Path, environment: Mapping[str, str]) -> Iterator[Outcome]:
    """Run commands in one shell, so that `cd` and variables last; stderr stands among the output."""
    lines = [f"{step.command}\nprintf '\\036%s\\036' $?" for step in todo]
    script = f"exec 2>&1\n{_PREAMBLE}" + "\n".join(lines) + "\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "COLUMNS": COLUMNS, **environment},
        capture_output=True,
        check=False,
    )
    parts = done.stdout.decode("utf-8").split(_END)
    for step, output, status in zip(todo, parts[0::2], parts[1::2], strict=False):
        yield Outcome(step, output.rstrip("\n"), int(status))


def path_with(python: str) -> str:
    """A PATH on which `patchkit` and `python` are those of the interpreter ``python``."""
    return os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])


def statistics_folder() -> Path:
    """Where `patchkit.edit` keeps statistics of a base, for every repository of the user."""
    from patchkit.models.sources import cache_folder

    return cache_folder() / "statistics"


def rewritten(page: str, folder: Path, environment: Mapping[str, str]) -> str:
    """The page with what its commands print now."""
    consoles = [block for block in blocks(page) if block.language == "console"]
    todo = [steps(block.body) for block in consoles]
    found = list(run([step for some in todo for step in some], folder, environment))
    for done in found:
        if done.status:
            raise SystemExit(
                f"status {done.status}, nothing was rewritten: {done.step.command}\n{done.output}"
            )
    outcomes = iter(found)
    for block, some in reversed(
        [(b, [next(outcomes) for _ in s]) for b, s in zip(consoles, todo, strict=True)]
    ):
        texts = [f"{done.step.shown}\n{_cleaned(done.output, folder)}" for done in some]
        page = page[: block.start] + "".join(texts) + page[block.end :]
    return page


def _cleaned(output: str, folder: Path) -> str:
    """Without the temporary folder's and the user's own paths, and without spaces at line ends."""
    for path, shown in ((str(folder), "/home/ada"), (str(Path.home()), "/home/ada")):
        output = output.replace(path, shown)
    lines = [line.rstrip() for line in output.splitlines()]
    return "".join(f"{line}\n" for line in lines)


def main(names: list[str]) -> int:
    """Rewrite the named pages."""
    for name in names:
        path = Path(name).resolve()
        with tempfile.TemporaryDirectory() as folder:
            environment = {
                "PATH": path_with(sys.executable),
                "STATISTICS": str(statistics_folder()),
                **IDENTITY,
            }
            path.write_text(rewritten(path.read_text("utf-8"), Path(folder), environment), "utf-8")
        print(name)
    return 0


IDENTITY = {
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
