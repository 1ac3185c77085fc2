"""A comparison of two stacks as one HTML page (`pages` makes it safe to open)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from patchkit.actions import pages
from patchkit.actions.diff import Difference
from patchkit.facts import Fact, altered

__all__ = ["check_page", "difference_page", "write_page"]

_MARK = "patchkit diff"
_BAR, _WIDTH, _HEIGHT = 80, 220, 100


def check_page(path: Path) -> None:
    """`NotWritten` or `WouldOverwrite` where a page could not be written there."""
    pages.check_page(path, _MARK)


def write_page(difference: Difference, path: Path) -> None:
    """Write the page to ``path``; `WouldOverwrite` where something else than such a page lies there."""
    pages.write_page(difference_page(difference), path, _MARK)


def difference_page(difference: Difference) -> str:
    """The page of a difference whose weights were measured."""
    largest = max((weight.norm for weight in difference.weights), default=0.0)
    return pages.render(
        "difference.html.jinja",
        _MARK,
        d=difference,
        facts=_facts(difference),
        bar=lambda norm: _pixels(norm / largest if largest else 0.0),
        share=_pixels,
        percent=lambda share: pages.percent(share, 2),
        angles=_range,
        curve=_curve,
    )


def _facts(difference: Difference) -> list[dict[str, str]]:
    def row(kind: str, prompt: str, before: str, after: str, patch: str) -> dict[str, str]:
        return {"kind": kind, "prompt": prompt, "before": before, "after": after, "patch": patch}

    return [
        *(row("removed", fact.text, fact.target, "", patch) for fact, patch in difference.removed),
        *(row("added", fact.text, "", fact.target, patch) for fact, patch in difference.added),
        *(row("changed", *_changed(a, b), patch) for a, b, patch in difference.changed),
        *(
            row("superseded", *_changed(s.before, s.after), f"{s.old_patch} ⇒ {s.new_patch}")
            for s in difference.superseded
        ),
    ]


def _changed(before: Fact, after: Fact) -> tuple[str, str, str]:
    """What is asked, and what was and is to be said; where these are the same, what else was altered."""
    asked = " ⇒ ".join(dict.fromkeys((before.text, after.text)))
    names = altered(before, after)
    unseen = bool(names) and (before.text, before.target) == (after.text, after.target)
    return asked, before.target, f"{after.target} (altered: {', '.join(names)})" if unseen else after.target


def _pixels(share: float) -> float:
    return round(_BAR * min(max(share, 0.0), 1.0), 1)


def _range(values: Sequence[float]) -> str:
    return "–" if not values else f"{values[0]:.0f}–{values[-1]:.0f}°"


def _curve(values: Sequence[float]) -> str:
    """Points of a polyline, log σ over its place; the smallest value shown is at the foot."""
    if not values:
        return ""
    logs = [math.log(value) for value in values]
    low, high = logs[-1], logs[0]
    step = _WIDTH / max(len(logs) - 1, 1)
    spread = high - low or 1.0
    points = [(i * step, _HEIGHT * (1 - (value - low) / spread)) for i, value in enumerate(logs)]
    if len(points) == 1:
        points = [(0.0, 0.0), (float(_WIDTH), 0.0)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
