"""Prompts to mp4 files, on any number of processes with one result; interrupted calls continue."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import imageio.v3 as iio
import torch
from tqdm import tqdm

from trainer.config import Config, causal_config, generator_model, load, problems
from trainer.serving import Request, Source, VideoGenerator, check_source, load_generator
from utils.cli import USER_ERRORS, fail, start_logging
from utils.config import ConfigError, refuse_other_settings
from utils.dataset import open_dataset, read_prompt_file
from utils.distributed import Session, distributed_session
from utils.files import write_text
from utils.video import contact_sheet, save_mp4, save_png

log = logging.getLogger(__name__)

SHEET_CLIPS = 12  # on the contact sheet
STRIDE = 8  # pixels per latent row and column, of Wan's autoencoder
MAX_STEM_BYTES = 200  # of a file name; most file systems take 255 with what is appended


@dataclass(frozen=True)
class Job:
    """One clip and the file that it goes to."""

    request: Request
    title: str  # the prompt as its user wrote it
    file: Path


def parser() -> argparse.ArgumentParser:
    """The command line of inference.py."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--config_path", type=Path, required=True, help="the run's YAML file")
    result.add_argument(
        "--checkpoint_path", type=Path, required=True,
        help="log directory, training checkpoint, weight file or model folder",
    )  # fmt: skip
    result.add_argument(
        "--data_path", type=Path, required=True,
        help="a file with one prompt per line, or a folder of .txt files",
    )  # fmt: skip
    result.add_argument("--extended_prompt_path", type=Path, help="line by line for --data_path")
    result.add_argument("--output_folder", type=Path, required=True)
    result.add_argument("--use_ema", action="store_true", help="the averaged weights")
    result.add_argument("--num_samples", type=int, default=1, help="clips per prompt")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--save_with_index", action="store_true", help="name files by number")
    result.add_argument("--num_output_frames", type=int, default=None, help="latent frames")
    result.add_argument(
        "--initial_path", type=Path,
        help="an image or a video that every clip begins with (causal models)",
    )  # fmt: skip
    result.add_argument("--batch_size", type=int, default=1, help="clips at a time on each process")
    result.add_argument("--fps", type=float, default=16.0)
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def plan(args: argparse.Namespace) -> list[Job]:
    """All clips to make, in order. Raises ValueError or FileNotFoundError for bad prompts."""
    for flag in ("num_samples", "batch_size", "num_output_frames"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag}: must be at least 1, got {value}")
    if not args.fps > 0:
        raise ConfigError(f"--fps: must be positive, got {args.fps}")
    dataset = open_dataset(args.data_path)
    titles = [dataset[i].prompt for i in range(len(dataset))]
    prompts = titles
    if args.extended_prompt_path is not None:
        prompts = read_prompt_file(args.extended_prompt_path)
        if len(prompts) != len(titles):
            raise ConfigError(
                f"--extended_prompt_path: {args.extended_prompt_path} has {len(prompts)} prompts, "
                f"{args.data_path} has {len(titles)}; they must match line by line"
            )
    stems = [str(i) if args.save_with_index else file_stem(t) for i, t in enumerate(titles)]
    jobs = []
    for stem, title, prompt in zip(distinct(stems), titles, prompts, strict=True):
        kind = ("_ema" if args.use_ema else "_regular") if args.save_with_index else ""
        for sample in range(args.num_samples):
            file = args.output_folder / f"{stem}-{sample}{kind}.mp4"
            jobs.append(Job(Request(prompt, args.seed, sample), title, file))
    return jobs


def file_stem(prompt: str) -> str:
    """The first 100 characters of a prompt, as far as file systems take them."""
    allowed = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", prompt[:100])
    return allowed.encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip(" .") or "_"


def distinct(stems: Sequence[str]) -> list[str]:
    """The same file stems, later ones of a kind with their number appended."""
    used: set[str] = set()
    result = []
    for index, stem in enumerate(stems):
        while stem in used:
            stem = f"{stem}-{index}"  # noqa: PLW2901
        used.add(stem)
        result.append(stem)
    return result


def claim_folder(
    args: argparse.Namespace, config: Config, source: Source, session: Session
) -> None:
    """Write the folder's manifest. Raises ConfigError if it holds clips of other settings."""
    keys = (
        "data_path", "extended_prompt_path", "use_ema", "seed", "save_with_index",
        "num_output_frames", "initial_path", "batch_size", "fps",
    )  # fmt: skip
    wanted = {key: getattr(args, key) for key in keys}
    wanted["model"] = generator_model(config)
    wanted["latent_shape"] = config.latent_shape
    wanted["mixed_precision"] = config.mixed_precision
    wanted["negative_prompt"] = config.data.negative_prompt
    if config.trainer == "diffusion":
        wanted["sampling"] = asdict(config.sampling)
    else:
        wanted["denoising_step_list"] = config.denoising_step_list
        wanted["timestep_shift"] = config.timestep_shift
    causal = causal_config(config)
    wanted["causal"] = None if causal is None else asdict(causal)
    wanted["weights"] = source.weights.path  # a log directory's newest checkpoint moves on
    text = json.dumps(wanted, indent=1, default=str)
    path = args.output_folder / "settings.json"
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        refuse_other_settings(args.output_folder, there, json.loads(text), holds="clips")
    session.barrier()
    if session.is_main:
        write_text(path, text)


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


