"""Updates skipped because a loss or a gradient is not finite: recorded, counted, limited."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.distributed import Session
from utils.errors import UserError, words
from utils.files import append_text

log = logging.getLogger(__name__)

FAULTS = "faults.jsonl"  # in the log directory: one skipped update or one roll-back a line
WINDOW = 100  # the last steps among which skipped updates of a phase are counted
SHOWN = 4  # samples that a line names


@dataclass(frozen=True)
class FaultsConfig:
    """What becomes of steps that fail, or that do not end."""

    # Updates of a phase with a loss or gradient that is not finite are skipped. So many among its
    # last 100 steps, or weights that are not finite themselves, are the limit.
    max_skipped: int = 10
    # stop: the run ends; roll_back: it goes back to its newest checkpoint, and past those samples.
    on_limit: Literal["stop", "roll_back"] = "stop"
    max_roll_backs: int = 3  # to the same checkpoint; then the run stops
    step_timeout_s: float | None = 3600.0  # of a step, a save, a picture; then the run is ended
    straggler_ratio: float = 1.3  # a rank so much slower than the median is told

    def problems(self) -> Iterator[str]:
        """What no run could do, one line each."""
        if self.max_skipped < 1:
            yield f"faults.max_skipped: must be at least 1, got {self.max_skipped}"
        if self.max_roll_backs < 1:
            yield f"faults.max_roll_backs: must be at least 1, got {self.max_roll_backs}"
        if self.step_timeout_s is not None and not self.step_timeout_s > 0:
            yield (
                f"faults.step_timeout_s: must be positive, or null for no limit, got "
                f"{self.step_timeout_s}"
            )
        if not self.straggler_ratio > 1:
            yield f"faults.straggler_ratio: must be greater than 1, got {self.straggler_ratio}"


class RunFailedError(UserError):
    """The run cannot go on, and says why."""


class LimitReachedError(UserError):
    """Skipping updates leads nowhere; the message says why."""

    well_until: int | None = None  # the last step that is worth going back to; None = the newest


class SpoiltError(LimitReachedError):
    """An alarm says that the run goes astray, and the run is to go back."""

    def __init__(self, message: str, well_until: int) -> None:
        super().__init__(message)
        self.well_until = well_until


@dataclass(frozen=True)
class Share:
    """A rank's samples of one phase."""

    draws: Sequence[int]  # positions in the data order
    records: Sequence[int]  # of the data, for each draw
    captions: Sequence[str]
    suspect: Sequence[bool]  # whether the loss of its micro-batch was not finite


@dataclass(frozen=True)
class SkippedUpdate:
    """An update that was not made, as it is written to faults.jsonl."""

    step: int  # the outer step, from 1 on
    phase: str
    norms: Mapping[str, str]  # of gradients by role; text, since JSON knows no NaN
    draws: tuple[int, int]  # first, and one past the last
    samples: Sequence[Mapping[str, Any]]  # those of the micro-batches that failed, else all

    @property
    def named(self) -> str:
        """A few of the samples, as a line names them."""
        shown = [f"{one['record']} ({one['caption']!r})" for one in self.samples[:SHOWN]]
        more = len(self.samples) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def samples_of(shares: Sequence[Share]) -> list[dict[str, Any]]:
    """The suspects among all ranks' samples, each once; all of them if no loss tells."""
    found = {
        draw: ({"draw": draw, "record": record, "caption": caption}, suspect)
        for share in shares
        for draw, record, caption, suspect in zip(
            share.draws, share.records, share.captions, share.suspect, strict=True
        )
    }
    chosen = [sample for _, (sample, suspect) in sorted(found.items()) if suspect]
    return chosen or [sample for _, (sample, _) in sorted(found.items())]


