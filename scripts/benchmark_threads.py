"""Time a small training step beside busy processes, for each way in which idle threads may wait.

Prints a table of medians, in milliseconds. Rounds go through all cells in turn, so that whatever
else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch

from model.types import Conditioning
from model.wan.config import PRESETS
from model.wan.transformer import WanTransformer, initial_value
from model.wan_wrapper import WanDiffusionWrapper
from utils import start
from utils.cli import USER_ERRORS, command_parser, fail, interruptible
from utils.config import ConfigError
from utils.seeding import generator
from utils.shipped import ROOT
from utils.weights import fill_weights

# Environments of the step, by what the table calls them. The commands of this project choose the
# second, unless their user says otherwise (utils/start.py).
WAITING = {
    "2 threads, libgomp's own waiting": {"OMP_NUM_THREADS": "2"},
    f"2 threads, GOMP_SPINCOUNT={start.SPINS}": {
        "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": start.SPINS,
    },
    "2 threads, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}  # fmt: skip
CHILD = "from scripts.benchmark_threads import timed_steps; print(timed_steps({steps}, {batch}))"


def parser() -> argparse.ArgumentParser:
    """The command line of benchmark_threads.py."""
    result = command_parser(__doc__)
    result.add_argument("--neighbours", type=int, nargs="+", default=[0, 1], metavar="N")
    result.add_argument("--rounds", type=int, default=5, help="medians are over these")
    result.add_argument("--steps", type=int, default=12, help="timed in each round")
    result.add_argument("--batch", type=int, default=32, help="clips of the tiny world per step")
    return result


def timed_steps(steps: int, batch: int) -> float:
    """The median of `steps` training steps of the tiny transformer, in milliseconds."""
    model = WanTransformer(PRESETS["Wan2.1-T2V-Tiny"])
    fill_weights(model, lambda name, shape: initial_value(name, shape, generator(0, name)))
    network, rng = WanDiffusionWrapper(model), generator("threads")
    x = torch.randn(batch, 16, 5, 4, 4, generator=rng)
    text = torch.randn(batch, model.config.text_len, model.config.text_dim, generator=rng)
    sigma = torch.rand(batch, 1, generator=rng)
    times = []
    for _ in range(steps + 3):
        begin = time.perf_counter()
        network(x, sigma, Conditioning(text)).x0.square().mean().backward()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that only keep a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(args: argparse.Namespace, settings: dict[str, str], count: int) -> float:
    """One cell once: a process of its own, since threads are settled when torch is imported."""
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with neighbours(count):
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(steps=args.steps, batch=args.batch)],
            env={**inherited, "PYTHONPATH": path, **settings},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cells, print the table."""
    args = parser().parse_args(arguments)
    try:
        if min(args.rounds, args.steps, args.batch) < 1 or min(args.neighbours) < 0:
            raise ConfigError("--rounds, --steps, --batch: must be at least 1, --neighbours 0")
    except USER_ERRORS as error:
        return fail(error)
    cells: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for name, settings in WAITING.items():
            for count in args.neighbours:
                cells.setdefault((name, count), []).append(measure(args, settings, count))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print("| ms per step | " + " | ".join(f"{n} busy beside it" for n in args.neighbours) + " |")
    print("| --- |" + " --- |" * len(args.neighbours))
    for name in WAITING:
        found = [cells[name, count] for count in args.neighbours]
        texts = [f"{statistics.median(ms):.0f} ({min(ms):.0f} - {max(ms):.0f})" for ms in found]
        print(f"| {name} | " + " | ".join(texts) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
