"""Signals that ask a run to stop: noted, and obeyed when the step is whole."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_S = 2.0  # a second Ctrl-C within this time is the first one, passed on


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and it did, after a whole step."""


class StopRequest:
    """Whether a signal has asked this rank to stop."""

    def __init__(self) -> None:
        self.made = False
        self._first = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn a signal into a stop after the current step; a later Ctrl-C stops at once.

        SIGTERM and SIGUSR1 are how clusters announce that time is up. A launcher passes Ctrl-C on,
        so that the same one arrives twice: echoes are ignored.
        """
        previous = {s: signal.signal(s, self._request) for s in STOPPING}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if not self.made:
            self.made, self._first = True, now
            log.warning("%s: stopping after this step", signal.Signals(signum).name)
        elif signum == signal.SIGINT and now - self._first > ECHO_S:
            raise KeyboardInterrupt
