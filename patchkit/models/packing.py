"""Which sequences run side by side: those of like length, so that little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pack"]

PADDING = 0.13  # of the real tokens, at most
GROUP_COST = 32  # tokens


def pack(lengths: Sequence[int], tokens: int, padding: float = PADDING) -> list[list[int]]:
    """Group items so that each group, padded to its longest, has at most ``tokens`` tokens, few of them pads.

    A group costs about as much again as `GROUP_COST` tokens (every weight is read once for it), so
    groups of neighbouring lengths are merged where that pads less, cheapest first, while padding stays
    under ``padding`` of everything. Groups hold places in ``lengths``, shortest first.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        width = lengths[place]
        fresh = not groups or lengths[groups[-1][-1]] != width or width * (len(groups[-1]) + 1) > tokens
        groups.extend([[]] if fresh else [])
        groups[-1].append(place)
    allowed = padding * sum(lengths)
    while len(groups) > 1:
        added, at = min(
            (_added(groups[i], groups[i + 1], lengths, tokens), i) for i in range(len(groups) - 1)
        )
        if added >= min(GROUP_COST, allowed):
            break
        allowed -= added
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return groups


def _added(short: list[int], long: list[int], lengths: Sequence[int], tokens: int) -> float:
    """The padding that merging two groups adds; infinite where the result is too large."""
    width = lengths[long[-1]]
    if width * (len(short) + len(long)) > tokens:
        return float("inf")
    return (width - lengths[short[-1]]) * len(short)
