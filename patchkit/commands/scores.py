"""How an evaluation is shown: the scores of both models, what happened to the rest, what is not said."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console

from patchkit.commands.display import BAD, GOOD, QUIET, WARNING, Column, counted, say, table
from patchkit.commands.display import text as cell
from patchkit.commands.results import harm_lines, one_line

if TYPE_CHECKING:
    from rich.text import Text

    from patchkit.actions.evaluate import Compared, Evaluation
    from patchkit.evaluation.intervals import Interval
    from patchkit.evaluation.texts import Divergence

__all__ = ["kl_line", "show_scores"]

UNSAID = 5  # facts that are named, of those that are not said
WIDE = 100  # columns from which the intervals of both fit beside that of their difference


def show_scores(out: Console, found: Evaluation, *, unsaid: bool) -> None:
    """The table, and what happened to the rest; ``unsaid``: the facts that B does not say too."""
    drawn = "" if found.sample is None else f", drawn with seed {found.seed}"
    say(out, f"{counted(found.cases, 'fact')} of {found.source}{drawn}", "bold")
    a, b = found.sides
    names = ("", a.name, b.name, f"{b.name} − {a.name}")
    columns = [Column(names[0]), *(Column(name, right=True) for name in names[1:])]
    bounds = out.width >= WIDE
    out.print(table(out, columns, [_row(score, bounds) for score in found.scores]))
    if found.ceiling is not None and not math.isnan(found.ceiling.value):
        say(
            out,
            f"S is {_told('S', found.ceiling, '%.1f', True)} % of what the base's own NS lets it be",
            QUIET,
        )
    if found.text is not None:
        say(out, _text_line(found.text), QUIET)
    own_text, norms = harm_lines(a.harm, b.harm)
    times = b.harm.reading.times(a.harm.reading)
    say(out, f"{own_text}{_times(times.value, times.low, times.high)}", QUIET)
    say(out, norms, QUIET)
    if unsaid:
        _show_unsaid(out, found)
    for note in found.notes:
        say(out, note, WARNING)


def _text_line(kl: Divergence) -> str:
    """What the two say of a text: perplexities and KL, with their intervals."""
    perplexities = ""
    if kl.perplexity_old is not None and kl.perplexity_new is not None:
        times = _times(kl.perplexity_new / kl.perplexity_old, kl.times_low, kl.times_high)
        perplexities = f"perplexity {kl.perplexity_old:.4g} → {kl.perplexity_new:.4g}{times}, "
    return f"{kl.text}: {perplexities}{kl_line(kl)}"


def kl_line(kl: Divergence) -> str:
    """The divergence with its interval."""
    bounds = "" if kl.low is None or kl.high is None else f" ({kl.low:.3g} to {kl.high:.3g})"
    return f"KL(A ‖ B) {kl.mean:.3g}{bounds} nats a token"


def _times(value: float, low: float | None, high: float | None) -> str:
    """How many times as high, where it is known between which bounds."""
    if low is None or high is None or not math.isfinite(low):
        return ""
    return f" ({value:.3f} times, {low:.3f} to {high:.3f})"


def _show_unsaid(out: Console, found: Evaluation) -> None:
    """The facts that B does not say, with what it says in their place."""
    unsaid = found.unsaid
    for seen in unsaid[:UNSAID]:
        fact, said = seen.case.fact, one_line(seen.b.rewrite.said or "")
        say(out, f"{found.sides[1].name} does not say: {fact.text} → {fact.target}, but: {said}", WARNING)
    if len(unsaid) > UNSAID:
        say(out, f"and {len(unsaid) - UNSAID} more (--json tells every fact)", WARNING)


def _row(score: Compared, bounds: bool) -> list[str | Text]:
    apart = score.difference.low > 0 or score.difference.high < 0
    style = "" if not apart else GOOD if score.difference.value > 0 else BAD
    spell = "%.2f" if score.name == "GE" else "%.1f"
    return [
        score.name,
        _told(score.name, score.a, spell, bounds),
        _told(score.name, score.b, spell, bounds),
        cell(_told(score.name, score.difference, spell.replace("%", "%+"), True), style),
    ]


def _told(name: str, found: Interval, spell: str, bounds: bool) -> str:
    """A score, and perhaps its interval, in percent but for GE."""
    if math.isnan(found.value):
        return "–"
    factor = 1 if name == "GE" else 100
    value, low, high = (spell % (factor * number) for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if bounds and not math.isnan(found.low) else value
