"""Prompts to mp4 files, on any number of processes with one result; interrupted calls continue."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils import start

if __name__ == "__main__":  # before torch is imported
    start.begin()

import torch

from model.folders.adapter_words import FORM, HELP
from pipeline.fields import RequestError, add_flags, from_words, parse
from pipeline.generator import VideoGenerator
from pipeline.protocol import OnProgress
from pipeline.request import (
    FPS,
    Capabilities,
    ImageFile,
    Request,
    footprint_problem,
    joint_problems,
)
from trainer.bars import Bars
from trainer.config import Config, generator_model, load
from trainer.decoders import add_vae_flags, read_tiny_vae, vae_settings
from trainer.plan_command import add_plan_flags, need_unless_planning, plan_inference
from trainer.serving import Source, capabilities, check_source, load_generator, sampling_settings
from trainer.starts import check_images, footage, read_start, tell_fits
from trainer.teams import Team, add_team_flags, check_team, read_team, team_meshes
from utils.cli import USER_ERRORS, command_parser, fail, path_word, start_logging, stopped
from utils.config import ConfigError
from utils.data.dataset import open_dataset
from utils.data.prompts import PromptItem, merged, read_image_prompts, read_prompts, with_extended
from utils.data.shards import shard_paths
from utils.distributed import Session, distributed_session
from utils.errors import UserError
from utils.hashes import sha256_of
from utils.media.clip_files import ClipNotes
from utils.media.clip_names import clip_stems, default_samples
from utils.media.given_frames import Given, Size, picture_size
from utils.media.manifest import ClipRecord, claim_folder, finish_manifest
from utils.media.video import contact_sheet, read_video, save_mp4, save_png

log = logging.getLogger(__name__)

SHEET_CLIPS = 12  # on the contact sheet
VBENCH_FOLDER = "videos"  # the tool takes every file beside a clip for one
NEEDED = ("checkpoint_path", "data_path", "output_folder")  # unless clips are only planned
# Fields of a request that all clips of a call share; the flag of each is named alike.
SHARED = ("seed", "negative_prompt", "size", "frames", "steps", "cfg_scale")


@dataclass(frozen=True)
class Job:
    """One clip and the file that it goes to."""

    request: Request
    item: PromptItem
    size: Size  # of the clip
    file: Path


@dataclass(frozen=True, eq=False)
class Plan:
    """A command line, checked: nothing heavy has been read for it."""

    config: Config
    source: Source
    model: Capabilities
    shared: Request  # what all clips have in common; its prompt stands for theirs
    jobs: list[Job]  # all clips to make, in order
    start: Given | None  # what they begin with
    team: Team  # the ranks that make a clip together
    tiny_vae: Path | None  # what decodes; None = the model's codec


def parser() -> argparse.ArgumentParser:
    """The command line of inference.py."""
    result = command_parser(__doc__)
    add = result.add_argument
    add("--config_path", type=path_word, required=True, help="the run's YAML file")
    add(
        "--checkpoint_path", type=path_word,
        help="log directory, training checkpoint, weight file or model folder",
    )  # fmt: skip
    add(
        "--data_path", type=path_word,
        help="one prompt per line, a table (.json, .jsonl, .csv, .tsv), or a folder of .txt files",
    )  # fmt: skip
    add("--extended_prompt_path", type=path_word, help="of --data_path, line by line or by file")
    add(
        "--i2v", action="store_true",
        help="clips begin with images: --data_path is a folder of images, each with its .txt",
    )  # fmt: skip
    add(
        "--image_size", choices=("configured", "aspect"), default="configured",
        help="of clips that begin with images: as configured, or of that area with their aspect",
    )  # fmt: skip
    add("--adapter", action="append", default=[], metavar=FORM, help=HELP)
    add("--output_folder", type=path_word, help="where clips go")
    add("--use_ema", action="store_true", help="the averaged weights")
    add("--num_samples", type=int, default=None, help="clips per prompt (1; --vbench: 5 or 25)")
    add_flags(result, Request, SHARED)
    add("--save_with_index", action="store_true", help="name files by number")
    add("--vbench", action="store_true", help="names and numbers of clips as VBench wants them")
    add("--num_output_frames", type=int, default=None, help="length in latent frames")
    add(
        "--initial_path", type=path_word,
        help="an image or a video that every clip begins with (causal models)",
    )  # fmt: skip
    add("--batch_size", type=int, default=1, help="clips at a time on each process")
    add("--fps", type=float, default=None, help="of the files; default: the model's")
    add_vae_flags(result)
    add_team_flags(result)
    add_plan_flags(result, fits=False)
    add("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def prepare(args: argparse.Namespace) -> Plan:
    """All that a call will do. Raises ConfigError, OSError or ValueError for bad input."""
    config = load(args.config_path, args.overrides)
    check_arguments(args)
    source = check_source(config, args.checkpoint_path, use_ema=args.use_ema, adapters=args.adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    team = read_team(args)
    model = capabilities(source.run, device, context=team.context)
    shared = read_shared(args, model)
    start = read_start(config, model, shared, args.initial_path, images=args.i2v)
    jobs = list_jobs(args, model, replace(shared, initial=footage(start)))
    items = [job.item for job in jobs] if args.i2v else None
    check_images(source.model.path, model, shared, items)
    check_jobs(args, model, jobs)
    check_team(team, model, source.model.features.heads, shared, [job.size for job in jobs])
    return Plan(config, source, model, shared, jobs, start, team, read_tiny_vae(args, source.model))


def read_shared(args: argparse.Namespace, model: Capabilities) -> Request:
    """What the flags ask of every clip. Raises RequestError with all that is wrong."""
    values, found = parse(Request, {"prompt": "-", **from_words(Request, args)}, model, named(args))
    if (count := args.num_output_frames) is not None:
        if args.frames is not None:
            found.append("--frames: with --num_output_frames there are two lengths; give one")
        elif fault := model.length_problem(count):
            found.append(f"--num_output_frames {count}: causal.num_frame_per_block: {fault}")
        values["frames"] = model.latent.pixel_frames(count)
    if found:
        raise RequestError(found)
    return Request(**values)


def named(args: argparse.Namespace) -> Callable[[str], str]:
    """Fields of a request as this command line has them."""

    def name_of(name: str) -> str:
        if name in ("first_image", "last_image"):
            return "--i2v"
        if name == "frames" and args.num_output_frames is not None:
            return "--num_output_frames"
        if name in ("frames", "size") and getattr(args, name) is None:
            return "latent_shape" if args.frames is None else "--frames"
        return {"initial": "--initial_path"}.get(name, f"--{name}")

    return name_of


def list_jobs(args: argparse.Namespace, model: Capabilities, shared: Request) -> list[Job]:
    """All clips to make. Raises ValueError or FileNotFoundError for bad prompts."""
    items = read_items(args)
    stems = clip_stems(items, by_index=args.save_with_index, vbench=args.vbench)
    jobs = []
    for stem, item in zip(stems, items, strict=True):
        kind = ("_ema" if args.use_ema else "_regular") if args.save_with_index else ""
        size = clip_size(args, model, shared, item)
        images = [ImageFile(picture, model.scale) for picture in item.pictures]
        first, last = (*images, None, None)[:2]
        wanted = replace(shared, prompt=item.text, size=size, first_image=first, last_image=last)
        for sample in range(args.num_samples or default_samples(item, vbench=args.vbench)):
            file = clip_folder(args) / f"{stem}-{sample}{kind}.mp4"
            jobs.append(Job(replace(wanted, sample=sample), item, size, file))
    return jobs


def check_jobs(args: argparse.Namespace, model: Capabilities, jobs: Sequence[Job]) -> None:
    """Raise RequestError for what clips ask for that cannot be, each problem once."""
    name_of = named(args)
    found = {
        line: None for job in jobs for line in joint_problems(job.request, model, name_of=name_of)
    }
    largest = max(batches(jobs, args.batch_size), key=len)
    crowd = footprint_problem(largest[0].request, model, clips=len(largest))
    if crowd and not found:
        found[f"--batch_size: {crowd}"] = None
    if found:
        raise RequestError(found)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for values and combinations that mean nothing."""
    for flag in ("num_samples", "batch_size", "num_output_frames"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag}: must be at least 1, got {value}")
    try:
        if args.fps is not None:
            FPS.parse(args.fps)
    except UserError as error:
        raise ConfigError(f"--fps: {error}") from error
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
    args: argparse.Namespace, model: Capabilities, shared: Request, item: PromptItem
) -> Size:
    """Height and width of a clip. Raises FileNotFoundError or ValueError for a bad image."""
    size = shared.size or model.size
    # Read even where their sizes do not count: a bad image is told before a model is loaded.
    shapes = [picture_size(picture) for picture in item.pictures]
    if not shapes or args.image_size == "configured":
        return size
    return model.size_of_image(shapes[0], size[0] * size[1])


