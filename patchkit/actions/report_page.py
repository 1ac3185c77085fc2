"""A report as one HTML page for people without a terminal (`pages` makes it safe to open)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from patchkit.actions import pages
from patchkit.actions.log import Entry, drawn
from patchkit.actions.report import DRAWN, LOADED, Measured, Report

__all__ = ["report_page", "write_page"]

_MARK = "patchkit report"
_BAR = 80  # pixels of a probability of 1, and of the largest norm
_SAID = 60  # characters of what the model says


@dataclass(frozen=True)
class _Line:
    """A line beside the graph: coloured as its `kind` the label, plain the text."""

    kind: str
    label: str
    text: str


def write_page(report: Report, path: Path) -> None:
    """Write the page to ``path``; `WouldOverwrite` where something else than a report lies there."""
    pages.write_page(report_page(report), path, _MARK)


def report_page(report: Report) -> str:
    """The page of a report."""
    settings = report.settings
    recipe = dict(settings.recipe) if settings else {}
    recipe |= {f"many.{name}": value for name, value in settings.many.items()} if settings else {}
    return pages.render(
        "report.html.jinja",
        _MARK,
        r=report,
        recipe=[(name, _spelled(value)) for name, value in recipe.items()],
        drawing=[(_kept(edge), line) for edge, line in drawn(report.history, lambda entry, _: _told(entry))],
        facts=[_fact(measured) for measured in report.facts],
        largest=max((item.weight.norm for item in report.weights), default=0.0) or 1.0,
        loaded=LOADED,
        pixels=lambda share: round(_BAR * min(max(share, 0.0), 1.0), 1),
        percent=pages.percent,
        cell=_cell,
        colour=_colour,
    )


def _kept(edge: str) -> Markup:
    """Edges of Git's graph, whose spaces stay; they hold nothing that anyone wrote."""
    return Markup(escape(edge))


def _spelled(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _told(entry: Entry) -> list[_Line]:
    commit = entry.commit
    lines = [
        _Line("changed", commit.id[:10], f"{commit.date:%Y-%m-%d}, {commit.author}"),
        _Line("", "", commit.subject),
    ]
    if commit.cut:
        lines.append(_Line("quiet", "a shallow clone ends here: what this changed is not known", ""))
    for kind, sign, names in (
        ("added", "+", commit.added),
        ("changed", "~", commit.changed),
        ("removed", "−", commit.removed),
    ):
        lines += [_Line(kind, f"{sign} {name}", "") for name in names]
    if len(lines) > DRAWN:
        more = len(lines) - DRAWN + 1
        lines = [*lines[: DRAWN - 1], _Line("quiet", f"… and {more} more patches", "")]
    return lines


def _fact(measured: Measured) -> dict[str, Any]:
    result = measured.result or {}
    before, after = _rewrite(result.get("before")), _rewrite(result.get("after"))
    said = " ".join(str(after.get("text") or "").split())
    return {
        "text": measured.fact.text,
        "target": measured.fact.target,
        "patch": measured.patch,
        "line": measured.line,
        "before": before.get("target"),
        "after": after.get("target"),
        "says": after.get("says"),
        "said": said if len(said) <= _SAID else said[: _SAID - 1] + "…",
    }


def _rewrite(state: Any) -> Mapping[str, Any]:
    """The fact's own prompt on one model (`evaluation.PromptState`)."""
    return (state or {}).get("rewrite") or {}


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if math.isfinite(value) else "∞"


def _colour(value: float) -> str:
    """Stronger with the square root, so that a hundredth can be told from nothing; full from 1."""
    return f"background:rgba(214,69,31,{0.65 * math.sqrt(min(max(value, 0.0), 1.0)):.2f})"
