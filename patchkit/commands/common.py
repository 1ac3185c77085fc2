"""What every command shares: options, opening the repository, JSON, progress."""

from __future__ import annotations

import functools
import json
import math
import tomllib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from patchkit.canonical import without_nan

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = [
    "DefaultGroup",
    "directory_option",
    "dry_run_option",
    "engine_options",
    "finite",
    "is_text",
    "json_option",
    "licence_option",
    "open_repository",
    "print_json",
    "quiet_option",
    "recipe_options",
    "recipe_overrides",
]

Command = TypeVar("Command", bound=Callable[..., Any])


class DefaultGroup(click.Group):
    """A group whose command ``default`` stands for the group itself where none is named."""

    def __init__(self, *args: Any, default: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not any(arg in self.commands or arg in ctx.help_option_names for arg in args[:1]):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def directory_option(command: Command) -> Command:
    """``-C DIR``, after the command's name as well as before it."""

    @click.option("-C", "directory", metavar="DIR", default=None, help="Work in the repository at DIR.")
    @click.pass_context
    @functools.wraps(command)
    def inner(ctx: click.Context, *args: Any, directory: str | None, **kwargs: Any) -> Any:
        return ctx.invoke(command, *args, directory=directory or ctx.obj or ".", **kwargs)

    return inner  # type: ignore[return-value]


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
licence_option = click.option(
    "--license", "licence", metavar="ID", help="For the model card: an identifier of SPDX's."
)
dry_run_option = click.option("-n", "--dry-run", is_flag=True, help="Say what would be done; change nothing.")


def finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A range holds against NaN and infinity nothing."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("a finite number", ctx=ctx, param=parameter)
    return value


def is_text(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Bytes that Python could not read as text are a path's at most, and nothing that a model is asked."""
    for text in (value,) if isinstance(value, str) else value or ():
        if any("\udc80" <= char <= "\udcff" for char in text):
            raise click.BadParameter("is not UTF-8", ctx=ctx, param=parameter)
    return value


def engine_options(command: Command) -> Command:
    """Where and how wide to compute."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps."),
        click.option(
            "--batch-size",
            default="auto",
            show_default=True,
            metavar="N|auto",
            callback=_batch_size,
            help="Facts optimised at once; auto: 32, or on a GPU what its memory holds.",
        ),
    ):
        command = option(command)
    return command


def recipe_options(command: Command) -> Command:
    """What overrides the recipe in patchkit.toml, for this commit."""
    for option in (
        click.option("--method", default=None, help="The editor; `patchkit editors` lists them."),
        click.option("--layers", default=None, metavar="4-8", help="Layers to edit."),
        click.option("--lambda", "lambda_", type=float, default=None, help="How much what was known weighs."),
        click.option("--corpus", default=None, metavar="FILE|DATASET", help="Text for the statistics C."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="Any field of the recipe, for this commit.",
        ),
    ):
        command = option(command)
    return command


def recipe_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe fields that were given on the command line, taken out of ``options``."""
    given = {
        "method": options.pop("method"),
        "layers": options.pop("layers"),
        "lambda": options.pop("lambda_"),
        "statistics_text": options.pop("corpus"),
    }
    given.update(_setting(text) for text in options.pop("settings"))
    return {name: value for name, value in given.items() if value is not None}


def _setting(text: str) -> tuple[str, Any]:
    """ "steps=30" as a name and a TOML value; what is no TOML value is taken as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _batch_size(ctx: click.Context, parameter: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter("a whole number from 1, or auto", ctx=ctx, param=parameter)
    return int(value)


def open_repository(directory: str) -> Repository:
    from patchkit.repository import Repository

    return Repository.open(directory)


def print_json(value: Any) -> None:
    """Readable JSON with every character that a terminal might act on escaped, and null for NaN."""
    click.echo(json.dumps(without_nan(value), indent=2, ensure_ascii=True, allow_nan=False, sort_keys=False))
