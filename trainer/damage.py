"""Records that cannot be read while a run trains: told, counted over all ranks, and limited."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.batches import Skipped
from utils.distributed import Session
from utils.errors import UserError
from utils.files import write_text

log = logging.getLogger(__name__)

FILE = "damaged.jsonl"  # in the log directory: a line per record that was skipped
SHOWN = 8  # records that are named in the log at a time


class DamagedDataError(UserError):
    """Too much of the data cannot be read, or ranks that share samples read different ones."""


class DamageLog:
    """What all ranks have skipped since the run was started."""

    def __init__(self, session: Session, logdir: Path, most: int) -> None:
        """most: how many records may be damaged before the run stops."""
        self._session = session
        self._path = logdir / FILE
        self._most = most
        self.records: set[int] = set()  # of all ranks

    def resume(self, step: int) -> None:
        """Go on from what was skipped up to `step`, and forget what came later. Collective."""
        kept: list[dict[str, Any]] = []
        if self._session.is_main and self._path.is_file():
            kept = [row for row in _rows(self._path) if row["step"] <= step]
            write_text(self._path, "".join(_line(row) for row in kept))
        told = self._session.from_main(json.dumps([row["record"] for row in kept]))
        self.records = set(json.loads(told))

    def values(self) -> dict[str, float]:
        """As a metric: how many records; nothing while all could be read."""
        return {"data/damaged": float(len(self.records))} if self.records else {}

    def share(self, step: int, own: Sequence[Skipped]) -> None:
        """Tell what some rank has skipped in `step`. Collective; equal on all ranks.

        own: what this rank has skipped. Raises DamagedDataError on every rank alike.
        """
        found = self._session.gather(list(own))
        self._check_groups(found)
        news = {one.record: one for ones in found for one in ones if one.record not in self.records}
        self.records |= news.keys()
        if self._session.is_main:
            self._tell(step, [news[record] for record in sorted(news)])
        if len(self.records) > self._most:
            reasons = "; ".join(news[record].reason for record in sorted(news)[:SHOWN])
            raise DamagedDataError(
                f"step {step}: {len(self.records)} records of the data are damaged, more than "
                f"data.max_damaged={self._most}: {reasons}. {FILE} in the log directory lists all; "
                f"mend the data, or raise data.max_damaged and start again"
            )

    def _check_groups(self, found: Sequence[Sequence[Skipped]]) -> None:
        """Ranks that work on one sample must have skipped the same."""
        size = self._session.group
        for first in range(0, len(found), size):
            told = [
                [(one.draw, one.record) for one in ones] for ones in found[first : first + size]
            ]
            if any(ones != told[0] for ones in told):
                raise DamagedDataError(
                    f"ranks {first} to {first + size - 1} share their samples, but records that "
                    f"some of them could read were damaged for others; see that all hosts read the "
                    f"same data, then run the same command again"
                )

    def _tell(self, step: int, news: Sequence[Skipped]) -> None:
        for one in news[:SHOWN]:
            log.warning(
                "step %d: record %d is damaged and was replaced by record %d: %s",
                step, one.record, one.replacement, one.reason,
            )  # fmt: skip
        if len(news) > SHOWN:
            log.warning("step %d: and %d more, see %s", step, len(news) - SHOWN, self._path)
        try:
            with self._path.open("a", encoding="utf-8") as lines:
                lines.writelines(_line({"step": step, **asdict(one)}) for one in news)
        except OSError as error:  # what is told above is enough to go on
            log.warning("%s: %s", self._path, error.strerror)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; one that a kill tore tells nothing."""
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            yield {**row, "step": int(row["step"]), "record": int(row["record"])}
