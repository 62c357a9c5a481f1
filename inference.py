"""Prompts to mp4 files, on any number of processes with one result; interrupted calls continue."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from utils import start

if __name__ == "__main__":  # before torch is imported
    start.begin()

import torch
from tqdm import tqdm

from model.families.registry import find_model
from model.types import Keyframes, LatentSpec
from trainer.config import Config, causal_config, generator_model, load, problems
from trainer.serving import Request, Source, VideoGenerator, check_source, load_generator
from trainer.starts import check_images, pixel_frames, pixel_size, read_start
from utils.cli import USER_ERRORS, command_parser, fail, start_logging, stopped
from utils.config import ConfigError
from utils.data.dataset import open_dataset
from utils.data.prompts import (
    PromptItem,
    merged,
    read_image_prompts,
    read_prompts,
    with_extended,
)
from utils.data.shards import shard_paths
from utils.distributed import Session, distributed_session
from utils.hashes import sha256_of
from utils.media.clip_names import clip_stems, default_samples
from utils.media.given_frames import (
    Given,
    Size,
    describe_picture,
    picture_size,
    read_fitted,
)
from utils.media.manifest import ClipRecord, claim_folder, finish_manifest
from utils.media.video import contact_sheet, read_video, save_mp4, save_png

log = logging.getLogger(__name__)

SHEET_CLIPS = 12  # on the contact sheet
VBENCH_FOLDER = "videos"  # the tool takes every file beside a clip for one


@dataclass(frozen=True)
class Job:
    """One clip and the file that it goes to."""

    request: Request
    item: PromptItem
    size: Size  # of the clip
    file: Path


def parser() -> argparse.ArgumentParser:
    """The command line of inference.py."""
    result = command_parser(__doc__)
    add = result.add_argument
    add("--config_path", type=Path, required=True, help="the run's YAML file")
    add(
        "--checkpoint_path", type=Path, required=True,
        help="log directory, training checkpoint, weight file or model folder",
    )  # fmt: skip
    add(
        "--data_path", type=Path, required=True,
        help="one prompt per line, a table (.json, .jsonl, .csv, .tsv), or a folder of .txt files",
    )  # fmt: skip
    add("--extended_prompt_path", type=Path, help="line by line, or file by file, for --data_path")
    add(
        "--i2v", action="store_true",
        help="clips begin with images: --data_path is a folder of images, each with its .txt",
    )  # fmt: skip
    add(
        "--image_size", choices=("configured", "aspect"), default="configured",
        help="of clips that begin with images: as configured, or of that area with their aspect",
    )  # fmt: skip
    add("--output_folder", type=Path, required=True)
    add("--use_ema", action="store_true", help="the averaged weights")
    add("--num_samples", type=int, default=None, help="clips per prompt (1; --vbench: 5 or 25)")
    add("--seed", type=int, default=0)
    add("--save_with_index", action="store_true", help="name files by number")
    add("--vbench", action="store_true", help="names and numbers of clips as VBench wants them")
    add("--num_output_frames", type=int, default=None, help="latent frames")
    add(
        "--initial_path", type=Path,
        help="an image or a video that every clip begins with (causal models)",
    )  # fmt: skip
    add("--batch_size", type=int, default=1, help="clips at a time on each process")
    add("--fps", type=float, default=16.0)
    add("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def plan(args: argparse.Namespace, config: Config, latent: LatentSpec) -> list[Job]:
    """All clips to make, in order. Raises ValueError or FileNotFoundError for bad prompts."""
    check_arguments(args)
    items = read_items(args)
    stems = clip_stems(items, by_index=args.save_with_index, vbench=args.vbench)
    jobs = []
    for stem, item in zip(stems, items, strict=True):
        kind = ("_ema" if args.use_ema else "_regular") if args.save_with_index else ""
        size = clip_size(args, config, latent, item)
        for sample in range(args.num_samples or default_samples(item, vbench=args.vbench)):
            file = clip_folder(args) / f"{stem}-{sample}{kind}.mp4"
            jobs.append(Job(Request(item.text, args.seed, sample), item, size, file))
    return jobs


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for values and combinations that mean nothing."""
    for flag in ("num_samples", "batch_size", "num_output_frames"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag}: must be at least 1, got {value}")
    if not args.fps > 0:
        raise ConfigError(f"--fps: must be positive, got {args.fps}")
    if args.vbench and args.save_with_index:
        raise ConfigError("--save_with_index: VBench finds clips by their prompts; drop one flag")
    if args.i2v and args.initial_path is not None:
        raise ConfigError("--initial_path: with --i2v each clip begins with its own image")
    if args.image_size != "configured" and not args.i2v:
        raise ConfigError(f"--image_size {args.image_size}: has no effect without --i2v")


