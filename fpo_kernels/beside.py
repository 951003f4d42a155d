"""Kernels beside a pass: on a stream of their own, while the pass goes on.

A quarter of a backward's time moves memory and multiplies nothing; products and sketches do the reverse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Beside:
    """Work that one pass gives away, in order, and waits for in the end."""

    def __init__(self) -> None:
        self._latest: dict[torch.device, tuple[Any, object]] = {}  # its event, and what it reads

    def run(self, device: torch.device, work: Callable[[], T], reads: object) -> T:
        """What `work` returns, filled by kernels that may run after this; read it after `join`.

        Args:
            reads: the tensors that the kernels read. They are kept until the next work is given away: from there on
                the current stream waits for this one, so that their memory may be used again.
        """
        # a graph's kernels follow one another without the host: there is little to gain, and a fork to get wrong
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return work()
        current = torch.cuda.current_stream(device)
        own = _stream(device, current.cuda_stream)
        self._wait(device)
        own.wait_stream(current)
        with torch.cuda.stream(own):
            made = work()
        self._latest[device] = own.record_event(), reads
        return made

    def join(self) -> None:
        """Have the current streams wait for all of it. What was made may then be read, and let go of, there."""
        for device in list(self._latest):
            self._wait(device)

    def _wait(self, device: torch.device) -> None:
        latest = self._latest.pop(device, None)
        if latest is not None:
            torch.cuda.current_stream(device).wait_event(latest[0])


@functools.cache
def _stream(device: torch.device, current: int) -> Any:
    """The stream beside a current one, by its handle: what is let go of there is used again there.

    A pass on another stream has another: it would not wait for the one that still reads.
    """
    return torch.cuda.Stream(device)
