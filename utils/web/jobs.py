"""One worker thread and its queue of jobs, for a web page: order, progress, cancelling, results.

Errors are werkzeug's HTTP exceptions, so that a web API may let them through.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

from werkzeug.exceptions import Conflict, NotFound, TooManyRequests

log = logging.getLogger(__name__)

MAX_QUEUED = 32
KEPT = 64  # ended jobs; older ones are forgotten, result and all
CLOSE_TIMEOUT_S = 10.0  # the worker looks up only between steps, and a large model's are long

OnNews = Callable[[str, int, int], None]  # called with (stage, parts done, parts in total)
P = TypeVar("P")


@dataclass(frozen=True)
class Stage:
    """A part of the work on a job, and how far it is."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Job(Generic[P]):
    """One piece of work at one moment; news about it is a new Job under the same id."""

    id: str
    payload: P  # what is to be done; the queue never looks at it
    state: Literal["queued", "running", "done", "failed", "cancelled"] = "queued"
    stages: tuple[Stage, ...] = ()  # that were begun, the present one last
    seconds: float = 0.0  # from start to end, or to the latest news
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether there will be no more news."""
        return self.state not in ("queued", "running")


class JobQueue(Generic[P]):
    """Jobs in order of arrival, and the thread that works on them until it is closed.

    work(payload, path, on_news): writes a job's result to `path`, calls `on_news(stage, done,
    total)` now and then and lets pass what it raises. Whatever else it raises fails the job alone.
    """

    def __init__(self, work: Callable[[P, Path, OnNews], None], folder: Path) -> None:
        self._work = work
        self._folder = folder
        self._jobs: dict[str, Job[P]] = {}
        self._open = True
        self._changed = threading.Condition()  # guards _jobs and _open
        self._worker = threading.Thread(target=self._run, name="worker", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Leave the running job at its next news, and drop the others."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._worker.join(CLOSE_TIMEOUT_S)

    def submit(self, payload: P) -> Job[P]:
        """Add a job at the end. Raises TooManyRequests when the queue is full."""
        with self._changed:
            if self.waiting() >= MAX_QUEUED:
                raise TooManyRequests(f"the queue is full ({MAX_QUEUED} jobs); try again later")
            return self._put(Job(uuid.uuid4().hex, payload))

    def find(self, job_id: str) -> Job[P]:
        """The latest news of a job. Raises NotFound."""
        with self._changed:
            if job_id not in self._jobs:
                raise NotFound(f"no job {job_id}; the last {KEPT} that have ended are kept")
            return self._jobs[job_id]

    def cancel(self, job_id: str) -> Job[P]:
        """Take a job back; a running one is left at its next news. Raises NotFound, Conflict."""
        with self._changed:
            job = self.find(job_id)
            if job.ended:
                raise Conflict(f"job {job_id} has already ended: {job.state}")
            return self._put(replace(job, state="cancelled"))

    def waiting(self) -> int:
        """How many jobs are queued."""
        with self._changed:
            return sum(job.state == "queued" for job in self._jobs.values())

    def ahead(self, job_id: str) -> int:
        """How many unfinished jobs come before this one."""
        with self._changed:
            unfinished = [job.id for job in self._jobs.values() if not job.ended]
            return unfinished.index(job_id) if job_id in unfinished else 0

    def result(self, job_id: str) -> Path:
        """Where the result of a job lies. Raises NotFound, or Conflict if the job is not done."""
        job, path = self.find(job_id), self._path(job_id)
        if job.state != "done":
            raise Conflict(f"job {job_id} has no result: it is {job.state}")
        if not path.is_file():
            raise NotFound(f"the result of job {job_id} was removed; submit the same again")
        return path

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.mp4"

    def _put(self, job: Job[P]) -> Job[P]:
        """Record news and forget what is too old. The caller holds the lock."""
        self._jobs[job.id] = job
        for old in [other for other in self._jobs.values() if other.ended][:-KEPT]:
            del self._jobs[old.id]
            self._path(old.id).unlink(missing_ok=True)
        self._changed.notify_all()
        return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            started = time.monotonic()
            try:
                news = partial(self._news, job.id, started)
                self._work(job.payload, self._path(job.id), news)
                self._end(job.id, started)
            except CancelledError:
                log.info("job %s was cancelled", job.id)
            except Exception as error:  # the next job deserves its turn, whatever went wrong
                log.exception("job %s failed", job.id)
                reason = (str(error).strip().splitlines() or [""])[0]
                self._end(job.id, started, f"{type(error).__name__}: {reason}".removesuffix(": "))

    def _next(self) -> Job[P] | None:
        """The oldest queued job, now running; waits for one. None when the queue closes."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting() or not self._open)
            if not self._open:
                return None
            job = next(job for job in self._jobs.values() if job.state == "queued")
            return self._put(replace(job, state="running"))

    def _news(self, job_id: str, started: float, name: str, done: int, total: int) -> None:
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None or job.ended or not self._open:
                raise CancelledError(f"nobody waits for job {job_id} any more")
            others = tuple(stage for stage in job.stages if stage.name != name)
            stages = (*others, Stage(name, done, total))
            self._put(replace(job, stages=stages, seconds=time.monotonic() - started))

    def _end(self, job_id: str, started: float, error: str | None = None) -> None:
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None or job.ended:  # cancelled after its last news
                self._path(job_id).unlink(missing_ok=True)
                return
            job = replace(job, state="failed" if error else "done")
            self._put(replace(job, seconds=time.monotonic() - started, error=error))
