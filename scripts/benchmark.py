"""Time training steps, clips or attention kernels, beside the plan and the plain mathematics.

  benchmark.py --config_path configs/tiny/dmd.yaml   your configuration, from your folders
  benchmark.py --shape tiny small                    sizes with random weights, nothing to fetch
  benchmark.py inference --shape small               clips: the network, first frame, frames/s
  benchmark.py attention --shape 1.3B                attention kernels that are here, and masks

One JSON line and one row of a table per configuration; a dash is what was not measured. Under
torchrun, training is timed on all its ranks. Nothing is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch

from scripts.benchmarking import attention, inference, training
from scripts.benchmarking.parts import parts_of_steps
from scripts.benchmarking.rows import Row, predicted, table
from scripts.benchmarking.shapes import (
    METHODS,
    SHAPES,
    check_device,
    make_heads_differ,
    make_world,
    random_run,
    shape_config,
)
from trainer.base import Trainer
from trainer.build import RunOptions, assemble
from trainer.config import Config, load
from trainer.run import Run, resolve
from utils import start
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.config import ConfigError
from utils.distributed import Session, distributed_session

MODES = ("train", "inference", "attention")


def parser() -> argparse.ArgumentParser:
    """The command line of benchmark.py."""
    result = command_parser(__doc__)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--config_path", type=Path, help="a configuration and the folders it names")
    what.add_argument("--shape", nargs="+", choices=list(SHAPES), help="sizes, random weights")
    result.add_argument("--method", choices=list(METHODS), default="dmd", help="of --shape")
    result.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    result.add_argument("--timed_steps", type=int, default=12, help="steps or clips that count")
    result.add_argument("--warmup_steps", type=int, default=3, help="steps or clips before them")
    result.add_argument("--no_plain", action="store_true", help="do not time the plain version")
    result.add_argument("--no_save", action="store_true", help="do not time a checkpoint")
    result.add_argument("--parts", action="store_true", help="also show each part's share of steps")
    result.add_argument("--force", action="store_true", help="real sizes on a CPU all the same")
    result.add_argument(
        "words", nargs="*", metavar="train|inference|attention key=value", help="default: train"
    )
    return result


def split_words(args: argparse.Namespace) -> None:
    """Take the mode out of the words; the rest are overrides."""
    words = list(args.words)
    args.mode = words.pop(0) if words and words[0] in MODES else "train"
    args.overrides = words


def choose_device(word: str | None) -> torch.device:
    """The device that was asked for, or the best. Raises ConfigError if it is not there."""
    cuda = torch.cuda.is_available()
    if word == "cuda" and not cuda:
        raise ConfigError("--device: cuda was asked for, but torch sees no CUDA device; use cpu")
    return torch.device(word or ("cuda" if cuda else "cpu"))


@contextlib.contextmanager
def session_on(device: torch.device) -> Iterator[Session]:
    """A process group whose tensors live on a device of this kind."""
    with distributed_session() as session:
        same = session.device.type == device.type
        yield session if same else replace(session, device=device)


def check(args: argparse.Namespace) -> torch.device:
    """Refuse what cannot be timed, before anything is made."""
    check_at_least(args, timed_steps=1, warmup_steps=0)
    device = choose_device(args.device)
    if args.mode == "attention" and args.shape is None:
        raise ConfigError("attention: kernels are timed at --shape, not at a configuration")
    if args.shape is not None:
        check_device(args.shape, device, force=args.force)
    return device


def configurations(
    args: argparse.Namespace, session: Session, folder: Path
) -> Iterator[tuple[str, Config]]:
    """What is timed, one after the other, with its name."""
    if args.config_path is not None:
        config = load(args.config_path, [*args.overrides, "validation.every=0"])
        yield args.config_path.stem, config
        return
    for name in args.shape:
        world = folder / name
        session.on_main(partial(make_world, name, world))
        overrides = args.overrides
        yield (
            name,
            shape_config(name, args.method, world, ranks=session.world_size, overrides=overrides),
        )


def build(config: Config, session: Session, logdir: Path, *, shaped: bool) -> Trainer:
    """The trainer of a configuration; of a shape's, every network with random weights."""
    options = RunOptions(logdir, "benchmark", save=False, visualize=False, wandb=False)
    trainer = assemble(random_run(config) if shaped else resolve(config), session, options)
    if shaped:
        for role, network in trainer.method.parts.networks.items():
            make_heads_differ(role, network)
            network.requires_grad_(role in trainer.roles)
        training.start_from_now(trainer)
    return trainer


@dataclass(frozen=True, eq=False)
class Result:
    """One configuration, timed."""

    run: Run
    row: Row
    more: str  # what else is to be said of it


def results(args: argparse.Namespace, session: Session, folder: Path) -> Iterator[Result]:
    """One after the other. Collective."""
    rounds = training.Rounds(
        warmup=args.warmup_steps,
        timed=args.timed_steps,
        plain=not args.no_plain,
        save=not args.no_save,
    )
    for name, config in configurations(args, session, folder):
        if args.mode == "inference":
            run = random_run(config, ("generator",))
            generator = inference.random_generator(run, session.device)
            yield Result(run, inference.measure(run, generator, name, rounds), "")
            continue
        trainer = build(config, session, folder / f"{name}.log", shaped=args.shape is not None)
        row = training.measure(trainer, name, rounds)
        more = parts_of_steps(trainer, args.timed_steps) if args.parts else ""
        trainer.parts.batches.close()
        yield Result(trainer.parts.run, row, more)


def show(found: Sequence[Result]) -> None:
    """Print a JSON line each, what else there is, and the table, with the plan's figures."""
    rows = [replace(one.row, prediction=predicted(one.run, one.row)) for one in found]
    for row, one in zip(rows, found, strict=True):
        print(row.json(), *filter(None, [one.more]), sep="\n")
    print(f"\ntorch {torch.__version__}, {rows[0].device}\n\n{table(rows)}")


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Time what is asked for; print a JSON line each, then the table."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    split_words(args)
    try:
        device = check(args)
        if args.config_path is not None:
            load(args.config_path, args.overrides)  # before a process group is opened
    except USER_ERRORS as error:
        return fail(error)
    if args.mode == "attention":
        for timed in attention.measure(args.shape, device):
            print(timed.json(), timed.table(), sep="\n\n", end="\n\n", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as own:
        try:
            with session_on(device) as session:
                start_logging(main_rank=session.is_main)
                found = list(results(args, session, Path(session.from_main(own))))
                session.barrier()  # the main rank's folder serves all
            if session.is_main:
                show(found)
        except USER_ERRORS as error:
            return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
