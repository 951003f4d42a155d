"""What a user can mend: the command line prints such an error as its one sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RunError(Exception):
    """A run cannot start or go on; the message says what was given and what is wanted."""


class NoColumn(RunError):  # noqa: N818
    """A row without the column that was asked for."""


class NotFinite(RunError):  # noqa: N818 (RunError's kind, named for what was found)
    """Numbers that are NaN or infinite where a run has come to; whoever counts iterations says which one it is."""


@contextmanager
def about(section: str) -> Iterator[None]:
    """A complaint about a `model` in here is one about the setting `<section>.model`."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{section}.{error}") from error
