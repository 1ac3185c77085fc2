"""``patchkit fsck``: hash everything again, derive it again, mend it, or check a range of commits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patchkit.commands.common import directory_option, json_option, open_repository, print_json, quiet_option
from patchkit.commands.display import BAD, CHANGED, GOOD, WARNING, console, counted, progress_bars, say
from patchkit.errors import CheckFailed
from patchkit.facts import told_change
from patchkit.problem import Problem

if TYPE_CHECKING:
    from patchkit.actions.repair import Repair
    from patchkit.actions.review import Review
    from patchkit.repository import Repository

__all__ = ["command"]


@click.command("fsck", short_help="Hash everything again and find what was altered.")
@click.option("--ci", "commits", metavar="BASE..HEAD", help="Check these commits instead; needs no base.")
@click.option(
    "--full", is_flag=True, help="Derive ids, edited tensors of builds and the catalogue again too."
)
@click.option("--repair", is_flag=True, help="Mend what can be mended without losing anything.")
@directory_option
@quiet_option
@json_option
def command(
    commits: str | None, full: bool, repair: bool, directory: str, quiet: bool, as_json: bool
) -> None:
    """Hash Git's objects, the patches in force, the work tree's patches, the base and the builds
    again, trusting no time stamps, and look through the catalogue. Exit code 1 if anything is not
    as it was written. A base that is not on this machine is not looked at, which is said.

    With --full, also of every patch version that a branch or tag reaches: its hashes, and its id
    from its numbers; each edited tensor of the builds, computed again from base and patches; and
    the catalogue's rows, compared with what Git says.

    With --repair, derive a damaged or wrong catalogue again (what was measured is kept, as far as it
    can be read), write altered files and tensors of builds again, and remove what a killed patchkit
    left. Git's objects, references and locks and the files of your work tree are never touched. Each
    problem is told with what was done or why nothing was; exit code 1 if any is left.

    With --ci, for a hosting service: check the tree of every commit in BASE..HEAD, and the merges,
    and show which facts come (+), go (-) and change (~). Neither the base nor a model is needed.
    Each problem is one line with the commit that has it first; exit code 1 if there is any.

    \b
    Examples:
      patchkit fsck
      patchkit fsck --full --repair
      patchkit fsck --ci origin/main..HEAD
    """
    if commits is not None and (full or repair):
        raise click.UsageError("--ci reads commits alone; leave out --full and --repair")
    repository = open_repository(directory)
    if commits is not None:
        done = repository.review(commits)
        found = done.problems
        if as_json:
            print_json(done.to_dict())
        elif not quiet:
            _show(done)
    else:
        found = _check(repository, full, repair, quiet, as_json)
    if found:
        raise CheckFailed("\n".join(str(problem) for problem in found))


def _check(repository: Repository, full: bool, repair: bool, quiet: bool, as_json: bool) -> list[Problem]:
    """Check and, if asked, repair; the problems that are left."""
    from patchkit.actions.fsck import without_base

    repairs: list[Repair] = []
    with progress_bars(quiet or as_json) as progress:
        if repair:
            repairs = repository.repair(progress, full=full)
            found = [each.problem for each in repairs if not each.mended]
        else:
            found = repository.fsck(progress, full=full)
    missing = without_base(repository)
    if as_json:
        extra = {"repairs": [each.to_dict() for each in repairs]} if repair else {}
        problems = [problem.to_dict() for problem in found]
        print_json({"problems": problems, "base_checked": missing is None, **extra})
    elif not quiet:
        _tell(repairs)
        if not found and not repairs:
            derived = " and comes out again as it is" if full else ""
            say(console(), f"every byte is as it was written{derived}", GOOD)
        if missing is not None:
            say(console(), f"the base was not looked at: {missing} (patchkit base PATH)", WARNING)
    return found


def _tell(repairs: list[Repair]) -> None:
    out = console()
    for each in repairs:
        label, style = ("mended ", GOOD) if each.mended else ("left ", WARNING)
        said = f"{each.problem.path}: {each.problem.message}: {each.what}"
        say(out, said, label=label, label_style=style)


def _show(done: Review) -> None:
    out = console()
    for fact, patch in done.removed:
        say(out, f"{fact.text} → {fact.target}  ({patch})", BAD, label="- ")
    for fact, patch in done.added:
        say(out, f"{fact.text} → {fact.target}  ({patch})", GOOD, label="+ ")
    for before, after, patch in done.changed:
        say(out, f"{told_change(before, after)}  ({patch})", CHANGED, label="~ ")
    if done.settings_changed:
        say(out, "patchkit.toml changes: look at its base and recipe", WARNING)
    if not done.known:
        say(out, "the facts are not compared: one of the two ends cannot be believed", WARNING)
    if not done.problems:
        say(out, f"{counted(done.commits, 'commit')} checked, nothing is wrong", GOOD)