def read_items(args: argparse.Namespace) -> list[PromptItem]:
    """The prompts of --data_path, longer ones in their place if given."""
    if args.i2v:
        items = read_image_prompts(args.data_path, named_by_prompt=args.vbench)
    elif args.data_path.is_file():
        items = read_prompts(args.data_path)
    elif any(args.data_path.glob("*.txt")) and not shard_paths(args.data_path):
        items = read_prompts(args.data_path)  # with their names
    else:
        dataset = open_dataset(args.data_path)
        items = [PromptItem(p, p) for p in map(dataset.prompt, range(len(dataset)))]
    if args.extended_prompt_path is not None:
        items = with_extended(items, args.extended_prompt_path, args.data_path)
    return merged(items) if args.vbench else items


def clip_folder(args: argparse.Namespace) -> Path:
    """Where clips go."""
    return args.output_folder / VBENCH_FOLDER if args.vbench else args.output_folder


def clip_size(
    args: argparse.Namespace, config: Config, latent: LatentSpec, item: PromptItem
) -> Size:
    """Height and width of a clip. Raises FileNotFoundError or ValueError for a bad image."""
    size = pixel_size(config, latent)
    # Read even where their sizes do not count: a bad image is told before a model is loaded.
    shapes = [picture_size(picture) for picture in item.pictures]
    if not shapes or args.image_size == "configured":
        return size
    return latent.nearest_size(shapes[0], size[0] * size[1])


def sized(config: Config, args: argparse.Namespace) -> Config:
    """The configuration of clips as long as asked. Raises ConfigError if it cannot be."""
    if args.num_output_frames is None:
        return config
    channels, _, height, width = config.latent_shape
    causal = replace(config.causal, rollout_frames=None)  # of training; a clip may be longer
    longer = replace(
        config, latent_shape=[channels, args.num_output_frames, height, width], causal=causal
    )
    found = list(problems(longer))
    if found:
        raise ConfigError(f"--num_output_frames {args.num_output_frames}: {'; '.join(found)}")
    return longer


def settings_of(args: argparse.Namespace, config: Config, source: Source) -> dict[str, Any]:
    """What all clips of a folder share, as JSON has it."""
    keys = (
        "data_path", "extended_prompt_path", "use_ema", "seed", "save_with_index", "i2v",
        "image_size", "vbench", "num_output_frames", "initial_path", "batch_size", "fps",
    )  # fmt: skip
    wanted: dict[str, Any] = {key: getattr(args, key) for key in keys}
    original = args.extended_prompt_path is None
    wanted["protocol"] = "original prompts" if original else "extended prompts"
    wanted["model"] = generator_model(config)
    wanted["latent_shape"] = config.latent_shape
    wanted["frames"] = pixel_frames(config, source.folder.latent)
    wanted["size"] = list(pixel_size(config, source.folder.latent))
    wanted["mixed_precision"] = config.mixed_precision
    wanted["negative_prompt"] = config.data.negative_prompt
    if config.trainer == "diffusion":
        wanted["sampling"] = asdict(config.sampling)
    else:  # a few steps without a solver or guidance
        wanted["denoising_step_list"] = config.denoising_step_list
        wanted["timestep_shift"] = config.timestep_shift
    causal = causal_config(config)
    wanted["causal"] = None if causal is None else asdict(causal)
    wanted["weights"] = source.weights.path  # a log directory's newest checkpoint moves on
    return dict(json.loads(json.dumps(wanted, default=str)))


def records(jobs: Sequence[Job], folder: Path) -> list[ClipRecord]:
    """The lines of the manifest."""
    images = {str(p.path): p.path for job in jobs for p in job.item.pictures}
    digests = sha256_of(images)
    return [
        ClipRecord(
            file=job.file.relative_to(folder).as_posix(),
            prompt=job.item.title,
            conditioning_prompt=job.item.text,
            seed=job.request.seed,
            sample=job.request.sample,
            height=job.size[0],
            width=job.size[1],
            images=[str(picture.path) for picture in job.item.pictures],
            images_sha256=[digests[str(picture.path)] for picture in job.item.pictures],
        )
        for job in jobs
    ]


