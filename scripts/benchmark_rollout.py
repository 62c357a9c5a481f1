"""Time and memory of a self-forcing rollout's forward and backward pass, by what its cache keeps.

Each row is a process of its own: random weights, the last step of every block with a gradient.
  detach             no gradient passes between blocks (the default)
  straight_through   later blocks' losses reach the keys and values of earlier ones
  joined kept        as detach, but autograd holds past and present keys joined, once per block
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch import Tensor

from model.families.wan21.weights import random_network
from model.folders.loading import Placement
from model.types import Batch, Conditioning
from model.wan import block
from model.wan.config import PRESETS
from pipeline.blocks import CausalConfig
from pipeline.self_forcing import SelfForcingTrainingPipeline
from utils import start
from utils.cli import USER_ERRORS, check_at_least, command_parser, fail, interruptible
from utils.config import ConfigError
from utils.recompute import recompute_blocks
from utils.seeding import step_rng

SIGMAS = [1.0, 0.9375]
VARIANTS = ("detach", "straight_through", "joined kept")


def parser() -> argparse.ArgumentParser:
    """The command line of benchmark_rollout.py."""
    result = command_parser(__doc__)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    result.add_argument("--preset", choices=list(PRESETS), default="Wan2.1-T2V-Tiny")
    result.add_argument("--latent_shape", type=int, nargs=4, default=[16, 61, 16, 16])
    result.add_argument("--num_frame_per_block", type=int, default=3)
    result.add_argument("--checkpoint", action="store_true", help="recompute blocks in backward")
    result.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return result


def join_and_keep(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    keys: Callable[[], Tensor],
    values: Callable[[], Tensor],
) -> Tensor:
    """What attend_past replaces."""
    return attention(q, keys(), values())


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for shapes that make no clip."""
    check_at_least(args, num_frame_per_block=1)
    channels, frames, height, width = args.latent_shape
    sizes = PRESETS[args.preset]
    _, patch_h, patch_w = sizes.patch_size
    if (
        channels != sizes.out_dim
        or min(args.latent_shape) < 1
        or height % patch_h
        or width % patch_w
    ):
        raise ConfigError(
            f"--latent_shape: must be {sizes.out_dim} channels, frames, a height and a width in "
            f"multiples of {patch_h} and {patch_w}, got {args.latent_shape}"
        )
    for problem in causal_config(args).problems(frames):
        raise ConfigError(problem)


def causal_config(args: argparse.Namespace) -> CausalConfig:
    """The rollout that is timed."""
    return CausalConfig(
        num_frame_per_block=args.num_frame_per_block,
        independent_first_frame=args.latent_shape[1] % args.num_frame_per_block == 1,
        last_step_only=True,
    )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and MiB of one variant, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = PRESETS[args.preset]
    network = random_network(sizes, 0, Placement(device, storage=dtype, compute=dtype))
    if args.checkpoint:
        recompute_blocks(network.model.blocks)
    if args.variant == "joined kept":
        setattr(block, "attend_past", join_and_keep)  # noqa: B010
    causal = causal_config(args)
    if args.variant == "straight_through":
        causal = replace(causal, kv_gradient="straight_through")
    rollout = SelfForcingTrainingPipeline(SIGMAS, causal)
    text = Conditioning(torch.zeros(1, sizes.text_len, sizes.text_dim, device=device))
    channels, frames, height, width = args.latent_shape
    batch = Batch(text, text, (channels, frames, height, width))
    on_gpu = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for step in range(2):  # the first warms up
        start = time.perf_counter()
        rng = step_rng(0, "generator", step=step, first=step, indices=[0], device=device)
        rollout(network, batch, rng, grad=True).x0.square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2**10
    if device.type == "cuda":
        peak = (torch.cuda.max_memory_allocated() - on_gpu) / 2**20
    return {"seconds": seconds[-1], "mib": peak}


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(words)
    if args.variant is not None:
        print(json.dumps(measure(args)))
        return 0
    try:
        check(args)
    except USER_ERRORS as error:
        return fail(error)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, {args.preset}, {args.latent_shape}\n")
    print("| cache | s / rollout, forward and backward | peak MiB above the weights |")
    print("| --- | --- | --- |")
    for variant in VARIANTS:
        child = [sys.executable, __file__, *words, "--variant", variant]
        done = subprocess.run(child, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            return done.returncode
        found = json.loads(done.stdout)
        print(f"| {variant} | {found['seconds']:.2f} | {found['mib']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
