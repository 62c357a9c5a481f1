"""Ranks that keep the others waiting: seconds of each, compared once an interval."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Literal

from utils.distributed import Session

log = logging.getLogger(__name__)

LEAST = 0.05  # of a step: what costs less keeps nobody waiting
Kind = Literal["data", "wait"]


@dataclass(frozen=True)
class Times:
    """Seconds of one rank, per step, as its host sees them."""

    host: str
    step: float  # from one to the next
    data: float  # until records were there
    wait: float  # until other ranks, or the device, had come as far

    @property
    def busy(self) -> float:
        """What the others may have waited for."""
        return self.step - self.wait


class Clock:
    """Sums of one rank's seconds since they were last read. Nothing is waited for."""

    def __init__(self) -> None:
        self._sums: dict[Kind, float] = {"data": 0.0, "wait": 0.0}

    @contextmanager
    def measured(self, kind: Kind) -> Iterator[None]:
        """Count the body's time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._sums[kind] += time.perf_counter() - start

    def read(self, seconds_per_step: float, steps: int) -> Times:
        """Per step, since the last read."""
        sums, self._sums = self._sums, {"data": 0.0, "wait": 0.0}
        count = max(1, steps)
        return Times(
            socket.gethostname(), seconds_per_step, sums["data"] / count, sums["wait"] / count
        )


def stragglers(times: Sequence[Times], ratio: float) -> list[str]:
    """A line for each rank that is slower than `ratio` times the median of all."""
    found = []
    usual = {
        "waits for data": median_low([one.data for one in times]),
        "is busy": median_low([one.busy for one in times]),
    }
    for rank, one in enumerate(times):
        for what, own in (("waits for data", one.data), ("is busy", one.busy)):
            if own > ratio * usual[what] and own - usual[what] > LEAST * one.step:
                found.append(
                    f"rank {rank} (host {one.host}) {what} for {own:.3g} s of a step, the median "
                    f"of all ranks is {usual[what]:.3g} s; it takes {one.step:.3g} s, of which it "
                    f"waits {one.data:.3g} s for data and {one.wait:.3g} s for other ranks"
                )
                break
    return found


def tell_stragglers(session: Session, own: Times, ratio: float) -> None:
    """Log which ranks keep the others waiting. Collective."""
    if session.world_size == 1:
        return
    times = session.gather(own)
    if session.is_main:
        for line in stragglers(times, ratio):
            log.warning("%s", line)
