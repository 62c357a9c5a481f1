"""Time what training waits for a checkpoint, and how long that takes to be on the disk.

Prints a row for each way of saving: the medians over saves of a random state.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch

from trainer.config import Config
from trainer.fingerprint import Fingerprint
from trainer.logdir import Claim, lock_logdir
from trainer.saving import Saver
from utils import start
from utils.cli import USER_ERRORS, check_at_least, command_parser, fail, interruptible
from utils.distributed import Session
from utils.seeding import generator

TENSORS = 100
HEADER = (
    "| way | training waits s | save takes s | waits / takes | of CPU time |\n"
    "| --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Times:
    """Of one save, in seconds."""

    waited: float  # by the loop
    took: float  # until the checkpoint was verified, published, and its forerunner deleted
    busy: float  # the loop's share of CPU seconds, which neighbours disturb less

    def row(self, name: str) -> str:
        """As a line of the table."""
        share = self.waited / self.took
        shares = f"{100 * share:.1f} % | {100 * self.busy:.1f} %"
        return f"| {name} | {self.waited:.3f} | {self.took:.2f} | {shares} |"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(__doc__)
    result.add_argument("--megabytes", type=int, default=500, help="size of the state")
    result.add_argument("--saves", type=int, default=5, help="how many of each way are timed")
    result.add_argument(
        "--folder", type=Path, default=None, help="on the disk to be timed (default: a temporary)"
    )
    return result


def measure(folder: Path, megabytes: int, saves: int, *, background: bool) -> Times:
    """Medians over `saves`, without the first one, which makes the buffers of the copy."""
    config = Config(
        trainer="diffusion",
        steps=1,
        batch_size=1,
        keep_checkpoints=1,
        save_in_background=background,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(rank=0, world_size=1, device=device)
    claim = Claim(folder, {}, Fingerprint(0, "", "", {}), None, [lock_logdir(folder)])
    saver = Saver(config, claim, session)
    values = megabytes * 10**6 // 4 // TENSORS
    draw = generator("benchmark_saving")
    state = {str(i): torch.randn(values, generator=draw).to(device) for i in range(TENSORS)}
    times = []
    for step in range(1, saves + 2):
        begun, cpu = time.perf_counter(), time.process_time()
        own = time.thread_time()
        saver.save(step, state)
        waited, own = time.perf_counter() - begun, time.thread_time() - own
        saver.settle(last=True)
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
        times.append(Times(waited, took, own / cpu))
    claim.release()
    names = ("waited", "took", "busy")
    return Times(*(statistics.median(getattr(t, name) for t in times[1:]) for name in names))


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        check_at_least(args, megabytes=1, saves=1)
        print(HEADER)
        for name, background in (("the run waits", False), ("in the background", True)):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                times = measure(Path(folder), args.megabytes, args.saves, background=background)
            print(times.row(name), flush=True)
    except USER_ERRORS as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
