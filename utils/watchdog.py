"""Steps that do not end: the stacks of all ranks are written down, and the job ends."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from utils.distributed import Session
from utils.watch import end_process

log = logging.getLogger(__name__)

STACKS = "stacks"  # folder in the log directory, with a file for each rank
LOOK_S = 1.0  # between two looks, at the clock and at what other ranks say
GRACE_LOOKS = 4  # that others have to notice and to write, before a rank ends
STDERR = 2  # the descriptor: what Python calls stderr may be no file
_STUCK = "watchdog/stuck"


class Watchdog:
    """A thread that ends this process when a section of work exceeds its limit on any rank.

    Where another thread keeps the interpreter's lock for so long, Python's own watchdog, which
    needs no lock, writes the stacks and ends the process.
    """

    def __init__(
        self,
        limit_s: float,
        folder: Path,
        session: Session,
        *,
        end: Callable[[str], None] = end_process,
    ) -> None:
        self._limit_s = limit_s
        self._path = folder / STACKS / f"rank_{session.rank}.txt"
        self._rank = session.rank
        self._store: dist.Store | None = None
        if session.store is not None and session.world_size > 1:
            # A store serves one call at a time, and some of the run's wait long.
            self._store = session.store.clone()  # type: ignore[attr-defined]
            if session.is_main:
                session.store.set(_STUCK, "")
        self._end = end
        self._look_s = min(LOOK_S, limit_s / 4)
        self._work: tuple[str, float] | None = None  # what is being done, and since when
        self._over, self._barked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fewstep watchdog", daemon=True)

    @contextlib.contextmanager
    def section(self, what: str) -> Iterator[None]:
        """Around work that may take the limit."""
        self._work = (what, time.monotonic())
        try:
            yield
        finally:
            self._work = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Run the thread for the length of the body."""
        self._thread.start()
        try:
            yield
        finally:
            if self._barked.is_set():
                self._thread.join()  # what ended the body may be that another rank has ended
            self._over.set()
            self._thread.join(self._look_s * 2)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(self._look_s):
            # Armed anew at each look: it goes off when this thread does not get to run.
            limit_s = self._limit_s + 10 * LOOK_S
            faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
            told = self._late() or self._said()
            if told:
                self._bark(told)
                return

    def _late(self) -> str:
        """What to say if this rank's work exceeds its limit."""
        work = self._work
        if work is None or time.monotonic() - work[1] <= self._limit_s:
            return ""
        return (
            f"rank {self._rank}: {work[0]} has taken longer than {self._limit_s:g} s "
            f"(faults.step_timeout_s)"
        )

    def _said(self) -> str:
        """What another rank has said, if one has."""
        with contextlib.suppress(dist.DistError):
            if self._store is not None and self._store.check([_STUCK]):
                return self._store.get(_STUCK).decode(errors="replace")
        return ""

    def _bark(self, told: str) -> None:
        self._barked.set()
        with contextlib.suppress(dist.DistError):
            if self._store is not None:
                self._store.compare_set(_STUCK, "", told)
        self._dump(told)
        time.sleep(self._look_s * GRACE_LOOKS)
        self._end(
            f"{told}; the stacks of all ranks are in {self._path.parent}; run the same command "
            f"again to continue"
        )

    def _dump(self, told: str) -> None:
        """Write the stacks of all threads to stderr and to a file."""
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(STDERR, all_threads=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w", encoding="utf-8") as file:
                file.write(f"{told}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.warning("%s: not written: %s", self._path, error)


Section = Callable[[str], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def limited(limit_s: float | None, folder: Path, session: Session) -> Iterator[Section]:
    """Within the body a watchdog runs, and is told of each section; None = there is no limit."""
    if limit_s is None:
        yield lambda _: contextlib.nullcontext()
        return
    watchdog = Watchdog(limit_s, folder, session)
    with watchdog.watching():
        yield watchdog.section
