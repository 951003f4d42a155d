"""A polite end: the first SIGTERM or Ctrl-C lets the iteration finish, a second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAID = b"\nstopping once this iteration is done; the same again stops at once, and the iteration is lost\n"


class Stopped(Exception):  # noqa: N818 - an end that was asked for, not an error
    """A run that ended early, its state saved after `iteration`."""

    def __init__(self, iteration: int) -> None:
        super().__init__(iteration)
        self.iteration = iteration


class Request:
    """Whether an end has been asked for. Where there is nothing to finish, asking raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.made = False
        self._working = False

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Work that is to be finished first."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if self.made or not self._working:
            raise KeyboardInterrupt
        self.made = True
        os.write(2, SAID)  # printing is not safe inside a signal's handler


@contextmanager
def listening() -> Iterator[Request]:
    """Listen to SIGTERM and SIGINT; the former handlers are put back. Only a main thread hears signals."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
