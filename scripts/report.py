"""Turn a finished quickstart into summary.json and report.html: clips, table and plots."""

from __future__ import annotations

import argparse
import base64
import html
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch

from utils import start
from utils.cli import USER_ERRORS, command_parser, fail, interruptible
from utils.config import ConfigError
from utils.files import write_text
from utils.records import read_json_lines, read_mapping, read_rows

ROW_KEYS = (
    "sampler", "steps", "cfg_scale", "network_evaluations", "adherence", "validity", "both",
    "both_stderr", "frechet_features", "frechet_latents", "seconds_per_clip", "colour", "shape",
    "direction", "speed", "background", "psnr_db", "psnr_db_stderr", "contrast",
    "contrast_stderr", "diversity", "adherence_stderr", "validity_stderr", "clips",
)  # fmt: skip
TITLES = {
    "sampler": "sampler", "steps": "steps", "cfg_scale": "CFG", "network_evaluations": "NFE",
    "adherence": "adherence %", "validity": "valid %", "both": "both %", "both_stderr": "&plusmn;",
    "psnr_db": "PSNR dB", "contrast": "contrast", "diversity": "diversity",
    "frechet_features": "FD features", "frechet_latents": "FD latents",
    "seconds_per_clip": "s / clip",
}  # fmt: skip
ROWS = "rows that were measured; remove it to measure them again"  # what rows.json holds
NEEDED = ("sampler", "adherence", "both", "clips")  # of any row
PERCENT = ("adherence", "validity", "both", "both_stderr")
# Frozen before the first figures of this world were quoted; shares of clips.
TARGETS = {"teacher_adherence": 0.9, "teacher_both": 0.8, "few_step_both": 0.2, "ratio": 0.9}

TARGET_NAMES = {
    "teacher_adherence": "teacher, 50 steps, clips that follow their caption: at least",
    "teacher_both": "teacher, 50 steps, clips that also are valid: at least",
    "few_step_both": "teacher, 4 Euler steps, the same: at most",
    "ratio": "student, 4 steps, as a share of its teacher at 50: at least",
}


def parser() -> argparse.ArgumentParser:
    """The command line of report.py."""
    result = command_parser(__doc__)
    result.add_argument("--run_folder", type=Path, required=True, help="what quickstart.sh made")
    return result


def made(path: Path) -> Path:
    """A file that is there. Raises ConfigError if the stage that writes it did not run."""
    if not path.is_file():
        raise ConfigError(f"{path}: missing; let scripts/quickstart.sh finish first")
    return path


