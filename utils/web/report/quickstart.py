"""The page of a finished quickstart: a student beside its teacher, explained to a stranger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.provenance import stamp, version
from utils.web.report.elements import (
    badge,
    folded,
    gallery,
    page,
    section,
    table,
    text,
    tiles,
    video,
)
from utils.web.report.plots import Line, plot
from utils.web.report.records import METRICS, read_run
from utils.web.report.run import curves

Row = Mapping[str, Any]

SAMPLERS = {
    "real_codec": "real clips through the codec (the ceiling)",
    "teacher_euler": "teacher, first-order solver (Euler)",
    "teacher_solver2": "teacher, second-order solver (UniPC)",
    "student": "student",
}
SHOWN = {
    "real": "real clip",
    "teacher 50 steps": "teacher, 50 steps, 100 network passes",
    "teacher 4 steps": "teacher, 4 steps, 8 network passes",
    "student 4 steps": "student, 4 steps, 4 network passes",
}
TITLES = {
    "sampler": "who", "steps": "steps", "cfg_scale": "guidance", "network_evaluations": "passes",
    "adherence": "adherence %", "validity": "valid %", "both": "both %", "both_stderr": "&plusmn;",
    "psnr_db": "PSNR dB", "contrast": "contrast", "diversity": "diversity",
    "frechet_features": "FD features", "frechet_latents": "FD latents",
    "seconds_per_clip": "s / clip",
}  # fmt: skip
PERCENT = ("adherence", "validity", "both", "both_stderr")
MEANINGS = {
    "adherence": "Share of clips in which all five things that the caption fixes - colour, shape, "
    "direction, speed and background - are read off the clip as the caption has them.",
    "valid": "Share of clips that this world could contain: drawn anew from what was read off, a "
    "clip comes back with a PSNR of 20 dB or more (so nothing is blurred or noisy), and its floor "
    "has 85 % to 125 % of a real floor's contrast.",
    "both": "Share of clips that follow their caption and are valid: the figure that counts.",
    "guidance": "How much the prompt is exaggerated (classifier-free guidance): 1 is not at all, "
    "and costs one network pass per step; anything else costs two.",
    "passes": "How often the network runs for one clip: what sampling costs.",
    "contrast": "Spread of the floor's grey cells, 1 = as in real clips.",
    "diversity": "Spread of where shapes start, which captions leave free: low = clips repeat.",
    "FD": "Frechet distance to real clips, lower is nearer: in five features that the checker "
    "reads, and in 48 principal components of the latents.",
    "PSNR": "How near clips are to a clean rendering of what they show, in decibels.",
}
LOSS_OF_CONTRAST = (
    "A clip of the teacher in 4 steps looks fine at a glance, and is not: too large steps of a "
    "first-order solver shrink every random variable, here the floor's grey cells, by a factor "
    "that is known in closed form. So shapes are right and the floor is too flat, which the "
    "checker measures and the eye forgives."
)


def quickstart_page(
    folder: Path, summary: Mapping[str, Any], index: Mapping[str, Any], goals: Mapping[str, str]
) -> str:
    """The whole page. index: of the clips; goals: what each target says, by its name."""
    rows: Sequence[Row] = summary["rows"]
    teacher, few, student = (_row(rows, *which) for which in HEADLINE)
    parts = [
        lead(teacher, few, student, summary),
        section("Quality against network passes", passes_plot(rows), PASSES_NOTE),
        section("Side by side", clips(folder / "evaluation" / "clips", index), CLIPS_NOTE),
        section("What the figures mean", meanings(few)),
        section("Every way of sampling", sampler_table(rows), table_note(student)),
        section("Targets", targets(summary, goals)),
        section("The runs", runs(folder)),
        section("What next", NEXT.format(folder=text(folder))),
        section("Where this comes from", origin(folder, summary, student)),
    ]
    return page("Fewstep quickstart", "".join(parts))


HEADLINE = (("teacher_euler", 50), ("teacher_euler", 4), ("student", 4))
PASSES_NOTE = (
    "Each point is one way of sampling, judged on the same captions. Up and to the left is better: "
    "more clips that follow their caption and are valid, for fewer passes of the network."
)
CLIPS_NOTE = (
    "One caption per row, the same for all. Under each clip: whether it passes, or why not."
)
NEXT = """<p>Try the student in a browser:</p>
<pre>python demo.py --config_path configs/tiny/dmd.yaml --checkpoint_path {folder}/student \\
    --use_ema --fps 8 model_root={folder}/wan_models data.path={folder}/data/prompts.txt</pre>
<p>Then: another method on the same teacher (<code>docs/methods.md</code>), your own videos
(<code>docs/data.md</code>), a released model and a GPU: what it takes is told by
<code>python train.py --config_path configs/self_forcing_dmd.yaml --plan</code>
(<code>docs/scaling.md</code>).</p>"""


def _row(rows: Sequence[Row], sampler: str, steps: int) -> Row:
    """The row of a sampler, guided if it is a teacher's."""
    for row in rows:
        guided = sampler == "student" or row.get("cfg_scale") != 1.0
        if row["sampler"] == sampler and row.get("steps") == steps and guided:
            return row
    raise KeyError(f"{sampler} in {steps} steps")


