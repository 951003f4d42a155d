"""Where names lead, told before anything heavy is loaded: a file here, a folder here, or the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fpo_train.errors import RunError

SHIPPED = Path(__file__).parent
FORMATS = "JSON lines, a JSON array, CSV, TSV, Parquet, a text a line (.txt), a folder of datasets' save_to_disk"
PATIENCE = 5.0  # seconds in which the hub has to answer; its own client asks for a minute and a half


def rows_at(name: str, setting: str) -> Path | None:
    """The file or folder that a setting names, the user's before a shipped one; None where it is a dataset's hub id.

    Raises:
        RunError: there is nothing of that name and it can be no hub id, or nothing to load one with.
    """
    shipped, path = SHIPPED / f"{name}.jsonl", Path(name).expanduser()
    if shipped.is_file() and not Path(name).exists():
        return shipped
    if path.is_file() or path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or path.suffix or lies_here(name):
        raise RunError(f"{setting}: no file {name} and no shipped set of that name; read are {FORMATS}")
    if not _installed("datasets"):
        raise RunError(f"{setting}: {name} is no file; to load it from the hub, install datasets")
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was put there by hand
        return True


def lies_here(name: str) -> bool:
    """Whether a name of two parts begins with a folder that is here: then it is a path, however it goes on."""
    first, slash, _ = name.partition("/")
    return bool(slash) and Path(first).is_dir()


def look_on_hub(name: str, identifier: str, revision: str | None = None) -> None:
    """See, with one short question, that the hub has a model of that id; one that is in its cache is not asked for.

    Args:
        name: as the user wrote it. identifier, revision: its parts; None: the main revision.

    Raises:
        RunError: no answer, no such model, or one that it does not show to this user.
    """
    from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers

    complaint = f"model {name}: there is no such folder here"
    try:
        if constants.HF_HUB_OFFLINE or isinstance(
            try_to_load_from_cache(identifier, "config.json", revision=revision), str
        ):
            return
        url = hf_hub_url(identifier, "config.json", revision=revision)
    except HFValidationError as error:
        raise RunError(f"{complaint}, and it can be no id on the hub") from error
    try:
        answer = get_session().head(url, headers=build_hf_headers(), timeout=PATIENCE)
    except Exception as error:  # of the HTTP library that this version of the hub's client happens to use
        why = str(error) or type(error).__name__
        raise RunError(f"{complaint}, and the hub cannot be asked for it ({why})") from error
    if answer.headers.get("X-Error-Code") == "GatedRepo":
        raise RunError(f"model {name}: it is gated; ask for access on its page, then log in with `hf auth login`")
    if answer.headers.get("X-Error-Code") == "RevisionNotFound":
        raise RunError(f"model {name}: the hub has {identifier}, but no revision {revision} of it")
    if answer.headers.get("X-Error-Code") == "RepoNotFound" or answer.status_code == 401:
        raise RunError(f"{complaint}, and the hub has none of that id, or does not show it without a login")
