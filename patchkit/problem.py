"""A problem: what keeps a tree, a repository or a file from being believed, and the way out."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Problem", "one_line"]


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` is what is meant, `remedy` the way out (from `leftovers`: a shell command, as it is)."""

    path: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.message}; {self.remedy}")

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def one_line(text: str) -> str:
    """Text from elsewhere (file names, what Git said) as one line that no terminal acts on."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in words)
