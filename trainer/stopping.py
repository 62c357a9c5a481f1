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

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.status = 128 + number  # the exit status, by which those who start runs know it


class StopRequest:
    """Which signal has asked this rank to stop, if one has."""

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0 = none has come
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
        if not self.number:
            self.number, self._first = signum, now
            log.warning("%s: stopping after this step", signal.Signals(signum).name)
        elif signum == signal.SIGINT and now - self._first > ECHO_S:
            raise KeyboardInterrupt