def run(
    args: argparse.Namespace,
    config: Config,
    source: Source,
    jobs: list[Job],
    start: Given | None,
    session: Session,
) -> None:
    """Make what is missing. Batches are cut before ranks, so a clip's neighbours never change."""
    mine = [
        batch
        for batch in list(batches(jobs, args.batch_size))[session.rank :: session.world_size]
        if not all(job.file.is_file() for job in batch)
    ]
    if mine:
        model = load_generator(config, source, session.device)
        frames = config.latent_shape[1]
        log.info("%d network evaluations per clip", model.pipeline.network_evaluations(frames))
        initial = None
        if start is not None:
            initial = model.vae.encode_to_latent(start.frames.to(session.device))
        with tqdm(total=sum(map(len, mine)), desc="clips", disable=not session.is_main) as bar:
            for batch in mine:
                make(batch, model, args.fps, initial)
                bar.update(len(batch))
    session.barrier()
    if session.is_main:
        shown = jobs[:SHEET_CLIPS]
        clips = [read_video(job.file) for job in shown]
        sheet = contact_sheet(clips, [job.item.title for job in shown])
        save_png(sheet, args.output_folder / "contact_sheet.png")
        finish_manifest(args.output_folder)
        log.info("%d clips in %s", len(jobs), args.output_folder)


def batches(jobs: Sequence[Job], count: int) -> Iterator[list[Job]]:
    """Jobs in groups of up to `count`, all of one size."""
    open_: dict[Size, list[Job]] = {}
    for job in jobs:
        batch = open_.setdefault(job.size, [])
        batch.append(job)
        if len(batch) == count:
            yield open_.pop(job.size)
    yield from open_.values()


def make(
    batch: Sequence[Job], model: VideoGenerator, fps: float, initial: torch.Tensor | None
) -> None:
    """Sample one batch and write its files. initial: [1, C, g, H, W], what all clips begin with."""
    if initial is not None:
        initial = initial.expand(len(batch), -1, -1, -1, -1)
    size = batch[0].size
    clips = model.clips(
        [job.request for job in batch],
        keyframes=keyframes(batch, model.device),
        initial=initial,
        latent_shape=[*model.latent_shape[:2], *model.latent.latent_size(size)],
    )
    for job, clip in zip(batch, clips, strict=True):
        save_mp4(clip, job.file, fps=fps)


def keyframes(batch: Sequence[Job], device: torch.device) -> Keyframes | None:
    """The images of a batch, or None if its clips begin without."""
    size = batch[0].size
    rows = [[read_fitted(picture, size) for picture in job.item.pictures] for job in batch]
    images = [torch.stack(column).to(device) for column in zip(*rows, strict=True)]
    return Keyframes(*images) if images else None


def tell_fits(jobs: Sequence[Job], start: Given | None) -> None:
    """Log what is done to each image, once."""
    pictures = {picture: job.size for job in jobs for picture in job.item.pictures}
    for picture, size in pictures.items():
        log.info("%s", describe_picture(picture, size))
    if start is not None:
        log.info("%s", start.fit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all clips; returns the exit status."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    try:
        config = load(args.config_path, args.overrides)
        latent = find_model(Path(config.model_root), config.model_of("generator")).latent
        jobs = plan(args, config, latent)
        config = sized(config, args)
        start = read_start(config, latent, args.initial_path, images=args.i2v)
        source = check_source(config, args.checkpoint_path, use_ema=args.use_ema)
        items = [job.item for job in jobs] if args.i2v else None
        check_images(config, source.folder, items)
    except USER_ERRORS as error:
        return fail(error)
    with distributed_session(timeout_s=config.timeout_s) as session:
        start_logging(main_rank=session.is_main)
        try:
            settings, clips = settings_of(args, config, source), records(jobs, args.output_folder)
            claim_folder(args.output_folder, settings, source.weights.path, clips, session)
        except USER_ERRORS as error:
            return fail(error)
        if session.is_main:
            tell_fits(jobs, start)
        try:
            run(args, config, source, jobs, start, session)
        except USER_ERRORS as error:  # such as damaged encoders, or a full disk
            return fail(error)
        except KeyboardInterrupt:
            return stopped(log)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
