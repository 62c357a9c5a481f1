"""What a run reports: metrics kept on the device, read once per interval, sent to trackers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

import torch
from torch import Tensor

from utils.distributed import Session
from utils.errors import words
from utils.files import append_text, write_text

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where numbers and pictures go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Record an image file."""

    def rewind(self, step: int) -> None:
        """The run goes on from `step` once more: later rows will come again."""

    def close(self) -> None:
        """Send what is left."""


class JsonLines:
    """One JSON object per line in `metrics.jsonl`; always on, and what the plots read.

    What a disk does not take waits in memory and is written when it does.
    """

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._told = False
        if path.is_file():
            self._keep(resumed_at)

    def _keep(self, step: int) -> None:
        """Remove the rows of later steps, and lines that are no metrics."""
        path = self.path
        rows = list(read_metrics(path))
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(rows) < len(lines):
            log.warning(
                "%s: %d lines are no metrics, and are removed", path, len(lines) - len(rows)
            )
        if kept != "".join(f"{line}\n" for line in lines):
            write_text(path, kept)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        self._waiting.append(json.dumps({"step": step, **values}) + "\n")
        try:
            self._append()
        except OSError as error:
            if not self._told:
                log.warning("%s; metrics wait in memory until it takes them", words(error) or error)
            self._told = True

    def _append(self) -> None:
        append_text(self.path, "".join(self._waiting))
        self._waiting, self._told = [], False

    def picture(self, step: int, name: str, path: Path) -> None:
        """Pictures lie in the log directory already."""

    def rewind(self, step: int) -> None:
        """Remove the rows of later steps."""
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        try:
            self._keep(step)
        except OSError as error:
            log.warning("%s: rows after step %d stay: %s", self.path, step, words(error) or error)

    def close(self) -> None:
        """Try once more to write what waits."""
        if not self._waiting:
            return
        try:
            self._append()
        except OSError as error:
            lost = len(self._waiting)
            log.warning("%s: %d rows are lost: %s", self.path, lost, words(error) or error)


def uses_wandb(asked: bool | None, *, disabled: bool, mode: str | None = None) -> bool:
    """Whether a run goes to Weights & Biases; one log line says so, why, and how to change it.

    asked: logging.wandb; None = if its user is logged in there. disabled: --disable-wandb.
    mode: logging.wandb_mode; None = not set, and WANDB_MODE counts.
    """
    set_, mode = mode is not None, mode or os.environ.get("WANDB_MODE", "")
    if disabled:
        chosen, why = False, "--disable-wandb"
    elif asked is not None:
        chosen, why = asked, f"logging.wandb={str(asked).lower()}"
    elif mode:
        name = "logging.wandb_mode" if set_ else "WANDB_MODE"
        chosen, why = mode != "disabled", f"{name}={mode}"
    elif os.environ.get("WANDB_API_KEY"):
        chosen, why = True, "WANDB_API_KEY is set"
    else:
        chosen = _logged_in()
        why = "you are logged in" if chosen else "you are not logged in (wandb login)"
    other = "--disable-wandb turns it off" if chosen else "logging.wandb=true turns it on"
    log.info("Weights & Biases: %s, since %s; %s", "on" if chosen else "off", why, other)
    return chosen


def _logged_in() -> bool:
    """Whether `wandb login` has left a key; asks no server and imports nothing."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, RuntimeError, netrc.NetrcParseError):  # none, no home, or not readable
        return False
    return known.authenticators(urlparse(server).hostname or server) is not None


class Metrics:
    """Sums of device scalars since the last read; reading them is the loop's one host sync."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, prefix: str, values: Mapping[str, Tensor]) -> None:
        """Add detached scalars under `prefix/name`."""
        for name, value in values.items():
            key = f"{prefix}/{name}"
            self._sums[key] = value if key not in self._sums else self._sums[key] + value
            self._counts[key] = self._counts.get(key, 0) + 1

    @property
    def steps(self) -> int:
        """Those counted since the last read."""
        return self._steps

    def clear(self) -> None:
        """Forget what was added since the last read: those steps will be done again."""
        self._sums, self._counts, self._steps = {}, {}, 0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the body out of the seconds per step: saving, sampling."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def count_step(self) -> None:
        """Count one outer step, for the time per step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last read, over steps and ranks, and seconds per step. Collective."""
        result = {}
        if self._sums:
            keys = sorted(self._sums)
            means = torch.stack([self._sums[key].float() / self._counts[key] for key in keys])
            result = self._fit(zip(keys, self._session.mean(means).tolist(), strict=True))
        now = time.perf_counter()
        result["seconds_per_step"] = (now - self._since) / max(1, self._steps)
        if self._session.device.type == "cuda":
            result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums, self._counts, self._steps, self._since = {}, {}, 0, now
        return result

    def _fit(self, values: Iterable[tuple[str, float]]) -> dict[str, float]:
        """Those that are finite: losses and gradients are, and JSON knows no others."""
        result = dict(values)
        bad = [name for name, value in result.items() if not math.isfinite(value)]
        if bad and self._session.is_main:
            log.warning("%s not finite, and left out", ", ".join(bad))
        return {name: value for name, value in result.items() if name not in bad}


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a metrics.jsonl; lines that are none, cut by a crash or damaged, are skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row
