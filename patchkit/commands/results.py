"""How an edit's results are shown: one row a fact, then the sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from patchkit.actions.pages import percent
from patchkit.commands.display import BAD, GOOD, WARNING, Column, table, text

if TYPE_CHECKING:  # `show` needs this module, and not what measures
    from patchkit.actions.earlier import Earlier
    from patchkit.evaluation.harm import Harm
    from patchkit.evaluation.measure import FactChange, PromptState, Summary

__all__ = ["earlier_line", "harm_lines", "lost_line", "one_line", "results_table", "summary_line"]

WIDE = 100  # columns from which both answers fit beside each other


def results_table(out: Console, changes: Sequence[FactChange]) -> None:
    """P(target) before and after, what free generation says, paraphrases and neighbours.

    What the model said before is left out where the terminal is narrow.
    """
    wide = out.width >= WIDE
    rows = [_row(change, wide) for change in changes]
    said = [Column("said", 2)] if wide else []
    numbers = [Column("P before", right=True), Column("P after", right=True)]
    counts = [Column("para.", right=True), Column("neigh.", right=True)]
    out.print(
        table(
            out,
            [Column(""), Column("fact", 3, wraps=True), *numbers, *said, Column("says", 2), *counts],
            rows,
        )
    )


def _row(change: FactChange, wide: bool) -> list[str | Text]:
    before, after = change.before.rewrite, change.after.rewrite
    return [
        mark(change),
        text(f"{change.fact.subject} → {change.fact.target}"),
        f"{before.target:.3f}",
        Text(f"{after.target:.3f}", style="bold"),
        *([text(one_line(before.text or ""))] if wide else []),
        text(one_line(after.text or ""), GOOD if after.says else BAD),
        _count(change.after.paraphrases),
        f"{change.kept_neighbors}/{len(change.after.neighbors)}" if change.after.neighbors else "–",
    ]


def summary_line(summary: Summary) -> str:
    """The sums in one line."""
    return (
        f"efficacy {percent(summary.efficacy)} · argmax {percent(summary.argmax)} · "
        f"generation {percent(summary.generation)} · para. {percent(summary.paraphrases)} · "
        f"neigh. {percent(summary.neighbors)}"
    )


def harm_lines(before: Harm, after: Harm) -> tuple[str, str]:
    """What happened to the rest."""
    base = f" (base {after.base:.4g})" if before.perplexity != after.base else ""
    return (
        f"perplexity of the base's own text: {before.perplexity:.4g} → {after.perplexity:.4g}{base}",
        f"‖W + ΔW‖ / ‖W‖ of the edited weights: {before.growth:.4f} → {after.growth:.4f}",
    )


def earlier_line(earlier: Earlier) -> str:
    """What became of the facts that were in force before; empty where none of them was said."""
    if not earlier.said:
        return ""
    fewer = earlier.asked < earlier.in_force
    asked = f" ({earlier.asked} of {earlier.in_force} asked, the most disturbed first)" if fewer else ""
    kept = earlier.said - len(earlier.lost)
    return f"facts in force before: {kept} of {earlier.said} that were said still are{asked}"


def lost_line(earlier: Earlier, *, committed: bool) -> str:
    """The facts in force that are not said any more, and what helps; empty where there is none."""
    if not earlier.lost:
        return ""
    named = ", ".join(f"{fact.subject} → {fact.target}" for fact in earlier.lost[:3])
    more = f" and {len(earlier.lost) - 3} more" if len(earlier.lost) > 3 else ""
    if not committed:
        return f"would no longer be said: {named}{more}"
    again = (
        f"; solve again on this stack: patchkit refit {' '.join(earlier.refittable)}"
        if earlier.refittable
        else ""
    )
    return f"no longer said: {named}{more}{again}"


def mark(change: FactChange) -> Text:
    """✓ the model says it, ~ it prefers it but says something else, ✗ it did not take."""
    if change.after.rewrite.says:
        return Text("✓", style=GOOD)
    return Text("~", style=WARNING) if change.took else Text("✗", style=BAD)


def one_line(said: str, limit: int = 40) -> str:
    """The beginning of a continuation, on one line."""
    line = " ".join(said.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _count(states: Sequence[PromptState]) -> str:
    return f"{sum(state.prefers for state in states)}/{len(states)}" if states else "–"