def read_start(config: Config, path: Path | None) -> torch.Tensor | None:
    """The frames that clips begin with, [1, 3, P, H, W] in [-1, 1].

    Raises ConfigError unless they fit the clips: in size, and in how many a block holds.
    """
    causal = causal_config(config)
    if path is None:
        if causal is not None and causal.given_first_frame:
            raise ConfigError(
                "--initial_path: this model was trained to continue a first frame; give one, or "
                "set causal.given_first_frame=false"
            )
        return None
    if causal is None:
        raise ConfigError(
            "--initial_path: this model makes whole clips and cannot begin with given frames; "
            "use one with generator_type: causal"
        )
    try:
        clip = read_clip(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # imageio goes on with advice
        raise ConfigError(f"--initial_path: {path} is not readable: {reason}") from error
    _, frames, rows, columns = config.latent_shape
    pixels, size = clip.shape[1], (STRIDE * rows, STRIDE * columns)
    enlarged = clip.shape[2] // size[0]  # small clips are written enlarged
    if enlarged > 1 and clip.shape[2:] == (enlarged * size[0], enlarged * size[1]):
        clip = torch.nn.functional.avg_pool2d(clip, enlarged)
    if clip.shape[2:] != size:
        raise ConfigError(
            f"--initial_path: {path} is {clip.shape[2]} x {clip.shape[3]}, the clips are "
            f"{size[0]} x {size[1]} (height x width)"
        )
    if (pixels - 1) % 4:
        raise ConfigError(
            f"--initial_path: {path} has {pixels} frames; give 1 + 4 k, as latent frames hold them"
        )
    try:
        causal.split(frames, 1 + (pixels - 1) // 4)
    except ValueError as error:
        raise ConfigError(f"--initial_path: {path}: {error}") from error
    return 2.0 * clip[None] - 1.0


def run(
    args: argparse.Namespace,
    config: Config,
    source: Source,
    jobs: list[Job],
    start: torch.Tensor | None,
    session: Session,
) -> None:
    """Make what is missing. Batches are cut before ranks, so a clip's neighbours never change."""
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    mine = [
        batch
        for batch in batches[session.rank :: session.world_size]
        if not all(job.file.is_file() for job in batch)
    ]
    if mine:
        model = load_generator(config, source, session.device)
        frames = config.latent_shape[1]
        log.info("%d network evaluations per clip", model.pipeline.network_evaluations(frames))
        initial = None if start is None else model.vae.encode_to_latent(start.to(session.device))
        with tqdm(total=sum(map(len, mine)), desc="clips", disable=not session.is_main) as bar:
            for batch in mine:
                make(batch, model, args.fps, initial)
                bar.update(len(batch))
    session.barrier()
    if session.is_main:
        shown = jobs[:SHEET_CLIPS]
        clips = [read_clip(job.file) for job in shown]
        sheet = contact_sheet(clips, [job.title for job in shown])
        save_png(sheet, args.output_folder / "contact_sheet.png")
        log.info("%d clips in %s", len(jobs), args.output_folder)


def make(
    batch: Sequence[Job], model: VideoGenerator, fps: float, initial: torch.Tensor | None
) -> None:
    """Sample one batch and write its files. initial: [1, C, g, H, W], what all clips begin with."""
    if initial is not None:
        initial = initial.expand(len(batch), -1, -1, -1, -1)
    clips = model.clips([job.request for job in batch], initial=initial)
    for job, clip in zip(batch, clips, strict=True):
        save_mp4(clip, job.file, fps=fps)


def read_clip(path: Path) -> torch.Tensor:
    """A video or an image as [3, P, H, W] in [0, 1]. Raises OSError or ValueError."""
    frames = torch.from_numpy(iio.imread(path))
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected RGB frames, got an array of shape {tuple(frames.shape)}")
    return frames.permute(3, 0, 1, 2).float() / 255.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all clips; returns the exit status."""
    args = parser().parse_intermixed_args(arguments)
    try:
        config = load(args.config_path, args.overrides)
        jobs = plan(args)
        config = sized(config, args)
        start = read_start(config, args.initial_path)
        source = check_source(config, args.checkpoint_path, use_ema=args.use_ema)
    except USER_ERRORS as error:
        return fail(error)
    with distributed_session(timeout_s=config.timeout_s) as session:
        start_logging(main_rank=session.is_main)
        try:
            claim_folder(args, config, source, session)
        except USER_ERRORS as error:
            return fail(error)
        try:
            run(args, config, source, jobs, start, session)
        except KeyboardInterrupt:
            log.warning("stopped; run the same command again to continue")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
