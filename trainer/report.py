"""report.html of a run while it trains: a tracker that rebuilds the page when there is news."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from trainer.config import Config
from utils.config import leaves
from utils.distributed import Session
from utils.files import writing
from utils.provenance import machine, version
from utils.web.report.records import HISTORY, Event
from utils.web.report.run import write_report

log = logging.getLogger(__name__)

EVERY_S = 300.0  # between pages that nothing but metrics asked for


class ReportPage:
    """Notes each start and end in history.jsonl, and keeps report.html up to date."""

    def __init__(self, config: Config, session: Session, logdir: Path, *, resumed_at: int) -> None:
        self.logdir = logdir
        self.steps = config.steps
        self._step = resumed_at
        self._written = time.monotonic()
        facts = {
            "version": version(),
            "machine": machine(),
            "device": device_words(session),
            "layout": f"{config.sharding_strategy}, {session.world_size} ranks"
            if session.world_size > 1
            else "one process",
        }
        self._note(Event("start", resumed_at, time.time(), settings=leaves(config), facts=facts))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Rebuild the page at a probe of health, and now and then."""
        self._step = step
        probe = any(name.startswith("health/") for name in values)
        if probe or time.monotonic() - self._written > EVERY_S:
            self._rebuild()

    def picture(self, step: int, name: str, path: Path) -> None:
        """Rebuild the page: there is a picture to show."""
        del name, path
        self._step = step
        self._rebuild()

    def rewind(self, step: int) -> None:
        """Show the figures up to `step`: later ones will come again."""
        self._step = step
        self._rebuild()

    def close(self) -> None:
        """Note how the run ended, and rebuild the page."""
        error = sys.exc_info()[1]
        if error is None:
            how = "finished" if self._step >= self.steps else "stopped"
        else:
            how = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        words = "" if error is None else str(error) or type(error).__name__
        self._note(Event("end", self._step, time.time(), how=how, words=words))
        self._rebuild()

    def _note(self, event: Event) -> None:
        path = self.logdir / HISTORY
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(event)) + "\n")
        except OSError as error:  # a page is not worth a run
            log.warning("report.html: %s", error)

    def _rebuild(self) -> None:
        try:
            write_report(self.logdir)
        except OSError as error:
            log.warning("report.html: %s", error)
        self._written = time.monotonic()


def device_words(session: Session) -> str:
    """The device of this rank."""
    if session.device.type == "cuda":
        return torch.cuda.get_device_name(session.device)
    return f"CPU, {torch.get_num_threads()} threads"
