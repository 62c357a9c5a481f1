"""`--plan`: its words on a command line, and what it prints and writes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.families.base import Model
from model.families.registry import find_model, sketch_model
from model.wan.kernels import AUTO, EXACT
from trainer.config import Config
from trainer.decoders import TINY
from trainer.inputs import check_latent_shape, model_problems, rank_problems
from trainer.plan import Plan, make_plan
from trainer.plan_fits import candidates, fitting
from trainer.plan_inference import plan_clips, with_adapters, with_frames
from trainer.plan_table import as_json, fits_table, table
from trainer.plan_trace import World
from trainer.run import Run, resolve
from utils.config import ConfigError
from utils.errors import NotFoundError
from utils.files import write_text
from utils.gpus import GPUS, find_gpu

log = logging.getLogger(__name__)


def add_plan_flags(parser: argparse.ArgumentParser, *, fits: bool = True) -> None:
    """What a command is asked for a plan with."""
    group = parser.add_argument_group("planning")
    add = group.add_argument
    add(
        "--plan", action="store_true",
        help="print the memory, time and traffic that this would take, and do nothing",
    )  # fmt: skip
    add("--gpu", default="H100", help=f"planned for: {', '.join(GPUS)}")
    add("--plan_json", type=Path, default=None, help="write the plan there as well")
    if fits:
        add("--gpus", type=int, default=8, help="planned for so many in all")
        add("--gpus_per_node", type=int, default=8, help="of these, how many are on one machine")
        add(
            "--fits", action="store_true",
            help="plan other ways to lay the same run over these GPUs, and list the fastest",
        )  # fmt: skip


def need_unless_planning(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]
) -> None:
    """End the command if it lacks a word that only a plan does without."""
    missing = [f"--{name}" for name in names if getattr(args, name) is None and not args.plan]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def read_world(args: argparse.Namespace) -> World:
    """The machines that the flags name. Raises ConfigError."""
    for flag in ("gpus", "gpus_per_node"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag}: must be at least 1, got {getattr(args, flag)}")
    per_node = min(args.gpus, args.gpus_per_node)
    if args.gpus % per_node:
        raise ConfigError(
            f"--gpus: {args.gpus} do not fill machines of {per_node}; use a multiple, or set "
            f"--gpus_per_node"
        )
    return World(args.gpus, per_node)


def plan_training(config: Config, args: argparse.Namespace) -> str:
    """The plan of a run, in words. Raises UserError with all problems."""
    world, gpu = read_world(args), find_gpu(args.gpu)
    with tempfile.TemporaryDirectory() as folder:
        run = sketched_run(config, Path(folder))
        found = list(run_problems(run, world))
        if found and not args.fits:
            raise ConfigError("\n".join(found))
        if args.fits:
            plans = fitting(run, world, gpu, list(candidates(run, world)))
            words = fits_table(plans, world, gpu)
        else:
            plans = [make_plan(run, world, gpu)]
            words = table(plans[0])
    keep(plans if args.fits else plans[0], args.plan_json)
    return words


def keep(plans: Plan | Sequence[Plan], path: Path | None) -> None:
    """Write a plan, or several, as JSON; None = nowhere."""
    if path is not None:
        found = as_json(plans) if isinstance(plans, Plan) else [as_json(plan) for plan in plans]
        write_text(path, json.dumps(found, indent=1) + "\n")


def plan_inference(config: Config, args: argparse.Namespace) -> str:
    """The plan of a batch of clips on one GPU, in words. Raises UserError."""
    gpu = find_gpu(args.gpu)
    with tempfile.TemporaryDirectory() as folder:
        asked = with_adapters(config, args.adapter)
        run = with_frames(sketched_run(asked, Path(folder), ("generator",)), args.num_output_frames)
        check_latent_shape(run.config.latent_shape, run.model)
        plan = plan_clips(run, gpu, args.batch_size, preview=args.vae == TINY)
    keep(plan, args.plan_json)
    return table(plan)


def sketched_run(config: Config, folder: Path, roles: Sequence[str] | None = None) -> Run:
    """The run with models that are here, or known by their names; folder: for what is known."""

    @functools.cache  # roles of one model are one model, and it is told once that it is not here
    def find(root: Path, name: str) -> Model:
        model = None
        with contextlib.suppress(NotFoundError):
            model = find_model(root, name)
            if not model.missing(weights=False, encoders=False):
                return model
        sketched = sketch_model(name, folder)
        if sketched is None:
            return model or find_model(root, name)  # which says what there is
        log.info("%s is not here: planned from what is known of it", name)
        return sketched

    return resolve(config, roles, find)


def run_problems(run: Run, world: World) -> Iterator[str]:
    """What keeps a run from these GPUs, one line each: what the run itself would say of them."""
    attention = run.config.parallel.attention
    if attention not in (AUTO, *EXACT):
        yield f"parallel.attention: '{attention}' has no backward pass: it serves inference alone"
    yield from rank_problems(run, world.ranks, {"GPUs of a machine": world.per_node})
    yield from model_problems(run)
