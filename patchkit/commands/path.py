"""``patchkit path``: where things are, for scripts."""

from __future__ import annotations

import click

from patchkit.commands.common import directory_option, open_repository

__all__ = ["command"]

PLACES = (
    "repository",
    "patches",
    "catalogue",
    "statistics",
    "answers",
    "build",
    "kept",
    "base",
    "cache",
    "datasette-metadata",
)


@click.command("path", short_help="Print where patchkit keeps something.")
@click.argument("what", type=click.Choice(PLACES), default="repository")
@directory_option
def command(what: str, directory: str) -> None:
    """Print one absolute path: of the repository, its patches, the catalogue, the statistics, the
    answers that evaluations kept, the default build, what was kept aside, the base, or the user's
    cache of models. The file of datasette-metadata, which tells Datasette of the catalogue, is
    written when it is asked for.

    \b
    Examples:
      sqlite3 "$(patchkit path catalogue)" "select name, facts from patches_in_force"
      datasette "$(patchkit path catalogue)" --metadata "$(patchkit path datasette-metadata)"
    """
    if what == "cache":
        from patchkit.models.sources import cache_folder

        click.echo(str(cache_folder()))
        return
    from patchkit.database.datasette import write_metadata

    repository = open_repository(directory)
    private, own = repository.store.private, repository.store.own
    places = {
        "repository": lambda: repository.store.folder,
        "patches": lambda: repository.store.folder / "patches",
        "catalogue": lambda: own / "catalogue.db",
        "statistics": lambda: private / "statistics",
        "answers": lambda: private / "answers",
        "build": lambda: repository.build_folder,
        "kept": lambda: own / "kept",
        "base": lambda: repository.base_folder,
        "datasette-metadata": lambda: write_metadata(own),
    }
    click.echo(str(places[what]()))
