"""Train the tiny world's student whole and as adapters of several ranks; one table of all.

Every run is a call of train.py that continues where it was interrupted, so this does too. Writes
rows.json, table.md and the log directories of all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from tqdm import tqdm

from scripts.evaluate import LEAST_CLIPS, fingerprint, sample
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils import checkpoint, start
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.config import ConfigError
from utils.files import write_text
from utils.metrics import read_metrics
from utils.records import read_rows
from utils.tiny_world.metrics import Exam

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 0  # the rank of a student whose whole network is trained


def parser() -> argparse.ArgumentParser:
    """The command line of compare_adapters.py."""
    result = command_parser(__doc__)
    result.add_argument(
        "--run_folder", type=Path, default=Path("runs/quickstart"),
        help="what quickstart.sh made: its world and teacher are used",
    )  # fmt: skip
    result.add_argument("--output_folder", type=Path, default=Path("runs/adapters"))
    result.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16], metavar="R")
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    result.add_argument("--clips", type=int, default=192, help="per run")
    result.add_argument("--steps", type=int, default=None, help="of every run; for a trial")
    return result


@dataclass(frozen=True)
class Student:
    """One run."""

    args: argparse.Namespace
    rank: int  # WHOLE = no adapter
    seed: int

    @property
    def name(self) -> str:
        """Of its log directory."""
        return f"{'whole' if self.rank == WHOLE else f'rank{self.rank}'}-seed{self.seed}"

    @property
    def logdir(self) -> Path:
        """Its log directory."""
        return Path(self.args.output_folder) / self.name

    @property
    def config_path(self) -> Path:
        """The configuration that it is a seed of."""
        stem = "dmd" if self.rank == WHOLE else "lora_dmd"
        return ROOT / "configs" / "tiny" / f"{stem}.yaml"

    @property
    def overrides(self) -> list[str]:
        """Where things lie, and what differs from run to run."""
        run = self.args.run_folder
        words = [f"model_root={run / 'wan_models'}", f"data.path={run / 'data' / 'prompts.txt'}"]
        words += [f"seed={self.seed}", "validation.every=0", "keep_checkpoints=1"]
        if self.rank != WHOLE:
            words += [f"{role}.adapter.rank={self.rank}" for role in ("generator", "critic")]
        return words if self.args.steps is None else [*words, f"steps={self.args.steps}"]


def students(args: argparse.Namespace) -> Iterator[Student]:
    """All runs, seed by seed."""
    for seed in args.seeds:
        for rank in (WHOLE, *args.ranks):
            yield Student(args, rank, seed)


def train(student: Student) -> None:
    """Run a student's training to its end. Its peak memory is noted beside it.

    Raises ConfigError if it stops.
    """
    words = [sys.executable, str(ROOT / "train.py"), "--config_path", str(student.config_path)]
    words += ["--logdir", str(student.logdir), *student.overrides]
    print(f"\n== {student.name}\n   {' '.join(words)}", flush=True)
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise ConfigError(f"{student.name}: stopped with status {code}; run this again to go on")
    write_text(student.logdir / "peak_kib.txt", f"{usage.ru_maxrss}\n")


def finished(student: Student) -> bool:
    """Whether a student has made all its steps."""
    newest = checkpoint.latest(student.logdir / "checkpoints")
    steps = load(student.config_path, student.overrides).steps
    return newest is not None and checkpoint.step_of(newest) >= steps


def measure(student: Student, exam: Exam) -> dict[str, Any]:
    """How well it does, and what it took."""
    config = load(student.config_path, student.overrides)
    source = check_source(config, student.logdir, use_ema=True)
    model = load_generator(source, torch.device("cpu"))
    clips, latents, _ = sample(model, exam.captions, student.args.seeds[0])
    newest = checkpoint.latest(student.logdir / "checkpoints")
    assert newest is not None, "only finished runs are measured"
    times = [row["seconds_per_step"] for row in read_metrics(student.logdir / "metrics.jsonl")]
    return {
        "rank": student.rank,
        "seed": student.seed,
        "clips": student.args.clips,
        "weights": fingerprint(model),
        **exam.judge(clips, latents),
        "checkpoint_mib": sum(f.stat().st_size for f in newest.iterdir()) / 2**20,
        "seconds_per_step": statistics.median(times),
        "peak_mib": int((student.logdir / "peak_kib.txt").read_text()) / 1024,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per rank, means over seeds and the least of them."""
    titles = [
        "trained", "both, mean", "of the whole", "worst seed", "adherence", "valid",
        "diversity", "s per step", "checkpoint MiB", "peak MiB",
    ]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    ranks = list(dict.fromkeys(row["rank"] for row in rows))

    def mean(rank: int, key: str) -> float:
        return statistics.fmean(row[key] for row in rows if row["rank"] == rank)

    for rank in ranks:
        name = "all weights" if rank == WHOLE else f"rank {rank}"
        both = mean(rank, "both")
        whole = mean(WHOLE, "both") if WHOLE in ranks else float("nan")
        worst = min(row["both"] for row in rows if row["rank"] == rank)
        cells = [name, f"{both:.3f}", f"{both / whole:.3f}" if whole else "-", f"{worst:.3f}"]
        cells += [f"{mean(rank, key):.3f}" for key in ("adherence", "validity", "diversity")]
        cells += [f"{mean(rank, 'seconds_per_step'):.3f}", f"{mean(rank, 'checkpoint_mib'):.1f}"]
        lines.append(f"| {' | '.join([*cells, format(mean(rank, 'peak_mib'), '.0f')])} |")
    return "\n".join(lines) + "\n"


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not trained, measure what is not measured, print the table."""
    args = parser().parse_args(arguments)
    start_logging()
    try:
        check_at_least(args, clips=LEAST_CLIPS)
        runs = list(students(args))
        for student in runs:
            if not finished(student):
                train(student)
        path = args.output_folder / "rows.json"
        known = read_rows(path, "rows of students") if path.is_file() else []
        model = load_generator(
            check_source(
                load(runs[0].config_path, runs[0].overrides), runs[0].logdir, use_ema=True
            ),
            torch.device("cpu"),
        )
        exam = Exam.draw(args.clips, args.seeds[0], model.vae)
        rows = []
        for student in tqdm(runs, desc="rows"):
            same = {"rank": student.rank, "seed": student.seed, "clips": args.clips}
            found = [row for row in known if all(row.get(k) == v for k, v in same.items())]
            rows.append(found[0] if found else measure(student, exam))
            if not found:
                known.append(rows[-1])
                write_text(path, json.dumps(known, indent=1))
        text = table(rows)
        write_text(args.output_folder / "table.md", text)
    except USER_ERRORS as error:
        return fail(error)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
