"""What MkDocs does beyond Markdown, so that the same pages read well on a forge and as a site.

Formulae become MathML, which needs no script. The README's limits and the examples are
read from where they lie: on a forge the same links lead to the files themselves. Links that are called
by a file's name are called by its title.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_BESIDE = re.compile(r"\]\(\.\./(?:README\.md#limits|(examples/[\w./-]+))\)")
# The words behind a fence's language are for the tests ("console model").
_FENCE = re.compile(r"^```(\w+) [\w ]+$", re.MULTILINE)
_NAMED = re.compile(r"\[([\w-]+\.md)\](?=\(\1)")
# Long names in tables may be broken behind these, and nowhere else.
_CELL = re.compile(r"(?<=<td>).*?(?=</td>)", re.DOTALL)
_CODE = re.compile(r"(?<=<code>).*?(?=</code>)", re.DOTALL)
_JOINT = re.compile(r"(?<=\w)(::|[_/])(?=\w)")
# What pymdownx.arithmatex leaves of $...$ and $$...$$.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the page of limits and the examples."""
    readme = (_ROOT / "README.md").read_text("utf-8")
    limits = re.search(r"^## Limits\n(.*?)^## ", readme, re.M | re.S)
    assert limits is not None
    text = "# Limits\n" + limits[1].replace("docs/", "")
    files.append(File.generated(config, "limits.md", content=text))
    for path in sorted((_ROOT / "examples").rglob("*")):
        if path.suffix in (".py", ".jsonl"):
            name = path.relative_to(_ROOT).as_posix()
            files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links lead to the site's own copies and say titles; fences name their language only."""
    markdown = _BESIDE.sub(lambda found: f"]({found[1] or 'limits.md'})", markdown)
    return _FENCE.sub(r"```\1", _NAMED.sub(lambda found: f"[{_title(found[1])}]", markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Formulae, inline or on a line of their own; and where a table's code may be broken."""
    return _FORMULA.sub(_mathml, _CELL.sub(lambda cell: _CODE.sub(_jointed, cell[0]), content))


def _title(name: str) -> str:
    return (_ROOT / "docs" / name).read_text("utf-8").split("\n", 1)[0].removeprefix("# ").split(",")[0]


def _jointed(code: re.Match[str]) -> str:
    return _JOINT.sub(r"\1<wbr>", code[0])


def _mathml(found: re.Match[str]) -> str:
    display = "inline" if found[2] == "(" else "block"
    return convert(html.unescape(found[3]), display=display)