@dataclass
class Faults:
    """The skipped updates of a run, the same on all ranks. The main one writes them down."""

    config: FaultsConfig
    logdir: Path
    session: Session
    skipped: dict[str, list[int]] = field(default_factory=dict)  # recent steps, by phase
    fresh: int = 0  # skipped since they were last counted
    last: SkippedUpdate | None = None
    _failing: set[str] = field(default_factory=set)  # phases whose newest update was skipped
    _returns: tuple[int, int] = (-1, 0)  # the step rolled back to last, and how often

    def skip(self, skipped: SkippedUpdate, unfit: Sequence[str]) -> None:
        """Record an update that is not made. Raises LimitReachedError if that is one too many.

        unfit: names of weights that are not finite themselves.
        """
        self.fresh += 1
        self._failing.add(skipped.phase)
        self.last = skipped
        recent = self.skipped.setdefault(skipped.phase, [])
        recent.append(skipped.step)
        recent[:] = [step for step in recent if step > skipped.step - WINDOW]
        self._write({"what": "skipped", **vars(skipped)})
        if self.session.is_main:
            log.warning(
                "step %d: the %s update is skipped, its loss or gradient is not finite (%d of at "
                "most %d among %d steps); samples: %s; see %s",
                skipped.step,
                skipped.phase,
                len(recent),
                self.config.max_skipped,
                WINDOW,
                skipped.named,
                self.logdir / FAULTS,
            )
        if unfit:
            raise LimitReachedError(f"step {skipped.step}: {weights_words(unfit)}")
        if len(recent) >= self.config.max_skipped:
            raise LimitReachedError(
                f"step {skipped.step}: {len(recent)} {skipped.phase} updates of the last {WINDOW} "
                f"steps had a loss or gradient that is not finite "
                f"(faults.max_skipped={self.config.max_skipped})"
            )

    def made(self, phase: str) -> None:
        """Note that an update of a phase is made."""
        self._failing.discard(phase)

    @property
    def doubtful(self) -> bool:
        """Whether the weights may be the fault: the newest update of some phase was skipped."""
        return bool(self._failing)

    def counted(self) -> dict[str, float]:
        """What the metrics are told: the updates skipped since they last were, if any."""
        fresh, self.fresh = self.fresh, 0
        return {"faults/skipped": float(fresh)} if fresh else {}

    def may_roll_back(self, limit: LimitReachedError, to: int) -> bool:
        """Whether to go back to the checkpoint of step `to`, now or once more."""
        if self.config.on_limit == "stop" and not isinstance(limit, SpoiltError):
            return False
        step, count = self._returns
        self._returns = (to, count + 1 if step == to else 1)
        return self._returns[1] <= self.config.max_roll_backs

    def rolled_back(self, limit: LimitReachedError, at: int, to: int, draws: int) -> None:
        """Begin to count anew after a roll-back from outer step `at` to the one done before."""
        self.skipped, self._failing, self.fresh = {}, set(), 0
        row = {"what": "rolled back", "step": at, "to": to, "draws": draws, "why": str(limit)}
        self._write(row)

    def advice(self, limit: LimitReachedError, good: Path | None) -> str:
        """The error of a run that stops, in a line."""
        if isinstance(limit, SpoiltError):
            why = (
                f"the run has gone back to {good} {self.config.max_roll_backs} times "
                f"(faults.max_roll_backs) and goes astray each time"
                if good
                else f"no checkpoint is kept of step {limit.well_until} or before "
                f"(keep_checkpoints, keep_every and keep_best say which are)"
            )
            return f"{limit} It stops here (health.roll_back=true): {why}"
        reason = str(limit)
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        seen = f" Samples of the last one: {self.last.named}." if self.last else ""
        return (
            f"{reason}; {where}.{seen} All are in {self.logdir / FAULTS}: if the same records "
            f"return there, look at them (scripts/validate_dataset.py reads latents), or go past "
            f"them with faults.on_limit=roll_back; if not, continue with a lower lr or "
            f"max_grad_norm of that role, such as generator.lr=1e-6, on the same command line."
        )

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self.session.is_main:
            return
        try:
            append_text(self.logdir / FAULTS, json.dumps(row) + "\n")
        except OSError as error:  # the line in the log has told it
            log.warning("%s: not written: %s", FAULTS, words(error) or error)


def weights_words(names: Sequence[str]) -> str:
    """Which weights or states are not finite."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} not finite"
