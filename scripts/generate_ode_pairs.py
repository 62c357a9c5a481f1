"""Store a teacher's trajectories from noise to clean latents: what `trainer: ode` learns from.

The teacher's run is given by its configuration; it is sampled with Euler steps under guidance, and
its states at the noise levels of --denoising_step_list, and the end, go to LMDB shards. Any number
of processes (torchrun) makes the same pairs; an interrupted call continues after its last batch.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch import Tensor
from tqdm import tqdm

from model.conditioning import first_latents
from model.types import Keyframes
from pipeline.generator import VideoGenerator
from pipeline.teacher import trajectory
from trainer.config import Config, load
from trainer.serving import Source, check_source, load_generator
from utils import start
from utils.claims import Claim
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.config import ConfigError
from utils.data.dataset import Dataset, TrajectoryManifest, open_dataset
from utils.data.shards import ShardWriter
from utils.distributed import Session, distributed_session
from utils.media.images import to_signed
from utils.records import MANIFEST
from utils.seeding import sample_rng

log = logging.getLogger(__name__)

SHARD_PAIRS = 32  # a process works on one shard at a time; small, so that all have some


def parser() -> argparse.ArgumentParser:
    """The command line of generate_ode_pairs.py."""
    result = command_parser(__doc__)
    result.add_argument("--config_path", type=Path, required=True, help="the teacher's YAML file")
    result.add_argument("--checkpoint_path", type=Path, required=True, help="its weights")
    result.add_argument("--use_ema", action="store_true", help="the averaged weights")
    result.add_argument("--caption_path", type=Path, required=True, help="as data.path of training")
    result.add_argument("--output_folder", type=Path, required=True)
    result.add_argument("--steps", type=int, default=48, help="of the teacher")
    result.add_argument("--num_pairs", type=int, default=None, help="default: one per caption")
    result.add_argument(
        "--batch_size", type=int, default=1,
        help=f"pairs at a time on each process; more than a shard's {SHARD_PAIRS} are not taken",
    )  # fmt: skip
    result.add_argument(
        "--i2v", action="store_true",
        help="pairs begin with the images of --caption_path, of models where images are optional",
    )  # fmt: skip
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


@dataclass(frozen=True, eq=False)
class Records:
    """What the pairs are conditioned on; a dataset with fewer records begins again."""

    dataset: Dataset
    count: int
    begin_with_images: bool  # read by the model, or in the first latent frame's place

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """The captions of some pairs."""
        return [self.dataset.prompt(i % len(self.dataset)) for i in indices]

    def images(self, indices: Sequence[int]) -> Tensor | None:
        """The images [B, 3, H, W], uint8, that some pairs begin with; None = with none."""
        if not self.begin_with_images:
            return None
        found = [self.dataset[i % len(self.dataset)].image for i in indices]
        return torch.stack([image for image in found if image is not None])


def check_images(path: Path, dataset: Dataset, size: tuple[int, int]) -> None:
    """Raise ConfigError unless each record has an image of `size`, that of the clips."""
    others = [shapes.image for shapes in dataset.buckets if shapes.image != size]
    if others:
        raise ConfigError(
            f"--caption_path: this model begins with images of {size} (height, width), {path} "
            f"holds {others[0] or 'none'}; make shards by scripts/create_lmdb_14b_shards.py"
        )


def plan(
    args: argparse.Namespace, config: Config, source: Source
) -> tuple[Records, TrajectoryManifest]:
    """The caption of each pair, and the manifest. Raises ConfigError for what cannot be."""
    check_at_least(args, num_pairs=1, batch_size=1, steps=1)
    if config.generator_type != "bidirectional":
        raise ConfigError("generator_type: ODE pairs come from a bidirectional teacher")
    steps = args.steps
    off = [step for step in config.denoising_step_list if step * steps % 1000]
    if off:
        raise ConfigError(
            f"--steps: {steps} Euler steps do not pass through {off} of denoising_step_list; "
            f"choose a number that times step / 1000 is whole, as 48 for 750, 500, 250"
        )
    dataset = open_dataset(args.caption_path)
    if args.i2v and source.model.images is None:
        raise ConfigError(
            f"--i2v: {source.model.path} makes clips from text alone; leave it out, or use a model "
            f"that begins with images"
        )
    begin_with_images = args.i2v or source.run.reads_images
    if begin_with_images:
        check_images(
            args.caption_path, dataset, source.model.latent.pixel_size(*config.latent_shape[2:])
        )
    count = args.num_pairs or len(dataset)
    records = Records(dataset, count, begin_with_images)
    captions = "\n".join(records.prompts(range(count)))
    digest = hashlib.blake2b(captions.encode(), digest_size=8).hexdigest()
    return records, TrajectoryManifest(
        count=count,
        denoising_step_list=config.denoising_step_list,
        timestep_shift=config.timestep_shift,
        latent_shape=config.latent_shape,
        steps=steps,
        cfg_scale=config.sampling.cfg_scale,
        seed=args.seed,
        prompts=digest,
        negative_prompt=config.data.negative_prompt,
        mixed_precision=config.mixed_precision,
        weights=str(source.weights.path) + (" (EMA)" if args.use_ema else ""),
        images=begin_with_images and source.run.takes_given,
    )


def claim(folder: Path, manifest: TrajectoryManifest) -> Claim:
    """What makes a folder that of these pairs."""
    made_with = asdict(manifest)
    if not manifest.images:  # folders of before this choice go on
        del made_with["images"]
    return Claim(folder, made_with, holds="pairs", file=MANIFEST, results="**/data.mdb")


def run(
    args: argparse.Namespace,
    config: Config,
    records: Records,
    generator: VideoGenerator,
    session: Session,
) -> None:
    """Make what is missing of this process's shards."""
    pairs = range(records.count)
    shards = range(-(-records.count // SHARD_PAIRS))
    mine = shards[session.rank :: session.world_size]
    total = sum(len(pairs[k * SHARD_PAIRS : (k + 1) * SHARD_PAIRS]) for k in mine)
    with tqdm(total=total, desc="pairs", disable=not session.is_main) as bar:
        for number in mine:
            first = number * SHARD_PAIRS
            last = min(first + SHARD_PAIRS, records.count)
            with ShardWriter(args.output_folder / f"shard_{number:05d}") as writer:
                bar.update(writer.rows)
                while (begin := first + writer.rows) < last:
                    indices = range(begin, min(begin + args.batch_size, last))
                    states = make(records, indices, args.seed, config, generator)
                    prompts, images = records.prompts(indices), records.images(indices)
                    writer.append(prompts, trajectories=states.cpu(), images=images)
                    bar.update(len(prompts))


def make(
    records: Records,
    indices: Sequence[int],
    seed: int,
    config: Config,
    generator: VideoGenerator,
) -> Tensor:
    """Trajectories [B, S, C, F, H, W] of some pairs; a pair's noise follows its number."""
    rng = sample_rng(seed, "ode pairs", indices, generator.device)
    keyframes, given = begin(records.images(indices), generator)
    conditioning = generator.encoder.encode(
        records.prompts(indices), keyframes, frames=config.latent_shape[1]
    )
    steps = config.sampling.steps
    kept = {round(steps * (1.0 - s / 1000.0)) for s in config.denoising_step_list} | {steps}
    states = trajectory(
        generator.network,
        rng.randn(config.latent_shape),
        conditioning,
        generator.encoder.unconditional(conditioning),
        config.sampling,
        given=given,
    )
    return torch.stack([x for step, x in enumerate(states) if step in kept], dim=1)


def begin(
    images: Tensor | None, generator: VideoGenerator
) -> tuple[Keyframes | None, Tensor | None]:
    """What a model reads of images [B, 3, H, W], uint8: keyframes, or first latent frames."""
    if images is None:
        return None, None
    pixels = to_signed(images).to(generator.device)
    if generator.encoder.reads_images:
        return Keyframes(pixels), None
    return None, first_latents(generator.vae, pixels)


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Make all pairs; returns the exit status."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    try:
        config = load(args.config_path, args.overrides)
        sampling = replace(
            config.sampling, solver="euler", steps=args.steps, timestep_shift=config.timestep_shift
        )
        config = replace(config, sampling=sampling)
        source = check_source(config, args.checkpoint_path, use_ema=args.use_ema)
        experts = source.model.experts
        if experts is not None and sampling.boundary is None:  # a teacher's, not a student's
            sampling = replace(sampling, boundary=experts.boundary)
            config = replace(config, sampling=sampling)
        records, manifest = plan(args, config, source)
    except USER_ERRORS as error:
        return fail(error)
    with distributed_session(timeout_s=config.timeout_s) as session:
        start_logging(main_rank=session.is_main)
        try:
            claim(args.output_folder, manifest).take(session)
        except USER_ERRORS as error:
            return fail(error)
        try:
            generator = load_generator(source, session.device)
            with session.uneven_work():
                run(args, config, records, generator, session)
        except USER_ERRORS as error:
            return fail(error)
        log.info("%d pairs are in %s", records.count, args.output_folder)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