def lead(teacher: Row, few: Row, student: Row, summary: Mapping[str, Any]) -> str:
    """The result in three figures."""
    facts = [
        (
            f"teacher, {passes(teacher)} passes",
            f"{teacher['both']:.1%}",
            "of clips follow their caption and are valid",
        ),
        (f"teacher, {passes(few)} passes", f"{few['both']:.1%}", "the same, in 4 Euler steps"),
        (f"student, {passes(student)} passes", f"{student['both']:.1%}", "the same, in 4 steps"),
        (
            "student / teacher",
            f"{summary['ratio_student_teacher']:.2f}",
            f"as good, with {passes(student)} passes instead of {passes(teacher)}; 1 = equally",
        ),
    ]
    return (
        f"<h1>From {passes(teacher)} network passes per clip to {passes(student)}</h1>"
        '<p class="lead">A small video model (the teacher) was trained on a tiny world of moving '
        "shapes, and a student was distilled from it that needs a fraction of the work. All of it "
        f"ran on this machine.</p>{tiles(facts)}"
    )


def passes(row: Row) -> str:
    """How often the network runs per clip; ? in files of before it was noted."""
    return str(row.get("network_evaluations") or "?")


def passes_plot(rows: Sequence[Row]) -> str:
    """Share of good clips over network passes, a line per way of sampling."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        count = row.get("network_evaluations")
        if not isinstance(count, int | float):
            continue
        groups.setdefault(who(row), []).append((float(count), 100.0 * row["both"]))
    order = sorted(groups, key=lambda name: (not name.startswith("student"), name))
    lines = [Line(name, sorted(groups[name]), dots=True) for name in order]
    drawn = plot(
        lines,
        x_label="network passes per clip (logarithmic)",
        y_label="good clips, %",
        log_x=True,
        about="share of clips that follow their caption and are valid, over network passes",
    )
    return f'<div class="single">{drawn}</div>'


def who(row: Row) -> str:
    """A way of sampling in words."""
    name = SAMPLERS.get(row["sampler"], str(row["sampler"]))
    if not row["sampler"].startswith("teacher"):
        return name
    return f"{name}, {'not guided' if row.get('cfg_scale') == 1.0 else 'guided'}"


def clips(folder: Path, index: Mapping[str, Any]) -> str:
    """The same captions by each sampler, each with a tick or with what is wrong."""
    names, faults = list(index["samplers"]), index.get("faults") or {}
    rows = {}
    for i, caption in enumerate(index["captions"]):
        rows[str(caption)] = [
            video(folder / f"{name.replace(' ', '_')}-{i}.mp4", f"{caption}: {name}")
            + verdict(faults.get(name), i)
            for name in names
        ]
    return gallery([text(SHOWN.get(name, name)) for name in names], rows)


def verdict(faults: Sequence[Sequence[str]] | None, index: int) -> str:
    """A tick, or why a clip failed; nothing where nobody looked."""
    if faults is None or index >= len(faults):
        return ""
    if not faults[index]:
        return f"<div>{badge('passes', 'good').replace('passes', '&#10003; passes')}</div>"
    words = "; ".join(map(str, faults[index]))
    return f'<div class="bad">&#10007; <span class="soft">{text(words)}</span></div>'


def meanings(few: Row) -> str:
    """The words of the table, and why few steps fail."""
    listed = "".join(f"<dt>{text(a)}</dt><dd>{text(b)}</dd>" for a, b in MEANINGS.items())
    contrast = few.get("contrast")
    told = f" Here its floors keep {contrast:.0%} of a real floor's contrast." if contrast else ""
    return f"<dl>{listed}</dl><p>{text(LOSS_OF_CONTRAST + told)}</p>"


def sampler_table(rows: Sequence[Row]) -> str:
    """All rows; the student's stand out."""
    shown = [name for name in TITLES if any(row.get(name) is not None for row in rows)]
    cells = [[_cell(row, name) for name in shown] for row in rows]
    marked = [row["sampler"] == "student" for row in rows]
    return table([TITLES[name] for name in shown], cells, marked=marked)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if name == "sampler":
        return text(SAMPLERS.get(str(value), value))
    if value is None:
        return ""
    if name in PERCENT:
        return f"{100.0 * value:.1f}"
    return f"{value:.3g}" if isinstance(value, float) else text(value)


def table_note(student: Row) -> str:
    """Whom the shares are of."""
    return (
        f"Shares are of {student['clips']} clips, with their standard error (&plusmn;). All is "
        "judged in closed form by <code>utils/tiny_world/checker.py</code>; nothing learnt judges."
    )


def targets(summary: Mapping[str, Any], goals: Mapping[str, str]) -> str:
    """What was to be reached, set before the first figures."""
    rows = [
        [text(goals[name]), f"{summary['targets'][name]:.0%}",
         badge("reached", "good") if ok else badge("not reached", "bad")]
        for name, ok in summary["targets_reached"].items()
    ]  # fmt: skip
    return table(["target", "", ""], rows)


def runs(folder: Path) -> str:
    """The curves of both trainings."""
    found = []
    for role in ("teacher", "student"):
        if (folder / role / METRICS).is_file():
            found.append(f"<h3>{role}</h3>" + curves(read_run(folder / role)))
            if (folder / role / "report.html").is_file():
                link = f"{role}/report.html"
                found.append(f'<p class="soft">More: <a href="{link}">{link}</a></p>')
    return "".join(found)


def origin(folder: Path, summary: Mapping[str, Any], student: Row) -> str:
    """Version, seed, date, machine, time per stage and settings."""
    facts = [
        ["version", text(version())],
        ["seed", text(student.get("seed", ""))],
        ["written", stamp()],
        ["machine", text(summary["machine"])],
    ]
    stages = [
        [text(name), f"{seconds:.0f} s"] for name, seconds in summary["stage_seconds"].items()
    ]
    found = table(["", ""], facts) + folded("Time per stage", table(["stage", "time"], stages))
    for role in ("teacher", "student"):
        path = folder / role / "config.yaml"
        if path.is_file():
            content = text(path.read_text(encoding="utf-8", errors="replace"))
            found += folded(f"Settings of the {role}", f"<pre>{content}</pre>")
    return found
