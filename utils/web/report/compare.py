"""Runs side by side on one page: the same curves, clips and settings of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from utils.provenance import stamp
from utils.web.report.elements import badge, gallery, page, section, table, text, video
from utils.web.report.plots import Line, plot
from utils.web.report.records import RunRecords, probes
from utils.web.report.run import FIGURES, TONES, alarm_name, plots, prompts


def compare_page(runs: Sequence[RunRecords]) -> str:
    """The whole page; the first run is what others are compared with."""
    names = labels(runs)
    parts = [
        f"<h1>{text(' and '.join(names))}</h1>",
        section("Where they stand", standing(runs, names)),
        section("Clips", clips(runs, names), "The newest probe of each run, the same prompts."),
        section("Health", health(runs, names), "Dashed: the first run's teacher."),
        section("Training", training(runs, names), "Faint: as logged; bold: a running average."),
        section("Settings that differ", settings(runs, names)),
        f'<p class="soft">Written {stamp()} by Fewstep.</p>',
    ]
    return page("Fewstep runs compared", "".join(parts))


def labels(runs: Sequence[RunRecords]) -> list[str]:
    """The runs' names; those that are called alike, by their folders."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def standing(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """State, steps, speed, score and alarms of each."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        last = run.health[-1] if run.health else {}
        score = last.get("score")
        best = max(
            (row["score"] for row in run.health if row.get("score") is not None), default=None
        )
        pace = run.points("seconds_per_step")
        up = ", ".join(alarm_name(alarm["name"]) for alarm in last.get("alarms") or [])
        rows.append(
            [
                text(name),
                badge(run.state, TONES.get(run.state, "calm")),
                f"{run.step}{f' of {run.steps}' if run.steps else ''}",
                f"{pace[-1][1]:.3g}" if pace else "",
                "" if score is None else f"{score:.3f}",
                "" if best is None else f"{best:.3f}",
                text(up) or ("none" if run.health else "not probed"),
            ]
        )
    head = ["run", "state", "steps", "s / step", "health", "best health", "alarms"]
    return table(head, rows)


def clips(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """The newest clips of each run, prompt by prompt, the teacher's first."""
    folders = {}
    first = runs[0].folder / "health" / "teacher"
    if first.is_dir():
        folders["teacher"] = first
    for run, name in zip(runs, names, strict=True):
        steps = probes(run.folder)
        if steps:
            folders[f"{name}, step {steps[-1]}"] = run.folder / "health" / f"step_{steps[-1]:06d}"
    if not folders:
        return ""
    count = max(len(list(folder.glob("*.mp4"))) for folder in folders.values())
    rows = {
        prompt: [
            video(folder / f"{i}.mp4", f"{prompt}: {name}") for name, folder in folders.items()
        ]
        for i, prompt in enumerate(prompts(runs[0], count))
    }
    return f'<div class="wide">{gallery([text(name) for name in folders], rows)}</div>'


def health(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """Each figure of all runs in one plot."""
    found = []
    for figure, (label, _) in FIGURES.items():
        lines = [
            Line(name, run.figure(figure), dots=True) for run, name in zip(runs, names, strict=True)
        ]
        points = list(chain.from_iterable(line.points for line in lines))
        theirs = runs[0].reference.get(figure)
        if theirs is not None and points:
            ends = [(min(x for x, _ in points), theirs), (max(x for x, _ in points), theirs)]
            lines.append(Line("teacher", ends, dashed=True))
        found.append(plot(lines, x_label="step", y_label=label))
    return plots(found)


def training(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """Each metric that any run has, of all runs in one plot."""
    metrics = sorted({name for run in runs for row in run.metrics for name in row} - {"step"})
    found = []
    for metric in metrics:
        lines = [
            Line(name, run.points(metric), smooth=not metric.endswith("/lr"))
            for run, name in zip(runs, names, strict=True)
        ]
        found.append(
            plot(lines, x_label="step", y_label=metric.replace("/", ": ").replace("_", " "))
        )
    return plots(found)


def settings(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """Settings that are not the same in all runs."""
    known = [run.settings for run in runs]
    if not all(known):
        lacking = [name for name, found in zip(names, known, strict=True) if not found]
        return f"<p>Not noted by an older version: {text(', '.join(lacking))}.</p>"
    keys = sorted({key for found in known for key in found})
    rows = [
        [
            f"<code>{text(key)}</code>",
            *(f"<code>{text(found.get(key, ''))}</code>" for found in known),
        ]
        for key in keys
        if len({repr(found.get(key)) for found in known}) > 1
    ]
    return table(["setting", *map(text, names)], rows) if rows else "<p>None.</p>"
