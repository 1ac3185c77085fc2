"""``patchkit ask``: the base and the stack, side by side."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, is_text, json_option, open_repository, print_json
from patchkit.commands.display import Column, console, say, table
from patchkit.errors import BadInput
from patchkit.files import standard_input

__all__ = ["command"]


@click.command("ask", short_help="Ask the base and the stack side by side.")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT…", callback=is_text)
@click.option("--rev", "revision", default="HEAD", show_default=True, help="The stack at this commit.")
@click.option(
    "--tokens",
    "new_tokens",
    type=click.IntRange(1, 512),
    default=24,
    show_default=True,
    help="Tokens to generate.",
)
@click.option("--top", type=click.IntRange(1, 20), default=5, show_default=True, help="Next tokens to show.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@directory_option
@json_option
def command(
    prompts: tuple[str, ...],
    revision: str,
    new_tokens: int,
    top: int,
    device: str,
    directory: str,
    as_json: bool,
) -> None:
    """Ask each PROMPT of the base and of the base with the stack on it.

    Shows what each says when left to itself (greedy), and its most probable next tokens.
    "-" reads prompts from standard input, one a line.

    \b
    Example:
      patchkit ask "LeBron James plays the sport of" "Microsoft was founded by"
    """
    asked = [
        prompt
        for item in prompts
        for prompt in (standard_input().decode("utf-8-sig").splitlines() if item == "-" else [item])
    ]
    asked = [prompt for prompt in asked if prompt.strip()]
    if not asked:
        raise BadInput("no prompt to ask; give one, or one a line on standard input")
    answers = open_repository(directory).ask(
        asked, revision=revision, new_tokens=new_tokens, top=top, device=device
    )
    if as_json:
        print_json([answer.to_dict() for answer in answers])
        return
    out = console()
    for answer in answers:
        say(out, answer.prompt, "bold")
        rows = [("says", _one_line(answer.base.text), _one_line(answer.stack.text))]
        pairs = zip(answer.base.next, answer.stack.next, strict=True)
        for rank, (before, after) in enumerate(pairs, 1):
            rows.append((f"{rank}", _token(before), _token(after)))
        out.print(table(out, [Column(""), Column("base", 1), Column("stack", 1)], rows))
        out.print()


def _one_line(said: str) -> str:
    return " ".join(said.split())


def _token(pair: tuple[str, float]) -> str:
    return f"{pair[1]:6.3f}  {pair[0]!r}"
