"""An exported folder as a model repository of the Hugging Face hub, by the hub's own client.

Promises: whether the hub can be reached and knows who asks is found out before any long work; what was
written here stays here whatever the hub says.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchkit.errors import BadInput, Misconfigured, NotFound, PatchkitError, Unavailable
from patchkit.problem import one_line

__all__ = ["check_hub", "push_folder"]


def check_hub(name: str) -> None:
    """`BadInput` for what is no OWNER/NAME, `Misconfigured` without a login, `Unavailable` without a hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise _no_name(name) from error
    if name.count("/") != 1:
        raise _no_name(name)
    with _explained(name):
        HfApi().whoami()


def push_folder(folder: Path, name: str, message: str, *, private: bool = False) -> str:
    """Upload ``folder`` as one commit of the model repository ``name``, which is made where it is not there.

    Returns the commit's address. Files of other names that are there stay. `Misconfigured` where one may not
    write there, `Unavailable` where the hub fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    later = f"hf upload {'--private ' if private else ''}{name} {shlex.quote(str(folder))}"
    with _explained(name, f"{folder} is written but not uploaded (later: {later}): "):
        api.create_repo(name, repo_type="model", private=private or None, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, repo_type="model", commit_message=message)
    return str(done.commit_url)


def _no_name(name: str) -> BadInput:
    return BadInput(f"{one_line(name)[:100]}: is no name of a hub's repository; write OWNER/NAME")


@contextmanager
def _explained(name: str, done: str = "") -> Iterator[None]:
    """The client's errors as one line; ``done``: what there is all the same."""
    try:
        yield
    except Exception as error:  # the hub's client and what it stands on share no family of errors
        raise _error(name, done, error) from error


def _error(name: str, done: str, error: Exception) -> PatchkitError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return Misconfigured(f"{done}{name}: the hub does not know you; log in: hf auth login")
    if status in (403, 404):
        return Misconfigured(
            f"{done}{name}: the hub does not let you write there; look at the token's rights"
        )
    if isinstance(error, ValueError) and not isinstance(error, errors.HfHubHTTPError):
        said = one_line(str(error))[:200]
        return BadInput(f"{done}{name}: the hub does not take the model card ({said}); look at --license")
    if isinstance(error, OSError) and error.filename:
        return NotFound(f"{done}{error.filename}: cannot be read ({error.strerror})")
    if isinstance(error, errors.HfHubHTTPError):
        said = one_line(str(error.server_message or error))[:200]
        return Unavailable(f"{done}{name}: the hub refused ({said}); try again later")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unavailable(f"{done}{name}: the hub is not asked, as HF_HUB_OFFLINE wants it; unset it")
    return Unavailable(f"{done}{name}: the hub is out of reach; look at the network")
