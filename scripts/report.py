"""Pages that are one file: of a run's log directory, of runs side by side, of a quickstart."""

from __future__ import annotations

import argparse
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
from utils.media.preview import save_animation
from utils.media.video import read_video
from utils.records import read_json_lines, read_mapping, read_rows
from utils.tiny_world.world import FPS
from utils.web.report.compare import compare_page
from utils.web.report.elements import gallery, page, section, table, text, video
from utils.web.report.quickstart import quickstart_page
from utils.web.report.records import read_run
from utils.web.report.run import write_report

ROW_KEYS = (
    "sampler", "steps", "cfg_scale", "network_evaluations", "adherence", "validity", "both",
    "both_stderr", "frechet_features", "frechet_latents", "seconds_per_clip", "colour", "shape",
    "direction", "speed", "background", "psnr_db", "psnr_db_stderr", "contrast",
    "contrast_stderr", "diversity", "adherence_stderr", "validity_stderr", "clips", "seed",
)  # fmt: skip
ANIMATED = 3  # captions in the moving picture
ROWS = "rows that were measured; remove it to measure them again"  # what rows.json holds
NEEDED = ("sampler", "adherence", "both", "clips")  # of any row
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
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--logdir", type=Path, help="of a run, whose report.html is rebuilt")
    what.add_argument(
        "--compare", type=Path, nargs="+", metavar="LOGDIR", help="log directories, side by side"
    )
    what.add_argument("--run_folder", type=Path, help="what quickstart.sh made")
    result.add_argument(
        "--output_path", type=Path, default=None, help="of --compare (default: compare.html)"
    )  # fmt: skip
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


def methods_page(folder: Path, table_text: str) -> str:
    """What compare_methods.py found, its table and all clips, as one HTML file."""
    index = json.loads((folder / "clips" / "index.json").read_text(encoding="utf-8"))
    captions = [text(caption) for caption in index["captions"]]
    shown = {}
    for number, name in enumerate(index["methods"]):
        files = [folder / "clips" / f"{number}-{i}.mp4" for i in range(len(captions))]
        shown[name] = [video(file, name) for file in files]
    rows = [
        [text(cell.strip()) for cell in line.strip("|").split("|")]
        for line in table_text.splitlines()
        if "---" not in line and line
    ]
    parts = [
        "<h1>One teacher, every method</h1>",
        section("Figures", table(rows[0], rows[1:])),
        section("Side by side", gallery(captions, shown)),
    ]
    return page("Fewstep methods", "".join(parts))


def write_animation(folder: Path, index: dict[str, Any], target: Path) -> None:
    """The first clips of each sampler as one moving picture, for a README."""
    names = list(index["samplers"])
    rows = [
        [read_video(made(folder / f"{name.replace(' ', '_')}-{i}.mp4")) for name in names]
        for i in range(min(ANIMATED, len(index["captions"])))
    ]
    save_animation(rows, names, target, fps=FPS)


def write_quickstart(folder: Path) -> None:
    """Write the pages and pictures of a finished quickstart, and print the headline."""
    summary = summarise(folder)
    clips = folder / "evaluation" / "clips"
    index = read_mapping(made(clips / "index.json"), "an index of clips")
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    write_text(folder / "report.html", quickstart_page(folder, summary, index, TARGET_NAMES))
    write_animation(clips, index, folder / "clips.webp")
    for name, ok in summary["targets_reached"].items():
        print(f"{name}: {'reached' if ok else 'NOT reached'}")
    print(f"student / teacher: {summary['ratio_student_teacher']:.3f}")


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page that was asked for."""
    args = parser().parse_args(arguments)
    try:
        if args.run_folder is not None:
            write_quickstart(args.run_folder)
        elif args.logdir is not None:
            print(write_report(args.logdir))
        else:
            runs = [read_run(folder) for folder in args.compare]
            path = args.output_path or Path("compare.html")
            write_text(path, compare_page(runs))
            print(path)
    except USER_ERRORS as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
