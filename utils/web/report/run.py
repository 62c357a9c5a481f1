"""report.html of a log directory: how the run is, in one file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from utils.files import write_text
from utils.provenance import stamp
from utils.web.report.elements import (
    Tone,
    badge,
    duration,
    folded,
    gallery,
    number,
    page,
    picture,
    section,
    settings_table,
    table,
    text,
    tiles,
    video,
)
from utils.web.report.plots import Line, plot
from utils.web.report.records import RunRecords, changed, probes, read_run, spread_out

FILE = "report.html"
SHOWN = 5  # probes whose clips are shown
SILENT_MIN = 30  # minutes after which a run that says nothing is worth a look
SHEET_BYTES = 3_000_000  # a larger contact sheet would be most of the page
TONES: dict[str, Tone] = {
    "running": "calm", "finished": "good", "stopped": "warn", "failed": "bad", "unknown": "calm",
}  # fmt: skip
# Metrics of training, a plot each: its title, and the names of its lines.
CURVES = {
    "loss": "loss",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate",
}
MACHINE = {"seconds_per_step": "seconds per step", "peak_memory_gib": "peak memory, GiB"}
# Figures of health, a plot each: what is on its axis and what it means; those of the teacher's
# clips are drawn beside them.
FIGURES = {
    "diversity_seeds": ("difference between seeds", "RMS distance of clips of one prompt"),
    "diversity_prompts": ("difference between prompts", "RMS distance of clips of other prompts"),
    "motion": ("motion", "mean change from frame to frame"),
    "chroma": ("colour", "spread of the colour channels"),
    "contrast": ("contrast", "standard deviation within a clip"),
    "sharpness": ("sharpness", "mean step between neighbouring pixels"),
    "exposure": ("exposure", "mean brightness"),
    "clipped": ("clipped pixels", "share that is black or white"),
    "drift": ("drift", "change from a clip's first quarter to its last"),
    "distance_teacher": ("distance to the teacher's clips", "1 = unrelated"),
    "score_gap": ("gap of the scores", "critic against teacher on the student's clips"),
    "removed": ("critic's own error in the gap", "share that projected DMD would remove"),
    "critic_lag": ("critic lag", "its loss on new clips over that on replayed ones"),
    "critic_excess": ("critic against teacher", "loss on the student's clips, as a multiple"),
    "sample_change": ("change of the clips", "since the probe before, 1 = unrelated"),
}


def write_report(logdir: Path) -> Path:
    """Write <logdir>/report.html from what lies there; returns its path."""
    target = logdir / FILE
    write_text(target, run_page(read_run(logdir)))
    return target


def run_page(run: RunRecords) -> str:
    """The whole page of a run."""
    parts = [
        heading(run),
        section("Alarms", alarms(run), ALARMS_NOTE if run.health else ""),
        section("Clips", clips(run), CLIPS_NOTE if probes(run.folder) else ""),
        section("Training", curves(run), "Faint: as logged; bold: a running average."),
        section("Health", health(run), HEALTH_NOTE),
        section("Machine", machine(run)),
        section("Settings", settings(run)),
        f'<p class="soft">Written {stamp()} by Fewstep; rebuild it with '
        f"<code>python scripts/report.py --logdir {text(run.folder)}</code>.</p>",
    ]
    return page(f"{run.name} - Fewstep run", "".join(parts))


ALARMS_NOTE = (
    "An alarm rises when a figure is beyond its limit at several probes in a row, and falls when "
    "it is well within it at as many."
)
CLIPS_NOTE = (
    "The same prompts and the same noise at every probe, made in the student's few steps with "
    "averaged weights. Several seeds lie side by side."
)
HEALTH_NOTE = (
    "Measured on those clips and by the run's own networks; no learnt judge. Dashed: the "
    "teacher's own clips."
)


def heading(run: RunRecords) -> str:
    """Name, state, progress and the figures that matter most."""
    state, steps = run.state, run.steps
    share = min(1.0, run.step / steps) if steps else 0.0
    silent = (
        f'<p class="bad" data-silent="{SILENT_MIN}" hidden>The page says running, but nothing was '
        f"written for a while: look whether the process is alive.</p>"
        if state == "running"
        else ""
    )
    last = run.history[-1].words if run.history else ""
    return (
        f"<h1>{text(run.name)}</h1><p>{badge(state, TONES.get(state, 'calm'))} "
        f'last written {stamp(run.heard)}<span data-since="{run.heard:.0f}"></span></p>'
        f"{f'<p>{text(last)}</p>' if last else ''}{silent}"
        f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>{tiles(facts(run))}'
    )


def facts(run: RunRecords) -> list[tuple[str, str, str]]:
    """What stands in the tiles."""
    pace = [value for _, value in run.points("seconds_per_step")][-20:]
    seconds = statistics.median(pace) if pace else None
    left = (run.steps or run.step) - run.step
    found = [("step", f"{run.step}", f"of {run.steps}" if run.steps else "")]
    if seconds is not None:
        found.append(("speed", f"{seconds:.3g} s", "per step, without saving and probing"))
        if run.state in ("running", "stopped") and left > 0:
            found.append(("time left", duration(left * seconds), f"for {left} steps"))
    if run.health:
        last = run.health[-1]
        score, up = last.get("score"), last.get("alarms") or []
        if isinstance(score, int | float):
            found.append(("health", f"{score:.2f}", "of 1, how near clips are to the teacher's"))
        found.append(("alarms", str(len(up)), "up at the newest probe"))
    for name, points in losses(run).items():
        found.append((name, f"{points[-1][1]:.4g}", "newest value"))
    return found


def losses(run: RunRecords) -> dict[str, list[tuple[float, float]]]:
    """The losses by their names."""
    names = sorted({name for row in run.metrics for name in row if name.endswith("/loss")})
    return {name.replace("/", " "): run.points(name) for name in names}


def alarms(run: RunRecords) -> str:
    """Those that are up, and when any rose or fell."""
    if not run.health:
        return (
            "<p>Health is not probed in this run. <code>health.every=200</code> samples it every "
            "200 steps, and watches for collapse, saturation, a lagging critic and more.</p>"
        )
    up = "".join(
        f'<div class="alarm"><p><b>{text(alarm_name(alarm["name"]))}</b> since step '
        f"{text(alarm['since'])}</p><p>{text(alarm['seen'])}.</p>"
        f'<p class="soft">What usually helps: {text(alarm["advice"])}</p></div>'
        for alarm in run.health[-1].get("alarms") or []
    )
    events = [
        [str(row["step"]), text(alarm_name(name)), how]
        for row in run.health
        for how, key in (("rose", "rose"), ("fell", "fell"))
        for name in row.get(key) or []
    ]
    none = f"<p>{badge('none is up', 'good')} after {len(run.health)} probes</p>"
    history = folded("All rises and falls", table(["step", "alarm", ""], events)) if events else ""
    return (up or none) + history


def alarm_name(name: str) -> str:
    """An alarm's name in words."""
    return name.replace("_", " ")


