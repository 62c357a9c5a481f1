"""How far a run is: a bar with what is left on a terminal, plain lines where stderr is a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

PLAIN_S = 30.0  # at least between two plain lines


class Progress:
    """Counts steps from `done` to `total`. Only the main rank shows any."""

    def __init__(self, name: str, *, done: int, total: int, shown: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=done, desc=name, disable=not (shown and terminal), mininterval=1.0
        )
        self._plain = shown and not terminal
        self._total = total
        self._done = self._first = done
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.update()

    def rewind(self, step: int) -> None:
        """Go on from `step` once more."""
        self._done = self._first = self._bar.n = step
        self._begun = time.monotonic()

    def tell(self, values: Mapping[str, float]) -> None:
        """Show the losses; in a file as a line, at most every half minute and at the end."""
        losses = {key: f"{value:.4g}" for key, value in values.items() if key.endswith("/loss")}
        self._bar.set_postfix(losses, refresh=False)
        now = time.monotonic()
        if not self._plain or (now - self._told < PLAIN_S and self._done < self._total):
            return
        self._told = now
        own = max(1, self._done - self._first)
        seconds = (now - self._begun) / own
        log.info(
            "step %d of %d, %.3g s each, %s left%s",
            self._done,
            self._total,
            seconds,
            duration(seconds * (self._total - self._done)),
            "".join(f", {key} {value}" for key, value in losses.items()),
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
