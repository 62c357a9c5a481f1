"""Train: read the command line, load the configuration, build the trainer, run it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import start

if __name__ == "__main__":  # before torch is imported
    start.begin()

from trainer.base import AGAIN
from trainer.build import RunOptions, build_trainer
from trainer.config import Config, load
from trainer.plan_command import add_plan_flags, need_unless_planning, plan_training
from trainer.stopping import Interrupted
from utils.cli import USER_ERRORS, command_parser, fail, start_logging
from utils.distributed import distributed_session

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    result = command_parser(__doc__)
    result.add_argument("--config_path", type=Path, required=True, help="a YAML file of configs/")
    result.add_argument(
        "--logdir", type=Path, help="checkpoints, metrics, samples; needed unless with --plan"
    )
    result.add_argument("--no_save", action="store_true", help="write no checkpoints")
    result.add_argument("--no_visualize", action="store_true", help="make no sample pictures")
    result.add_argument(
        "--allow_config_change", action="store_true",
        help="continue a run although its settings, data or weights have changed",
    )  # fmt: skip
    result.add_argument(
        "--fresh", action="store_true",
        help="begin a new run, and refuse a log directory that holds one instead of continuing it",
    )  # fmt: skip
    result.add_argument("--disable-wandb", "--disable_wandb", action="store_true")
    result.add_argument("--wandb-save-dir", "--wandb_save_dir", type=Path, default=None)
    add_plan_flags(result)
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; returns the exit status.

    130, 138, 143 = stopped by Ctrl-C, SIGUSR1, SIGTERM, and resumable.
    """
    words = parser()
    args = words.parse_intermixed_args(arguments)
    need_unless_planning(words, args, ("logdir",))
    start_logging()
    try:
        config = load(args.config_path, args.overrides)
        if args.plan:
            print(plan_training(config, args))
            return 0
    except USER_ERRORS as error:
        return fail(error)
    options = RunOptions(
        logdir=args.logdir,
        config_name=args.config_path.stem,
        save=not args.no_save,
        visualize=not args.no_visualize,
        wandb=not args.disable_wandb,
        wandb_folder=args.wandb_save_dir,
        allow_change=args.allow_config_change,
        fresh=args.fresh,
    )
    try:
        return run(config, options)
    except Interrupted as stop:
        log.warning("%s", stop)
        return stop.status
    except KeyboardInterrupt:
        log.warning("interrupted; %s", AGAIN)
        return start.INTERRUPTED


def run(config: Config, options: RunOptions) -> int:
    """Build and train within one process group; returns the exit status."""
    with distributed_session(timeout_s=config.timeout_s) as session:
        start_logging(main_rank=session.is_main)
        try:
            build_trainer(config, session, options).train()
        except USER_ERRORS as error:
            return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
