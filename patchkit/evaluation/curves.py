"""The rows of a sweep as figures: PNG and SVG, the same bytes from the same rows. matplotlib is an extra."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchkit.evaluation.figures import figure_class
from patchkit.evaluation.studies import COUNTERFACT, FREE, UNEDITED, ZSRE, whole_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "figure_of"]

Row = Mapping[str, Any]
# Okabe and Ito's, those first that a thin line can have.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = "osD^vPX*"
_GREY = "#666666"
_LETTER, _HANDLE = 0.1, 0.75
"""Inches that a letter of a legend takes, nearly the most, and what stands in front of a name."""
_STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "text.parse_math": False,  # names of relations are anybody's
    "svg.hashsalt": "patchkit",
    "svg.fonttype": "path",
}
_TITLES = {
    "S": "S, harmonic mean of the three",
    "ES": "ES, efficacy",
    "PS": "PS, generalisation",
    "NS": "NS, specificity",
    "tokens S": "score, harmonic mean of the three",
    "rewrite tokens": "efficacy",
    "paraphrase tokens": "paraphrase",
    "neighbour tokens": "specificity",
    "rewrite says": "rewrite, said freely",
    "paraphrase says": "paraphrase, said freely",
    "neighbour says": "neighbour, said freely",
}


def _labelled(name: str) -> str:
    """For a legend, which leaves out what begins with a line."""
    return f" {name}" if name.startswith("_") else name


def _clipped(name: str, most: int) -> str:
    """Names of relations may be whole sentences."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def draw(study: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """The figure of a study as {"png": …, "svg": …}."""
    from matplotlib import rc_context, style

    found = {}
    with style.context("default"), rc_context(_STYLE), warnings.catch_warnings(action="ignore"):
        figure = figure_of(study, rows)
        for kind, made in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=160, metadata=made)
            found[kind] = out.getvalue()
    return found


def figure_of(study: str, rows: Sequence[Row]) -> Figure:
    """The figure itself; one axes for each panel."""
    drawn: dict[str, Callable[[Sequence[Row]], Figure]] = {
        "scaling": _scaling,
        "relations": _relations,
        "tradeoff": _tradeoff,
        "mixtures": _mixtures,
    }
    return drawn.get(study, _bars)(rows)


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    lines = -(-count // columns)
    figure = figure_class()(figsize=(width * min(count, columns), height * lines), layout="constrained")
    return figure, list(figure.subplots(lines, columns if count > columns else count, squeeze=False).flat)


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != UNEDITED))


def _look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    if method == UNEDITED:
        return {"color": _GREY, "linestyle": "--", "marker": ""}
    place = methods.index(method)
    return {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}


def _percent(row: Row, score: str) -> tuple[float, float, float]:
    """Value and distances to its bounds, in percent; NaN where there is none, which is not drawn."""
    value, low, high = row["scores"].get(score) or (None, None, None)
    if value is None:
        return float("nan"), 0.0, 0.0
    # Bootstrap bounds hold the value but for rounding.
    below, above = (0.0 if bound is None else abs(bound - value) for bound in (low, high))
    return 100 * value, 100 * below, 100 * above


def _line(axes: Axes, xs: Sequence[float], rows: Sequence[Row], score: str, **look: Any) -> None:
    """Nothing where an editor has no row."""
    if not rows:
        return
    values, below, above = zip(*(_percent(row, score) for row in rows), strict=True)
    bars: dict[str, Any] = {"capsize": 2.5, "elinewidth": 0.9, "linewidth": 1.6, "markersize": 5}
    axes.errorbar(xs, values, yerr=(below, above), **bars, **look)


def _counts_axis(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("facts in one batch")


def _facts(count: int) -> str:
    return "1 fact" if count == 1 else f"{count:,} facts"


def _shares_axis(axes: Axes) -> None:
    axes.set_ylim(-3, 103)
    axes.set_ylabel("%")


def _legend(figure: Figure, *panels: Axes) -> None:
    """Of all panels: an editor whose edit failed is missing in some."""
    found: dict[str, Any] = {}
    for handles, names in (axes.get_legend_handles_labels() for axes in panels):
        found |= {name: handle for handle, name in zip(handles, names, strict=True) if name not in found}
    inches = figure.get_figwidth()
    names = [_clipped(name, int((inches - _HANDLE) / _LETTER)) for name in found]
    widest = _HANDLE + _LETTER * max(map(len, names))
    columns = max(1, min(len(names), 6, int(inches / widest)))
    figure.legend(found.values(), names, loc="outside lower center", ncols=columns, frameon=False)


def _scaling(rows: Sequence[Row]) -> Figure:
    """Each score over the number of facts, a line for each editor."""
    there = {name for row in rows for name in row["scores"]}
    scores = [*whole_of(rows), *(name for name in FREE if name in there)]
    methods, counts = _methods(rows), sorted({row["count"] for row in rows})
    figure, panels = _panels(len(scores), 4 if len(scores) > 6 else 3, 3.6, 2.9)
    for axes, score in zip(panels, scores, strict=False):
        for method in (UNEDITED, *methods):
            own = [row for row in rows if row["method"] == method]
            beside = 1.03 ** methods.index(method) if method in methods else 1.0  # or lines hide each other
            xs = [row["count"] * beside for row in own]
            _line(axes, xs, own, score, label=method, **_look(method, methods))
        axes.set_title(_TITLES[score], fontsize=10)
        _counts_axis(axes, counts)
        _shares_axis(axes)
    _blank(panels[len(scores) :])
    _legend(figure, *panels)
    return figure


def _blank(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.set_axis_off()


def _bars(rows: Sequence[Row]) -> Figure:
    """The scores of a table at its largest number of facts, a bar for each editor."""
    largest = max(row["count"] for row in rows)
    own = [row for row in rows if row["count"] == largest]
    scores, methods = whole_of(rows), _methods(rows)
    figure, (axes,) = _panels(1, 1, 7.5, 3.6)
    width = 0.8 / len(own)
    for place, row in enumerate(own):
        values, below, above = zip(*(_percent(row, score) for score in scores), strict=True)
        xs = [at + (place - (len(own) - 1) / 2) * width for at in range(len(scores))]
        colour = _look(row["method"], methods)["color"]
        axes.bar(xs, values, width * 0.92, yerr=(below, above), color=colour, capsize=2, label=row["method"])
    axes.set_xticks(range(len(scores)), [_TITLES[score].partition(",")[0] for score in scores])
    axes.set_title(f"{_facts(largest)} in one batch", fontsize=10)
    axes.grid(visible=False, axis="x")
    _shares_axis(axes)
    _legend(figure, axes)
    return figure


def _relations(rows: Sequence[Row]) -> Figure:
    """S of the facts of each relation at the largest number of facts, a point for each editor."""
    largest = max(row["count"] for row in rows)
    own = [row for row in rows if row["count"] == largest]
    score, methods = whole_of(rows)[0], _methods(rows)
    groups = list(dict.fromkeys(row["group"] for row in own))[::-1]
    figure, (axes,) = _panels(1, 1, 7.0, 1.6 + 0.4 * len(groups))
    shift = 0.6 / (len(methods) + 1)
    for place, method in enumerate((UNEDITED, *methods)):
        points = [row for row in own if row["method"] == method]
        if not points:
            continue
        values, below, above = zip(*(_percent(row, score) for row in points), strict=True)
        ys = [groups.index(row["group"]) + (len(methods) / 2 - place) * shift for row in points]
        look = {**_look(method, methods), "linestyle": ""}
        look["marker"] = look["marker"] or "|"
        bars: dict[str, Any] = {"capsize": 2.5, "elinewidth": 0.9}
        axes.errorbar(values, ys, xerr=(below, above), label=method, **bars, **look)
    axes.set_yticks(range(len(groups)), [_clipped(group, 40) for group in groups])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.set_xlim(-3, 103)
    axes.set_xlabel(f"{_TITLES[score]}, %, {_facts(largest)} of one relation in a batch")
    _legend(figure, axes)
    return figure


def _tradeoff(rows: Sequence[Row]) -> Figure:
    """For each number of facts generalisation over specificity, and both over λ: lines of an editor each."""
    methods, counts = _methods(rows), sorted({row["count"] for row in rows})
    figure, panels = _panels(2 * len(counts), 2, 5.0, 3.9)
    for place, count in enumerate(counts):
        own = [row for row in rows if row["count"] == count]
        _one_over_the_other(panels[2 * place], own, methods)
        _both_over_lambda(panels[2 * place + 1], own, methods)
    _legend(figure, *panels)
    return figure


def _two_sided(rows: Sequence[Row]) -> tuple[str, str]:
    """The names of generalisation and specificity."""
    general, special = (COUNTERFACT if whole_of(rows)[0] in COUNTERFACT else ZSRE)[2:4]
    return general, special


def _one_over_the_other(axes: Axes, rows: Sequence[Row], methods: Sequence[str]) -> None:
    """The smallest and the largest λ stand beside their points: those between crowd where λ hardly tells."""
    general, special = _two_sided(rows)
    for place, method in enumerate((UNEDITED, *methods)):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        xs, left, right = zip(*(_percent(row, special) for row in own), strict=True)
        look = {**_look(method, methods), "label": method}
        look["marker"] = look["marker"] or "x"
        _line(axes, xs, own, general, xerr=(left, right), **look)
        ends = [] if method == UNEDITED else [own[0], own[-1]][: len(own)]
        for row in ends:
            at = _percent(row, special)[0], _percent(row, general)[0]
            where, side = ((6, 4), "left") if place % 2 else ((-6, -11), "right")
            beside: dict[str, Any] = {"xytext": where, "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"λ {row['lambda']:g}", at, color=look["color"], ha=side, **beside)
    axes.set_title(_facts(rows[0]["count"]), fontsize=10)
    axes.set_xlabel(f"{_TITLES[special]}, %")
    axes.set_ylabel(f"{_TITLES[general]}, %")


def _both_over_lambda(axes: Axes, rows: Sequence[Row], methods: Sequence[str]) -> None:
    names = _two_sided(rows)
    general, special = (_TITLES[name].partition(",")[0] for name in names)
    for method in (UNEDITED, *methods):
        own = [row for row in rows if row["method"] == method]
        for name, line in zip(names, ("-", ":"), strict=True):
            look = {**_look(method, methods), "linestyle": line}
            if method == UNEDITED:
                for row in own:
                    axes.axhline(_percent(row, name)[0], color=_GREY, linestyle=line, linewidth=1.2)
            else:
                _line(axes, [row["lambda"] for row in own], own, name, **look)
    values = sorted({row["lambda"] for row in rows if row["method"] != UNEDITED})
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("λ")
    axes.set_title(f"{general} solid, {special} dotted", fontsize=10)
    _shares_axis(axes)


def _mixtures(rows: Sequence[Row]) -> Figure:
    """Both relations, their mixture, and the mean of the two that it might be expected at; by editor."""
    score, methods = whole_of(rows)[0], _methods(rows)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    counts = sorted({row["count"] for row in rows})
    figure, panels = _panels(len(methods), 3, 4.0, 3.3)
    for axes, method in zip(panels, methods, strict=False):
        own = {(row["group"], row["count"]): row for row in rows if row["method"] == method}
        for place, group in enumerate(groups):
            line = [own[group, count] for count in counts]
            look = {"color": _COLOURS[place], "marker": _MARKERS[place], "label": _labelled(group)}
            _line(axes, counts, line, score, **look)
        means = [sum(_percent(own[group, count], score)[0] for group in groups[:2]) / 2 for count in counts]
        axes.errorbar(counts, means, color=_GREY, linestyle="--", label="mean of the two")
        axes.set_title(method, fontsize=10)
        _counts_axis(axes, counts)
        _shares_axis(axes)
        axes.set_ylabel(f"{_TITLES[score].partition(',')[0]}, %")
    _blank(panels[len(methods) :])
    _legend(figure, *panels)
    return figure
