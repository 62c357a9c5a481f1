"""Trackers that others provide, each in a thread: they may fail or hang, and a run goes on."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from utils.errors import NotFoundError
from utils.metrics import Tracker

log = logging.getLogger(__name__)

WAITING = 1000  # calls that may wait for a tracker; what is more is dropped, and told
FAILURES = 5  # in a row, and a tracker is switched off
CLOSE_S = 60.0  # what a tracker may take for what is left when the run ends
INIT_S = 30.0  # what W&B may take to answer before a run goes on offline
Mode = Literal["online", "offline", "disabled"]
Call = Callable[[Tracker], None]


class Apart:
    """A tracker that is made and called in a thread. No call waits, and none raises.

    make: what gives it; it may take long, and may fail. closed_within_s: how long `close` waits.
    """

    def __init__(
        self, name: str, make: Callable[[], Tracker], *, closed_within_s: float = CLOSE_S
    ) -> None:
        self.name = name
        self.failures = 0  # calls that failed
        self.dropped = 0  # calls that found no room to wait
        self._make = make
        self._closed_within_s = closed_within_s
        self._calls: queue.Queue[Call | None] = queue.Queue(WAITING)
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        row = dict(values)
        self._hand_over(lambda tracker: tracker.log(step, row))

    def picture(self, step: int, name: str, path: Path) -> None:
        """See Tracker."""
        self._hand_over(lambda tracker: tracker.picture(step, name, path))

    def rewind(self, step: int) -> None:
        """See Tracker."""
        self._hand_over(lambda tracker: tracker.rewind(step))

    def close(self) -> None:
        """Wait for what is left, but not for ever."""
        if self._off.is_set():
            return
        try:
            self._calls.put(None, timeout=self._closed_within_s)
        except queue.Full:
            pass
        else:
            self._thread.join(self._closed_within_s)
        if self._thread.is_alive():
            self._off.set()
            log.warning(
                "%s does not answer within %g s, and the run ends without it; metrics.jsonl has "
                "all figures",
                self.name,
                self._closed_within_s,
            )

    def _hand_over(self, call: Call) -> None:
        if self._off.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self.dropped:
                log.warning(
                    "%s does not keep up: rows are dropped there; metrics.jsonl has all", self.name
                )
            self.dropped += 1

    def _work(self) -> None:
        try:
            tracker = self._make()
        except Exception as error:
            self._switch_off(error)
            return
        in_a_row = 0
        while (call := self._calls.get()) is not None and not self._off.is_set():
            try:
                call(tracker)
                in_a_row = 0
            except Exception as error:
                self._count(error)
                in_a_row += 1
                if in_a_row >= FAILURES:
                    self._switch_off(error)
                    return
        try:
            tracker.close()
        except Exception as error:
            self._count(error)

    def _count(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            log.warning("%s failed, and training goes on: %s", self.name, _line(error))

    def _switch_off(self, error: Exception) -> None:
        log.warning(
            "%s is switched off for this start: %s; metrics.jsonl has all figures",
            self.name,
            _line(error),
        )
        self._off.set()  # after the line: who closes waits no more


def _line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    return text.removesuffix(": ")


class WandB:
    """Weights & Biases. `identity` is the same for all parts of a run that is resumed.

    Online, but without an answer within 30 s, it goes on offline and says how to send it later.
    """

    def __init__(
        self,
        *,
        project: str,
        folder: Path,
        name: str,
        identity: str,
        config: Mapping[str, Any],
        mode: Mode | None = None,
    ) -> None:
        """mode: None = WANDB_MODE, else online."""
        import wandb  # slow to import

        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)

        def begin(mode: Mode | None) -> Any:
            return wandb.init(
                project=project,
                dir=str(folder),
                name=name,
                id=identity,
                resume="allow",
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(init_timeout=INIT_S),
            )

        try:
            self._run = begin(mode)
        except wandb.errors.Error as error:
            if (mode or os.environ.get("WANDB_MODE", "online")) != "online":
                raise
            log.warning(
                "Weights & Biases cannot be reached or refuses (%s); it goes on offline: "
                "`wandb login` mends a key, `wandb sync %s` sends the run later",
                _line(error),
                folder / "wandb" / "offline-run-*",
            )
            wandb.teardown()  # its process still has the run's identity in use
            self._run = begin("offline")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send one image file."""
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def rewind(self, step: int) -> None:
        """W&B takes no row twice: it shows what was, until the run is past it."""

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


class TensorBoard:
    """Event files in a folder; rows after `resumed_at` are hidden, since they come again."""

    def __init__(self, folder: Path, *, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step + 1)
        self._writer = self._open(resumed_at)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write one image file."""
        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        """Hide the rows of later steps."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def check_tensorboard() -> None:
    """Raise NotFoundError unless the library that writes its files is installed."""
    try:
        import tensorboard  # noqa: F401, the one that torch writes with
    except ImportError as error:
        raise NotFoundError(
            "logging.tensorboard=true: the package tensorboard is not installed; "
            "pip install 'fewstep[tensorboard]', or leave logging.tensorboard=false"
        ) from error
