"""Ctrl-C and SIGTERM, taken by somebody else for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_to(ask: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Both call `ask`; outside the main thread (a notebook's executor) the caller's handling stays."""
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
