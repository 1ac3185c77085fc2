"""Figures for people: PNG or SVG, by matplotlib, which the extra ``figures`` brings.

Text in a figure comes from facts and is untrusted: it is never read as mathematics, and is one line. A figure
says what wrote it, so that it may be written again and nothing else is written over.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, NotWritten, Unavailable, WouldOverwrite
from patchkit.files import write_durably
from patchkit.problem import one_line

__all__ = ["HeatMap", "check_figure", "draw_heat_maps", "figure_class", "write_figure"]

_MARK = "patchkit"
_HEAD = 4096  # bytes of a file in which the mark stands
_FORMATS = (".png", ".svg")
_DOTS = 150  # an inch
_LONGEST = 30  # characters of a row's label


@dataclass(frozen=True)
class HeatMap:
    """``values`` [rows, columns] by layer; NaN is left white. ``colours``: a colour map of matplotlib's, from
    0 (and below) to the highest."""

    title: str
    axis: str
    values: Sequence[Sequence[float]]
    colours: str


def check_figure(path: Path) -> None:
    """Before anything is computed for it: whether a figure can be drawn, and written there.

    `BadInput` for a name that ends in no known format, `Unavailable` without matplotlib, `NotWritten` without
    the folder, `WouldOverwrite` where something else lies there.
    """
    if path.suffix.lower() not in _FORMATS:
        raise BadInput(f"{path}: figures are {' or '.join(_FORMATS)} files; give it such a name")
    figure_class()
    if not path.parent.is_dir():
        raise NotWritten(f"{path}: its folder is not there; make it first")
    if path.exists() and not (path.is_file() and _is_ours(path)):
        raise WouldOverwrite(f"{path}: is there already and is no figure of patchkit's; name another file")


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure to a path that `check_figure` let pass; the same bytes for the same figure."""
    import matplotlib
    from matplotlib import style

    png = path.suffix.lower() == ".png"
    about = {"Software": _MARK} if png else {"Creator": _MARK, "Date": None}
    data = io.BytesIO()
    with (
        style.context("default"),
        matplotlib.rc_context({"svg.hashsalt": _MARK, "svg.fonttype": "path"}),
        warnings.catch_warnings(action="ignore"),  # a letter that the font lacks is drawn as a box
    ):
        figure.savefig(data, format=path.suffix.lower()[1:], dpi=_DOTS, metadata=about)
    write_durably(path, data.getvalue())


def draw_heat_maps(heading: str, rows: Sequence[str], maps: Sequence[HeatMap], scale: str) -> Any:
    """Heat maps side by side with the same ``rows``, layers to the right, as in ROME's figures 1 and 2; each
    has its own colours, and ``scale`` says what they measure."""
    height = 1.6 + 0.26 * len(rows)
    figure = figure_class()(figsize=(1.6 + 4.2 * len(maps), height), layout="constrained")
    figure.suptitle(_plain(heading), fontsize=11, parse_math=False)
    shown = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, each in zip(shown, maps, strict=True):
        highest = max((value for row in each.values for value in row if value > 0), default=1.0)
        image = axes.imshow(
            each.values, aspect="auto", cmap=each.colours, interpolation="nearest", vmin=0, vmax=highest
        )
        axes.set_title(_plain(each.title), fontsize=10, parse_math=False)
        axes.set_xlabel(_plain(each.axis), fontsize=9, parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=9)
        axes.set_yticks(range(len(rows)), [_plain(row, _LONGEST) for row in rows], fontsize=9)
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.ax.set_title(_plain(scale), fontsize=8, parse_math=False)
    return figure


def figure_class() -> Any:
    """matplotlib's figure, without its windows and without the state that pyplot keeps; or Unavailable."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable(
            f"figures are drawn by matplotlib, which cannot be imported ({error.name}); "
            "install it with the extra: patchkit-llm[figures]"
        ) from error
    return Figure


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return head.startswith((b"\x89PNG", b"<?xml")) and _MARK.encode() in head


def _plain(text: str, longest: int = 100) -> str:
    """Untrusted text as a label: one line, not long."""
    line = one_line(text)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