def clips(run: RunRecords) -> str:
    """Probes over time beside the teacher's; without probes the newest pictures of validation."""
    steps = spread_out(probes(run.folder), SHOWN)
    if not steps:
        sheets = sorted((run.folder / "samples").glob("step_*.png"))
        small = [sheet for sheet in sheets if sheet.stat().st_size <= SHEET_BYTES]
        if not small:
            return ""
        return f"<p>{text(small[-1].stem.replace('_', ' '))}</p>" + picture(small[-1], "samples")
    folder = run.folder / "health"
    names = {f"step {step}": f"step_{step:06d}" for step in steps}
    if (folder / "teacher").is_dir():
        names = {"teacher": "teacher", **names}
    count = len(list((folder / names[f"step {steps[-1]}"]).glob("*.mp4")))
    rows = {}
    for i, prompt in enumerate(prompts(run, count)):
        rows[prompt] = [
            video(folder / place / f"{i}.mp4", f"{prompt}: {name}") for name, place in names.items()
        ]
    return f'<div class="wide">{gallery([text(name) for name in names], rows)}</div>'


def prompts(run: RunRecords, count: int) -> list[str]:
    """What the clips of a probe were asked for."""
    path = run.folder / "health" / "prompts.json"
    try:
        found = [str(prompt) for prompt in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        found = []
    return found[:count] + [f"prompt {i}" for i in range(len(found), count)]


def curves(run: RunRecords) -> str:
    """Metrics of the training."""
    found = []
    names = sorted({name for row in run.metrics for name in row} - {"step", *MACHINE})
    left = list(names)
    for ending, label in CURVES.items():
        own = [name for name in names if name.endswith(f"/{ending}")]
        left = [name for name in left if name not in own]
        lines = [
            Line(name.removesuffix(f"/{ending}"), run.points(name), smooth=ending != "lr")
            for name in own
        ]
        found.append(plot(lines, x_label="step", y_label=label))
    for name in left:
        line = Line(name, run.points(name), smooth=True)
        found.append(
            plot([line], x_label="step", y_label=name.replace("/", ": ").replace("_", " "))
        )
    return plots(found)


def health(run: RunRecords) -> str:
    """The score, and each figure beside the teacher's."""
    if not run.health:
        return ""
    scores = [
        (float(row["step"]), float(row["score"]))
        for row in run.health
        if isinstance(row.get("score"), int | float)
    ]
    found = [
        plot(
            [Line("health score", scores, dots=True)],
            x_label="step",
            y_label="health score (1 = as the teacher)",
        )
    ]
    for name, (label, meaning) in FIGURES.items():
        points = run.figure(name)
        lines = [Line("student", points, dots=True)]
        theirs = run.reference.get(name)
        if theirs is not None and points:
            ends = [(points[0][0], theirs), (points[-1][0], theirs)]
            lines.append(Line("teacher", ends, dashed=True))
        found.append(plot(lines, x_label="step", y_label=label, about=f"{label}: {meaning}"))
    roles = [
        Line(role, run.figure(f"{role}_change"), dots=True) for role in ("generator", "critic")
    ]
    found.append(plot(roles, x_label="step", y_label="change of weights since the last probe"))
    meanings = "".join(f"<dt>{text(a)}</dt><dd>{text(b)}</dd>" for a, b in FIGURES.values())
    return plots(found) + folded("What these are", f"<dl>{meanings}</dl>")


def plots(found: Sequence[str]) -> str:
    """Plots side by side, those that are not empty."""
    kept = "".join(found)
    return f'<div class="plots">{kept}</div>' if kept else ""


def machine(run: RunRecords) -> str:
    """Speed and memory as measured and as planned, and what the run ran on."""
    found = [
        plot([Line(label, run.points(name), smooth=True)], x_label="step", y_label=label)
        for name, label in MACHINE.items()
    ]
    started = [
        [stamp(event.time), str(event.step), *(text(v) for v in fact_words(event.facts))]
        for event in run.starts
    ]
    starts = (
        table(["start", "step", "version", "device", "layout", "machine"], started)
        if started
        else ""
    )
    return against_plan(run) + plots(found) + starts


def fact_words(facts: Mapping[str, Any] | None) -> list[str]:
    """What a start says of its machine."""
    known = facts or {}
    return [str(known.get(name, "")) for name in ("version", "device", "layout", "machine")]


def against_plan(run: RunRecords) -> str:
    """Planned and measured speed and memory, if a plan lies in the log directory."""
    if not run.plan:
        return (
            '<p class="soft">To compare with a plan, write one here: <code>python train.py ... '
            "--plan --plan_json LOGDIR/plan.json</code>.</p>"
        )
    pace = [value for _, value in run.points("seconds_per_step")][-20:]
    memory = [value for _, value in run.points("peak_memory_gib")]
    planned = run.plan.get("memory_bytes"), run.plan.get("step_seconds")
    rows = [
        ["seconds per step", number(planned[1]), number(statistics.median(pace) if pace else None)],
        [
            "memory per GPU, GiB",
            number(planned[0] / 2**30 if isinstance(planned[0], int | float) else None),
            number(max(memory) if memory else None),
        ],
    ]
    for row in rows:
        row[0] = text(row[0])
    where = f"planned for {run.plan.get('gpus', '?')} x {run.plan.get('gpu', '?')}"
    return table(["", text(where), "measured"], rows)


def settings(run: RunRecords) -> str:
    """All settings, and what changed from start to start."""
    starts = run.starts
    rows = [
        [
            f"step {after.step}",
            f"<code>{text(key)}</code>",
            f"<code>{text(old)}</code>",
            f"<code>{text(new)}</code>",
        ]
        for before, after in pairwise(starts)
        for key, (old, new) in changed(before.settings or {}, after.settings or {}).items()
    ]
    if rows:
        changes = "<h3>Changed when the run went on</h3>" + table(
            ["at", "setting", "was", "is"], rows
        )
    else:
        changes = (
            f"<p>{len(starts)} start{'s' if len(starts) != 1 else ''}, no setting was changed.</p>"
            if starts
            else ""
        )
    if run.settings:
        return changes + folded("All settings", settings_table(run.settings))
    path = run.folder / "config.yaml"
    if not path.is_file():
        return changes
    content = path.read_text(encoding="utf-8", errors="replace")
    return changes + folded("config.yaml", f"<pre>{text(content)}</pre>")
