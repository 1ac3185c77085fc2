"""Writes docs/commands.md from the commands' own help, and the tables in other pages from what they tell of:
the models that the tests make, what the benchmarks measured (benchmarks/results.json), and the tables that
`patchkit eval sweep` wrote (docs/results/).

    python docs/generate.py

``tests/test_docs.py`` fails while a page is not what this writes.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import click

from patchkit.commands import SECTIONS, cli
from patchkit.evaluation.tables import markdown_table
from patchkit.models.anatomy import anatomy_of
from patchkit.models.trial import try_out

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.report import load, markdown

PAGE = Path(__file__).with_name("commands.md")
MODELS = Path(__file__).with_name("models.md")
_BEGIN, _END = "<!-- models: written by python docs/generate.py -->", "<!-- end of models -->"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results.json"
_RESULTS = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
MEASURED = [
    page for page in sorted(Path(__file__).parent.glob("*.md")) if _RESULTS.search(page.read_text("utf-8"))
]
SWEPT = Path(__file__).with_name("results.md")
_SWEEP = re.compile(r"(<!-- sweep: ([\w-]+) -->\n).*?(<!-- end of sweep -->)", re.DOTALL)
_INTERVAL = re.compile(r" \(\S+ to \S+\)")
WIDTH = 88
_HEAD = """# Commands

Written by `python docs/generate.py` from each command's `--help`. Branches, tags, pushes and the like
are Git's own: `patchkit branch -d x` answers with the command to type. `-C DIR` stands before or after a
command's name; unlike Git's, it says where the repository is and nothing else: other files that you name
are those of the folder in which you are. What reads takes `--json`, but for `report`, which writes a page,
and `path`, a line; what changes takes `--dry-run`, but for what can be written again at any time
(`fsck --repair`, `reindex`, `card`, `sign`, `model get`, `eval`); what changes or checks takes
`--quiet`. Progress is shown at a terminal only, on standard error. `NO_COLOR` turns colours off. Exit codes
are in [exit-codes.md](exit-codes.md).

Completion in bash: `eval "$(_PATCHKIT_COMPLETE=bash_source patchkit)"`; likewise `zsh_source`, `fish_source`.

## patchkit
"""


def commands_page() -> str:
    """The page, as it should be."""
    parts = [_HEAD, _help(cli, "patchkit", None)]
    root = click.Context(cli, info_name="patchkit", **cli.context_settings)
    for title, names in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        for name in names:
            command = cli.get_command(root, name)
            assert command is not None
            parts += _documented(command, name, root)
    return "".join(parts)


def _documented(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    yield f"\n### patchkit {' '.join([*_names(parent), name])}\n{_help(command, name, parent)}"
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=parent)
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _documented(found, below, context)


def _names(context: click.Context | None) -> list[str]:
    """The names below `patchkit` on the way to a context."""
    if context is None or context.parent is None:
        return []
    return [*_names(context.parent), str(context.info_name)]


def _help(command: click.Command, name: str, parent: click.Context | None) -> str:
    settings = {**command.context_settings, "max_content_width": WIDTH, "terminal_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"\n```text\n{text}\n```\n"


def models_page() -> str:
    """docs/models.md with its table made anew from the tests' tiny models."""
    head, _, rest = MODELS.read_text("utf-8").partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    return f"{head}{_BEGIN}\n{_models_table()}{_END}{tail}"


def _models_table() -> str:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny_models

    lines = ["| model type | class | edited weight | module | what it writes is |", "|---|---|---|---|---|"]
    for kind in sorted(tiny_models.CONFIGS):
        with warnings.catch_warnings(action="ignore"):
            model = tiny_models.tiny_model(kind)
        anatomy = anatomy_of(model)
        outlet = try_out(model, anatomy, (1,), range(5, 13))[1]
        module = type(anatomy.downs[1]).__name__
        weight = anatomy.weights[1].replace(".1.", ".*.")
        lines.append(
            f"| {model.config.model_type} | {type(model).__name__} | `{weight}` | {module} | {outlet} |"
        )
    return "\n".join(dict.fromkeys(lines)) + "\n"


def measured_page(page: Path) -> str:
    """A page with the tables of its sections made anew from the results that the benchmarks wrote."""
    sections = load(RESULTS)["sections"]
    return _RESULTS.sub(
        lambda found: found[1] + markdown(found[2], sections[found[2]]) + found[3], page.read_text("utf-8")
    )


def swept_page() -> str:
    """docs/results.md with the tables of its sweeps made anew from their rows."""
    return _SWEEP.sub(lambda found: found[1] + _swept(found[2]) + found[3], SWEPT.read_text("utf-8"))


def _swept(name: str) -> str:
    """The table as the sweep wrote it; of the intervals, which are all in its JSON, those of the whole and of
    perplexity."""
    rows = json.loads((SWEPT.parent / "results" / f"{name}.json").read_text("utf-8"))
    head, *lines = markdown_table(rows).decode().splitlines()
    shown = {"S", "score", "perplexity, times"}
    kept = {place for place, name in enumerate(head.split(" | ")) if name in shown}
    return "".join(f"{line}\n" for line in [head, *(_plain(line, kept) for line in lines)])


def _plain(line: str, kept: Collection[int]) -> str:
    cells = line.split(" | ")
    return " | ".join(cell if place in kept else _INTERVAL.sub("", cell) for place, cell in enumerate(cells))


if __name__ == "__main__":
    for page in MEASURED:
        page.write_text(measured_page(page), "utf-8")
    SWEPT.write_text(swept_page(), "utf-8")
    PAGE.write_text(commands_page(), "utf-8")
    MODELS.write_text(models_page(), "utf-8")
    sys.exit(0)
