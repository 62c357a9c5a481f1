"""Time a run's training steps and say where the time goes; nothing is saved.

Prints seconds per outer step, peak memory, and the share of each part of a step.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.base import Trainer
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from utils import start
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.distributed import Session, distributed_session

PARTS = (
    "data", "generator loss", "generator backward", "critic loss", "critic backward", "clip",
    "optimizer", "average",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line of benchmark.py."""
    result = command_parser(__doc__)
    result.add_argument("--config_path", type=Path, required=True)
    result.add_argument("--timed_steps", type=int, default=12, help="after as many for warm-up")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def run_steps(trainer: Trainer, session: Session, count: int) -> float:
    """Run `count` outer steps; returns seconds."""
    start = time.perf_counter()
    for _ in range(count):
        for phase in trainer.phases(trainer.state.step):
            trainer.optimise(phase)
        trainer.state.step += 1
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(trainer: Trainer, session: Session, count: int) -> str:
    """The table of one benchmark."""
    run_steps(trainer, session, count)
    seconds = run_steps(trainer, session, count) / count
    if session.device.type == "cuda":
        memory, where = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.get_device_name()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        where = f"CPU, {torch.get_num_threads()} threads"
    activities = [ProfilerActivity.CPU]
    if session.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        run_steps(trainer, session, count)
    totals = {event.key: event.cpu_time_total for event in trace.key_averages()}
    parts = {name: totals[name] for name in PARTS if name in totals}
    whole = sum(parts.values())
    lines = [
        f"{where}, torch {torch.__version__}",
        f"{1e3 * seconds:.1f} ms per outer step, peak memory {memory:.2f} GiB",
        "",
        "| part | share of a step |",
        "| --- | --- |",
        *(f"| {name} | {100.0 * time_ / whole:.1f} % |" for name, time_ in parts.items()),
    ]
    return "\n".join(lines)


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Benchmark one configuration."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    try:
        check_at_least(args, timed_steps=1)
        config = load(args.config_path, [*args.overrides, "validation.every=0"])
    except USER_ERRORS as error:
        return fail(error)
    with distributed_session() as session, tempfile.TemporaryDirectory() as folder:
        start_logging(main_rank=session.is_main)
        options = RunOptions(Path(folder), args.config_path.stem, save=False, wandb=False)
        try:
            trainer = build_trainer(config, session, options)
        except USER_ERRORS as error:
            return fail(error)
        text = report(trainer, session, args.timed_steps)
        if session.is_main:
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
