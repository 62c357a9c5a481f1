"""What a log directory tells of its run: files in, plain values out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import NotFoundError
from utils.health.log import FILE, read_health, read_reference
from utils.metrics import read_metrics
from utils.web.report.plots import Point

HISTORY = "history.jsonl"  # when the run began, went on and ended
METRICS = "metrics.jsonl"
PLAN = "plan.json"  # what `train.py --plan --plan_json` wrote, if somebody put it there


@dataclass(frozen=True)
class Event:
    """A start of the run, or its end."""

    kind: str  # start, or end
    step: int
    time: float  # seconds since 1970
    how: str = ""  # of an end: finished, stopped or failed
    words: str = ""  # of an end: why
    settings: Mapping[str, Any] | None = None  # of a start: by dotted keys
    facts: Mapping[str, Any] | None = None  # of a start: version, device, ranks, threads


@dataclass(frozen=True)
class RunRecords:
    """All that a page shows of a run."""

    folder: Path
    history: Sequence[Event]
    metrics: Sequence[Mapping[str, float]]
    health: Sequence[Mapping[str, Any]]
    reference: Mapping[str, float | None]
    plan: Mapping[str, Any]
    heard: float  # when its files were written last, seconds since 1970

    @property
    def name(self) -> str:
        """The log directory's."""
        return self.folder.resolve().name

    @property
    def starts(self) -> list[Event]:
        """Every start that was recorded."""
        return [event for event in self.history if event.kind == "start"]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of the newest start."""
        starts = self.starts
        return (starts[-1].settings or {}) if starts else {}

    @property
    def step(self) -> int:
        """The newest step that anything was said of."""
        said = [int(row.get("step", 0)) for row in (*self.metrics, *self.health)]
        return max([*said, *(event.step for event in self.history)], default=0)

    @property
    def steps(self) -> int | None:
        """How many there are to do; None = not known."""
        found = self.settings.get("steps")
        return found if isinstance(found, int) else None

    @property
    def state(self) -> str:
        """running, finished, stopped, failed or unknown."""
        if self.history:
            last = self.history[-1]
            return "running" if last.kind == "start" else last.how
        return "unknown"

    def points(self, name: str) -> list[Point]:
        """A metric over its steps."""
        return series(self.metrics, name)

    def figure(self, name: str) -> list[Point]:
        """A figure of health over its steps."""
        rows = [{"step": row["step"], **row["figures"]} for row in self.health]
        return series(rows, name)


def series(rows: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    """A column over its steps; what is not a number is left out."""
    return [
        (float(row["step"]), float(row[name]))
        for row in rows
        if isinstance(row.get(name), int | float) and isinstance(row.get("step"), int | float)
    ]


def read_run(folder: Path) -> RunRecords:
    """Everything that lies in a log directory. Raises NotFoundError where there is no run."""
    if not any((folder / name).is_file() for name in (METRICS, HISTORY, "config.yaml")):
        raise NotFoundError(f"{folder}: no log directory of a run (it has no {METRICS})")
    metrics = folder / METRICS
    files = [folder / name for name in (METRICS, FILE, HISTORY)]
    heard = [path.stat().st_mtime for path in files if path.is_file()]
    return RunRecords(
        folder=folder,
        history=read_history(folder / HISTORY),
        metrics=[row for row in read_metrics(metrics) if "step" in row]
        if metrics.is_file()
        else [],
        health=read_health(folder / FILE),
        reference=read_reference(folder),
        plan=_mapping(folder / PLAN),
        heard=max(heard, default=folder.stat().st_mtime),
    )


def read_history(path: Path) -> list[Event]:
    """The starts and ends in a file, or none without it; lines that make no sense are left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(Event(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return events


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, with both values."""
    keys = sorted(before.keys() | after.keys())
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def probes(folder: Path) -> list[int]:
    """The steps whose clips lie in a log directory, in order."""
    names = [path.name for path in (folder / "health").glob("step_*") if path.is_dir()]
    return sorted(int(name.removeprefix("step_")) for name in names if name[5:].isdigit())


def spread_out(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of some steps: the first, the last, and evenly between them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