def rate(args: argparse.Namespace, plan: Plan) -> float:
    """Frames per second of the files."""
    return plan.source.model.fps if args.fps is None else float(args.fps)


def settings_of(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What all clips of a folder share, as JSON has it."""
    config, model, shared = plan.config, plan.model, plan.shared
    keys = (
        "data_path", "extended_prompt_path", "use_ema", "seed", "save_with_index", "i2v",
        "image_size", "vbench", "num_output_frames", "initial_path", "batch_size",
    )  # fmt: skip
    wanted: dict[str, Any] = {key: getattr(args, key) for key in keys}
    original = args.extended_prompt_path is None
    wanted["fps"] = rate(args, plan)
    wanted["protocol"] = "original prompts" if original else "extended prompts"
    wanted["model"] = generator_model(config)
    wanted["seed"] = shared.seed
    wanted["latent_shape"] = list(shared.shape(model))
    wanted["frames"] = shared.frames or model.frames
    wanted["size"] = list(shared.size or model.size)
    wanted["mixed_precision"] = config.mixed_precision
    negative = shared.negative_prompt
    wanted["negative_prompt"] = config.data.negative_prompt if negative is None else negative
    wanted |= sampling_settings(config, model, shared) | vae_settings(plan.tiny_vae)
    wanted |= plan.source.settings()
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


def run(args: argparse.Namespace, plan: Plan, session: Session, whole: Iterable[str]) -> None:
    """Make what is missing. Batches are cut before ranks, so a clip's neighbours never change.

    whole: names of the clips that are there, in the output folder.
    """
    jobs, team = plan.jobs, team_meshes(plan.team, session)
    done = {args.output_folder / name for name in whole}
    notes = ClipNotes(args.output_folder, session.rank)
    mine = [
        batch
        for batch in list(batches(jobs, args.batch_size))[session.data_rank :: session.data_world]
        if not all(job.file in done for job in batch)
    ]
    with session.uneven_work():
        if mine:
            model = load_generator(plan.source, session.device, team, tiny_vae=plan.tiny_vae)
            log.info("%d network evaluations per clip", model.network_evaluations(plan.shared))
            with Bars(sum(map(len, mine)), shown=session.is_main) as bars:
                for batch in mine:
                    if session.leads:
                        make(batch, model, rate(args, plan), bars.inner, notes)
                    else:  # the leader writes what its team samples
                        model.latents([job.request for job in batch])
                    bars.outer(len(batch))
    written = session.gather(notes.digests)
    if session.is_main:
        shown = jobs[:SHEET_CLIPS]
        clips = [read_video(job.file) for job in shown]
        sheet = contact_sheet(clips, [job.item.title for job in shown])
        save_png(sheet, args.output_folder / "contact_sheet.png")
        finish_manifest(args.output_folder, written)
        log.info("%d clips in %s", len(jobs), args.output_folder)


def batches(jobs: Sequence[Job], count: int) -> Iterator[list[Job]]:
    """Jobs in groups of up to `count` that can be made at a time."""
    open_: dict[Hashable, list[Job]] = {}
    for job in jobs:
        batch = open_.setdefault(job.request.batch_key, [])
        batch.append(job)
        if len(batch) == count:
            yield open_.pop(job.request.batch_key)
    yield from open_.values()


def make(
    batch: Sequence[Job],
    model: VideoGenerator,
    fps: float,
    on_progress: OnProgress,
    notes: ClipNotes,
) -> None:
    """Sample one batch, write its files and note them."""
    clips = model.clips([job.request for job in batch], on_progress=on_progress)
    for job, clip in zip(batch, clips, strict=True):
        notes.add(job.file, save_mp4(clip, job.file, fps=fps, parts=notes.folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all clips; returns the exit status."""
    words = parser()
    args = words.parse_intermixed_args(arguments)
    need_unless_planning(words, args, NEEDED)
    start_logging()
    try:
        if args.plan:
            print(plan_inference(load(args.config_path, args.overrides), args))
            return 0
        plan = prepare(args)
    except USER_ERRORS as error:
        return fail(error)
    except KeyboardInterrupt:
        return stopped(log)
    with distributed_session(timeout_s=plan.config.timeout_s) as all_ranks:
        session = replace(all_ranks, group=plan.team.ranks)
        start_logging(main_rank=session.is_main)
        try:
            settings, clips = settings_of(args, plan), records(plan.jobs, args.output_folder)
            whole = claim_folder(args.output_folder, settings, plan.source.files, clips, session)
            if session.is_main:
                tell_fits({p: job.size for job in plan.jobs for p in job.item.pictures}, plan.start)
            run(args, plan, session, whole)
        except USER_ERRORS as error:  # such as damaged encoders, or a full disk
            return fail(error)
        except KeyboardInterrupt:
            return stopped(log)
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
