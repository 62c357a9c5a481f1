"""health.jsonl: one line per probe, with its figures, its score and the alarms that are up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.files import write_text, writing
from utils.health.alarms import Figures, Probe, Verdict, judge, score

FILE = "health.jsonl"
REFERENCE = Path("health") / "reference.json"  # what the teacher's clips measure


@dataclass(frozen=True)
class Entry:
    """A line of health.jsonl."""

    probe: Probe
    score: float | None  # None = there is no teacher to be near to
    verdict: Verdict

    def to_json(self) -> str:
        """The line; figures that are not finite are null."""
        content = {
            "step": self.probe.step,
            "score": self.score,
            "figures": dict(self.probe.figures),
            "alarms": [asdict(alarm) for alarm in self.verdict.alarms],
            "rose": list(self.verdict.rose),
            "fell": list(self.verdict.fell),
        }
        return json.dumps(content, allow_nan=False)


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures whose values that are not finite are None."""
    return {k: v if math.isfinite(v) else None for k, v in figures.items()}


class HealthLog:
    """The probes of a run, on disk and in memory; of one that is resumed, those it goes on from."""

    def __init__(self, logdir: Path, *, resumed_at: int, patience: int) -> None:
        self.path = logdir / FILE
        self.patience = patience
        self.probes: list[Probe] = []
        self.rewind(resumed_at)

    def rewind(self, step: int) -> None:
        """Forget the probes of later steps: the run goes on from `step`."""
        rows = read_health(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.probes = [Probe(row["step"], row["figures"]) for row in kept]

    def add(self, step: int, figures: Mapping[str, float], reference: Figures) -> Entry:
        """Judge the next probe and write its line."""
        probe = Probe(step, finite(figures))
        self.probes.append(probe)
        verdict = judge(self.probes, reference, patience=self.patience)
        entry = Entry(probe, score(probe, reference, verdict.alarms), verdict)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(entry.to_json() + "\n")
        return entry


def read_health(path: Path) -> list[dict[str, Any]]:
    """The lines of a health.jsonl, or none without it; lines that a crash has cut are left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"step", "figures"} <= row.keys():
            rows.append(row)
    return rows


def read_reference(logdir: Path) -> dict[str, float | None]:
    """What the teacher's clips measured, or nothing where there was no teacher."""
    path = logdir / REFERENCE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    figures = found.get("figures") if isinstance(found, dict) else None
    return dict(figures) if isinstance(figures, dict) else {}
