"""HTML pages for people: no script, nothing loaded, every text escaped.

Facts, names, messages and what a model says are untrusted. Jinja escapes each value that a template shows,
control and direction characters are replaced, and the page's own policy forbids scripts and loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchkit.errors import NotWritten, WouldOverwrite
from patchkit.fact import UNSEEN
from patchkit.files import write_durably

__all__ = ["check_page", "percent", "render", "write_page"]

_BEGIN = "<!DOCTYPE html>\n<!-- {} -->"  # as page.html.jinja begins


def render(template: str, mark: str, **values: Any) -> str:
    """A page from a template beside this file that extends page.html.jinja; ``mark`` says what wrote it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("patchkit", "actions"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
    )
    return environment.get_template(template).render(mark=mark, **values)


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage; a dash where there was nothing to measure."""
    if share is None:
        return "–"
    told = f"{100 * share:.{digits}g}"
    return f"{100 * share:.0f} %" if "e+" in told else f"{told} %"


def check_page(path: Path, mark: str) -> None:
    """`NotWritten` or `WouldOverwrite` where `write_page` could not write there."""
    if not path.parent.is_dir():
        raise NotWritten(f"{path}: its folder is not there; make it first")
    if path.exists() and not (path.is_file() and _is_page(path, mark)):
        raise WouldOverwrite(f"{path}: is there already and is no page of {mark}; name another file")


def write_page(page: str, path: Path, mark: str) -> None:
    """Write a page with this mark; `WouldOverwrite` where anything else than such a page lies there."""
    check_page(path, mark)
    write_durably(path, page.encode("utf-8", "replace"))


def _is_page(path: Path, mark: str) -> bool:
    begin = _BEGIN.format(mark).encode()
    with path.open("rb") as file:
        return file.read(len(begin)) == begin


def _visible(value: Any) -> Any:
    """Plain text on one line, without what acts on the text around it; what is escaped already stays."""
    if type(value) is not str:
        return value
    return UNSEEN.sub("\ufffd", " ".join(value.split()))