def read_measured(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation. Raises ConfigError if they are not there, or damaged."""
    rows = read_rows(made(path), ROWS)
    for row in rows:
        lacking = [name for name in NEEDED if name not in row]
        if lacking:
            raise ConfigError(f"{path}: not {ROWS}: a row lacks {', '.join(lacking)}")
    return rows


def find(rows: Sequence[dict[str, Any]], sampler: str, steps: int) -> dict[str, Any]:
    """The row of a sampler; a teacher's with guidance. Raises ConfigError if it is not there."""
    for row in rows:
        guided = sampler == "student" or row.get("cfg_scale") != 1.0
        if row["sampler"] == sampler and row.get("steps") == steps and guided:
            return row
    raise ConfigError(
        f"rows.json: has no row of {sampler} in {steps} steps; let scripts/evaluate.py finish first"
    )


def summarise(folder: Path) -> dict[str, Any]:
    """All figures of a run, and whether they reach the targets."""
    rows = read_measured(folder / "evaluation" / "rows.json")
    teacher, few = find(rows, "teacher_euler", 50), find(rows, "teacher_euler", 4)
    student = find(rows, "student", 4)
    ratio = student["both"] / teacher["both"] if teacher["both"] else 0.0
    stages: dict[str, float] = {}
    for entry in read_json_lines(folder / "timings.jsonl", "timings of stages"):
        stages[entry["stage"]] = stages.get(entry["stage"], 0.0) + entry["seconds"]
    return {
        "rows": [{key: row[key] for key in ROW_KEYS if key in row} for row in rows],
        "ratio_student_teacher": ratio,
        "targets_reached": {
            "teacher_adherence": teacher["adherence"] >= TARGETS["teacher_adherence"],
            "teacher_both": teacher["both"] >= TARGETS["teacher_both"],
            "few_step_both": few["both"] <= TARGETS["few_step_both"],
            "ratio": ratio >= TARGETS["ratio"],
        },
        "targets": TARGETS,
        "stage_seconds": stages,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def inline(path: Path, kind: str) -> str:
    """A file as a data URL, so that the report is one file."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an HTML table."""

    def cell(row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        if value is None:
            return "<td></td>"
        if name in PERCENT:
            return f"<td>{100.0 * value:.1f}</td>"
        return f"<td>{value:.3g}</td>" if isinstance(value, float) else f"<td>{value}</td>"

    head = "".join(f"<th>{title}</th>" for title in TITLES.values())
    body = "".join(
        f'<tr class="{row["sampler"]}">{"".join(cell(row, name) for name in TITLES)}</tr>'
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def clips(folder: Path) -> str:
    """The same captions by each sampler, as videos side by side."""
    index = read_mapping(made(folder / "index.json"), "an index of clips")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in index["samplers"])
    lines = []
    for i, caption in enumerate(index["captions"]):
        files = [folder / f"{name.replace(' ', '_')}-{i}.mp4" for name in index["samplers"]]
        cells = "".join(
            f'<td><video autoplay loop muted playsinline src="{inline(file, "video/mp4")}">'
            "</video></td>"
            for file in files
        )
        lines.append(f"<tr><td>{html.escape(caption)}</td>{cells}</tr>")
    return f'<table class="clips"><tr><th></th>{head}</tr>{"".join(lines)}</table>'


STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #2a78d624; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left }
tr.student td { background: var(--mark); font-weight: 600 }
.clips td, .clips th { text-align: center; border: 0 } .clips td:first-child { max-width: 14rem }
video { width: 176px; image-rendering: pixelated; border-radius: 6px }
img { max-width: 100%; background: #fff; border-radius: 6px }
.scroll { overflow-x: auto } .big { font-size: 1.15rem } code { font-size: 13px }
"""


def page(folder: Path, summary: dict[str, Any]) -> str:
    """The whole report as one HTML file."""
    rows = summary["rows"]
    teacher, student = find(rows, "teacher_euler", 50), find(rows, "student", 4)
    few = find(rows, "teacher_euler", 4)
    reached = "".join(
        f"<li>{TARGET_NAMES[name]} {summary['targets'][name]:.0%}: "
        f"{'reached' if ok else 'NOT reached'}</li>"
        for name, ok in summary["targets_reached"].items()
    )
    stages = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{seconds:.0f}</td></tr>"
        for name, seconds in summary["stage_seconds"].items()
    )
    plots = "".join(
        f'<h3>{role}</h3><img alt="metrics of the {role} run" src="{inline(path, "image/png")}">'
        for role in ("teacher", "student")
        if (path := folder / "evaluation" / f"{role}_run.png").is_file()
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Fewstep quickstart</title><style>{STYLE}</style>
<h1>From {teacher["network_evaluations"]} network evaluations to 4</h1>
<p class="big">Clips that follow their caption and are valid: teacher, {teacher["steps"]} steps with
guidance <b>{teacher["both"]:.1%}</b>; the same teacher in 4 Euler steps <b>{few["both"]:.1%}</b>;
student, 4 steps without guidance <b>{student["both"]:.1%}</b>
({summary["ratio_student_teacher"]:.2f} of its teacher).</p>
<ul>{reached}</ul>
<h2>Side by side</h2><div class="scroll">{clips(folder / "evaluation" / "clips")}</div>
<h2>Every sampler</h2><div class="scroll">{table(rows)}</div>
<p>NFE: network evaluations per clip. Shares are of {student["clips"]} clips, with their standard
error. FD: Frechet distance to real clips, lower is nearer; diversity: spread of the free start
position. Judged in closed form by utils/tiny_world/checker.py.</p>
<h2>The runs</h2>{plots}
<h2>Time</h2><table><tr><th>stage</th><th>seconds</th></tr>{stages}</table>
<p>{html.escape(summary["machine"])}</p></html>
"""


def methods_page(folder: Path, table: str) -> str:
    """What compare_methods.py found, its table and all clips, as one HTML file."""
    index = json.loads((folder / "clips" / "index.json").read_text(encoding="utf-8"))
    head = "".join(f"<th>{html.escape(caption)}</th>" for caption in index["captions"])
    lines = []
    for number, name in enumerate(index["methods"]):
        files = [folder / "clips" / f"{number}-{i}.mp4" for i in range(len(index["captions"]))]
        cells = "".join(
            f'<td><video autoplay loop muted playsinline src="{inline(file, "video/mp4")}">'
            "</video></td>"
            for file in files
        )
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) + "</tr>"
        for line in table.splitlines()
        if "---" not in line and (row := line.strip("|").split("|"))
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Fewstep methods</title><style>{STYLE}</style>
<h1>One teacher, every method</h1>
<div class="scroll"><table>{body}</table></div>
<h2>Side by side</h2>
<div class="scroll"><table class="clips"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>
</html>
"""


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Write both files and print the headline."""
    args = parser().parse_args(arguments)
    try:
        summary = summarise(args.run_folder)
        write_text(args.run_folder / "summary.json", json.dumps(summary, indent=1))
        write_text(args.run_folder / "report.html", page(args.run_folder, summary))
    except USER_ERRORS as error:
        return fail(error)
    for name, ok in summary["targets_reached"].items():
        print(f"{name}: {'reached' if ok else 'NOT reached'}")
    print(f"student / teacher: {summary['ratio_student_teacher']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
