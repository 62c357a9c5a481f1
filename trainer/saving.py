"""Saves a run while it trains on: one checkpoint at a time, failures counted, old ones deleted."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.config import Config
from trainer.logdir import CHECKPOINTS, CONFIG, Claim, note_saved
from utils import checkpoint
from utils.checkpoint import SaveError
from utils.checkpoint_manifest import versions
from utils.checkpoint_writer import Copies, bytes_of, free_bytes
from utils.config import to_yaml
from utils.distributed import Session
from utils.errors import UserError, words

log = logging.getLogger(__name__)

HEALTH = "health.jsonl"  # one probe a line, with its "step" and its "score"


class Saver:
    """Writes a run's checkpoints. All that is public is collective, but for `close`."""

    def __init__(self, config: Config, claim: Claim, session: Session) -> None:
        self.config = config
        self.claim = claim
        self.folder = claim.logdir / CHECKPOINTS
        self.failures = 0  # saves that failed since one did not
        self._session = session
        self._copies: Copies | None = Copies() if config.save_in_background else None
        self._channel: Session | None = None  # for the thread that writes
        self._writing: _Writing | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint, when the one before it is done.

        A failure is told and counted, and raises SaveError when too many have followed each other.
        """
        self.settle()
        start = time.perf_counter()
        copies = None
        if self._copies is not None and self._fits(state, self._copies):
            copies = self._copies.take(state)
        write = partial(self._write, step, state, copies, self._apart(), start)
        self._writing = _Writing(write, step)
        # The last failure that is allowed should end the run here, and not at the next save.
        urgent = 0 < self.failures == self.config.save_failures - 1
        if copies is None:
            self._writing.run()
        else:
            self._writing.start()
        if urgent or copies is None:
            self.settle()

    def settle(self, *, last: bool = False) -> None:
        """Wait for the checkpoint that is being written. last: no later one can make good for it.

        Raises what went wrong: SaveError for the last, or one too many; what is no fault of a disk
        at once.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = writing.outcome()
        if error is None:
            self.failures = 0
            return
        if not isinstance(error, SaveError):
            raise error
        self.failures += 1
        if last:
            raise error
        allowed = self.config.save_failures
        if self.failures >= allowed:
            good = checkpoint.latest(self.folder)
            raise SaveError(
                f"step {writing.step} could not be saved, after {allowed} attempts in a row "
                f"(save_failures={allowed}); the newest checkpoint is {good or 'none'}\n{error}"
            ) from error

    def newest(self, until: int | None = None) -> Path | None:
        """The newest checkpoint, every byte compared, when the one that is written is done.

        until: the last step that it may be of; None = any.
        """
        self.settle()
        return checkpoint.newest_good(self.folder, self._session, until)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a start would go on from them."""

        def drop() -> None:
            checkpoint.drop_after(self.folder, step)
            note_saved(self.claim.logdir, step)

        self._session.on_main(drop)

    def close(self) -> None:
        """Wait for what is being written, and tell if that fails: the run ends for whatever reason.

        Not collective: it may be the other ranks that are gone.
        """
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.outcome()
        if error is not None and not isinstance(error, SaveError):  # those were told already
            log.error("the checkpoint was not written: %s: %s", type(error).__name__, error)

    def _fits(self, state: dict[str, Any], copies: Copies) -> bool:
        """Whether the host has memory for a copy; once said no, the run waits for its saves."""
        if copies.taken:
            return True
        needed = bytes_of(state) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = free_bytes()
        if not self._session.any(needed > free):
            return True
        if self._session.is_main:
            log.warning(
                "training waits for each save: a copy of the state takes %.1f GiB of host memory "
                "and %.1f GiB are free (save_in_background=false says this no more)",
                needed / 2**30,
                free / 2**30,
            )
        self._copies = None
        return False

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        copies: Mapping[str, Any] | None,
        session: Session,
        start: float,
    ) -> None:
        """Write, publish, then delete what is older. Runs in a thread if there are copies."""
        config = to_yaml(self.config)
        facts = {
            "config": hashlib.sha256(config.encode()).hexdigest(),
            "data": asdict(self.claim.fingerprint),
            "ranks": session.world_size,
            "versions": versions(),
        }
        try:
            checkpoint.refused_together(lambda: session.on_main(self.claim.confirm))
            path = checkpoint.save(
                self.folder, step, state, {CONFIG: config}, session, copies=copies, facts=facts
            )
        except SaveError as error:
            self._tell(step, error)
            raise
        log.info("saved %s in %.1f s", path, time.perf_counter() - start)
        try:
            session.on_main(lambda: note_saved(self.claim.logdir, step))
            checkpoint.prune(self.folder, self.config.keep_checkpoints, session, self._stay)
        except (OSError, UserError) as error:
            if session.is_main:
                log.warning("old checkpoints could not be deleted: %s", words(error) or error)

    def _stay(self, steps: Sequence[int]) -> set[int]:
        scores = read_scores(self.claim.logdir / HEALTH) if self.config.keep_best else {}
        every, best = self.config.keep_every, self.config.keep_best
        return checkpoint.stay(steps, scores, every=every, best=best)

    def _tell(self, step: int, error: SaveError) -> None:
        if self._session.is_main:
            log.warning(
                "step %d could not be saved (failure %d of %d): %s",
                step,
                self.failures + 1,
                self.config.save_failures,
                "; ".join(str(error).splitlines()),
            )

    def _apart(self) -> Session:
        """The session by a process group of the saves' own: the run's is in use meanwhile."""
        if self._channel is None:
            group = None
            if dist.is_initialized():
                limit = timedelta(seconds=self._session.timeout_s)
                group = dist.new_group(backend="gloo", timeout=limit)
            self._channel = replace(self._session, channel=group)
        return self._channel


class _Writing:
    """One checkpoint on its way to the disk."""

    def __init__(self, task: Callable[[], None], step: int) -> None:
        self.step = step
        self._task = task
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write it now."""
        try:
            self._task()
        except Exception as error:  # told by `outcome`, to the thread that trains
            self._error = error

    def start(self) -> None:
        """Write it while training goes on. Python waits for such a thread before it ends."""
        self._thread = threading.Thread(target=self.run, name=f"save of step {self.step}")
        self._thread.start()

    def outcome(self) -> Exception | None:
        """What went wrong, when it is done."""
        if self._thread is not None:
            self._thread.join()
        return self._error


def read_scores(path: Path) -> dict[int, float]:
    """The health score of each step that was probed; what cannot be read is passed over."""
    scores: dict[int, float] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return scores
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            step, score = int(row["step"]), float(row["score"])
            if math.isfinite(score):
                scores[step] = score
    return scores
