"""Encode a folder of videos to latents: one .pt file per clip, for create_lmdb_14b_shards.py.

Each video needs its prompt in a .txt file of the same name. It is sampled at --fps, scaled to cover
--height x --width (or the best of --buckets), cropped at the centre, and cut to clips of
--num_frames from its beginning. Any number of processes (torchrun) makes the same files; those that
are there are left alone, so an interrupted call continues. What could not be used is listed in
rejected.json.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch import Tensor
from tqdm import tqdm

from model.encoders.vae import VideoVAE
from model.families.base import Model
from model.families.registry import find_model
from utils.claims import Claim, Rejected, rejection, write_rejected
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.config import ConfigError
from utils.data.captioned_clips import CaptionedVideo, Clip, pair_videos, save_clip
from utils.distributed import Session, distributed_session
from utils.errors import NotFoundError, UserError
from utils.hashes import content_hash
from utils.media.images import fit, to_signed
from utils.media.video import check_fps, frame_rate, read_frames

log = logging.getLogger(__name__)

MAX_SIDE = 8192  # pixels; no model that this project knows reads a fourth of it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    """The command line of compute_vae_latent.py."""
    result = command_parser(__doc__)
    result.add_argument("--input_video_folder", type=Path, required=True)
    result.add_argument("--output_latent_folder", type=Path, required=True)
    result.add_argument("--model_name", default="Wan2.1-T2V-14B", help="whose VAE encodes")
    result.add_argument(
        "--prompt_folder", type=Path, default=None, help="of the .txt files; default: the videos'"
    )
    result.add_argument("--model_root", type=Path, default=Path("wan_models"))
    result.add_argument("--height", type=int, default=480)
    result.add_argument("--width", type=int, default=832)
    result.add_argument(
        "--buckets", type=_size, nargs="+", default=None, metavar="HEIGHTxWIDTH",
        help="several sizes, as 480x832 832x480 640x640; a video goes to that of nearest shape",
    )  # fmt: skip
    result.add_argument("--num_frames", type=int, default=81, help="of a clip, 1 + 4 k with Wan2.1")
    result.add_argument(
        "--min_num_frames", type=int, default=None,
        help="shorter clips are cut to as many frames as latents hold, down to this; default: "
        "--num_frames",
    )  # fmt: skip
    result.add_argument(
        "--fps", type=float, default=None, help="at which videos are sampled; default: the model's"
    )
    result.add_argument(
        "--min_source_fps", type=float, default=None,
        help="slower videos, whose frames would repeat, are rejected; default: half of --fps",
    )  # fmt: skip
    result.add_argument("--clips_per_video", type=int, default=1, help="consecutive, at most")
    result.add_argument(
        "--dtype", choices=list(DTYPES), default="float32",
        help="that the VAE computes in; Wan2.1's own code takes float32",
    )  # fmt: skip
    return result


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, as 480x832")
    return int(match[1]), int(match[2])


def complete(args: argparse.Namespace, model: Model) -> argparse.Namespace:
    """The arguments with all defaults in place. Raises ConfigError for what cannot be."""
    values = dict(vars(args))
    values["buckets"] = args.buckets or [(args.height, args.width)]
    values["prompt_folder"] = args.prompt_folder or args.input_video_folder
    if args.min_num_frames is None:
        values["min_num_frames"] = args.num_frames
    if args.fps is None:
        values["fps"] = model.fps
    if args.min_source_fps is None:
        values["min_source_fps"] = values["fps"] / 2
    whole = argparse.Namespace(**values)
    problems = []
    step, stride = model.latent.pixel_step, model.latent.temporal_stride
    for height, width in whole.buckets:
        if not _divides(height, step[0]) or not _divides(width, step[1]):
            words = f"{step[0]}" if step[0] == step[1] else f"{step[0]} and {step[1]}"
            problems.append(
                f"{height} x {width}: both sides must be multiples of {words} up to {MAX_SIDE}"
            )
    if whole.num_frames < 1 or (whole.num_frames - 1) % stride:
        problems.append(
            f"--num_frames: must be 1 + {stride} k, as {1 + 20 * stride}, got {whole.num_frames}"
        )
    if not 1 <= whole.min_num_frames <= whole.num_frames:
        problems.append(
            f"--min_num_frames: must lie between 1 and --num_frames, got {whole.min_num_frames}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    check_at_least(whole, clips_per_video=1)
    check_fps(whole.fps)
    if whole.min_source_fps != 0.0:  # = any video will do
        check_fps(whole.min_source_fps, "--min_source_fps")
    return whole


def _divides(side: int, step: int) -> bool:
    return side in range(step, MAX_SIDE + 1, step)


def find_vae(args: argparse.Namespace) -> Model:
    """The model; only its codec matters. Raises NotFoundError if it has none."""
    model = find_model(args.model_root, args.model_name)
    if "codec" not in model.parts:
        found = sorted(path.name for path in model.path.iterdir())
        raise NotFoundError(f"{model.path}: has no VAE (found {found}); {model.fetch()}")
    return model


def settings(args: argparse.Namespace, model: Model) -> dict[str, object]:
    """All that latents depend on, beside the videos."""
    return {
        "sizes": [f"{height}x{width}" for height, width in args.buckets],
        "num_frames": args.num_frames,
        "min_num_frames": args.min_num_frames,
        "fps": args.fps,
        "min_source_fps": args.min_source_fps,
        "clips_per_video": args.clips_per_video,
        "vae": content_hash(model.parts["codec"]),
        "precision": args.dtype,
    }


def claim(args: argparse.Namespace, model: Model) -> Claim:
    """What makes a folder that of these latents."""
    made_with, flag = settings(args, model), "--output_latent_folder"
    return Claim(args.output_latent_folder, made_with, holds="latents", flag=flag)


def nearest_size(shape: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to that of `shape`; both (height, width)."""
    ratio = math.log(shape[0] / shape[1])
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def windows(video: CaptionedVideo, args: argparse.Namespace, stride: int) -> Iterator[list[Tensor]]:
    """The frames of each clip of a video, uint8 [3, H, W], in its final size and length.

    stride: frames to a latent frame; the first latent frame holds one.
    Raises ValueError that tells why a video has none.
    """
    rate = frame_rate(video.path)
    if rate is not None and rate < args.min_source_fps:
        raise UserError(
            f"has {rate:g} frames per second, fewer than {args.min_source_fps:g}: they would repeat"
        )
    size = None
    limit = args.clips_per_video * args.num_frames
    with contextlib.closing(read_frames(video.path, fps=args.fps, limit=limit)) as source:
        for number in range(args.clips_per_video):
            frames: list[Tensor] = []
            for frame in islice(source, args.num_frames):
                size = size or nearest_size((frame.shape[1], frame.shape[2]), args.buckets)
                frames.append(fit(frame, size))
            if len(frames) >= args.min_num_frames:
                yield frames[: (len(frames) - 1) // stride * stride + 1]
            elif number == 0:
                raise UserError(
                    f"too short: {len(frames)} frames at {args.fps:g} per second, expected at "
                    f"least {args.min_num_frames}"
                )
            if len(frames) < args.num_frames:
                return


def encode(vae: VideoVAE, frames: Sequence[Tensor]) -> Tensor:
    """Frames, uint8 [3, H, W], to latents [C, F, h, w], fp16.

    Shards hold fp16 as well: what is stored here goes there bit for bit, at half the disk of fp32.
    Raises ValueError for latents that are not finite.
    """
    encoder, stride = vae.stream_encoder(), vae.temporal_stride
    lengths = [1] + [stride] * ((len(frames) - 1) // stride)
    pieces = torch.stack(list(frames), dim=1).split(lengths, dim=1)
    latents = [encoder.encode(to_signed(piece[None])) for piece in pieces]
    stored = torch.cat(latents, dim=2)[0].half().cpu()
    if not bool(stored.isfinite().all()):
        raise UserError("its latents are not finite")
    return stored


def outputs(video: CaptionedVideo, args: argparse.Namespace) -> list[Path]:
    """Where the clips of a video go; the first is written last and tells that all are there."""
    several = args.clips_per_video > 1
    names = [f"{video.name}-{n}" if several else video.name for n in range(args.clips_per_video)]
    return [args.output_latent_folder / f"{name}.pt" for name in names]


def make(video: CaptionedVideo, vae: VideoVAE, args: argparse.Namespace) -> list[Clip]:
    """Encode the clips of one video. Raises ValueError if it is of no use."""
    return [
        Clip(
            prompt=video.prompt,
            latents=encode(vae, frames),
            first_frame=frames[0],
            video=video.name,
            fps=args.fps,
            start_s=number * args.num_frames / args.fps,
        )
        for number, frames in enumerate(windows(video, args, vae.temporal_stride))
    ]


def store(video: CaptionedVideo, clips: Sequence[Clip], args: argparse.Namespace) -> None:
    """Write the clips of one video. Raises OSError if the disk does not take them."""
    for path, clip in reversed(list(zip(outputs(video, args), clips, strict=False))):
        save_clip(path, clip)


def run(
    videos: Sequence[CaptionedVideo], vae: VideoVAE, args: argparse.Namespace, session: Session
) -> list[Rejected]:
    """Encode what is missing of this process's videos; returns those that are of no use.

    Raises OSError if the disk does not take what is encoded.
    """
    mine, rejected = videos[session.rank :: session.world_size], []
    for video in tqdm(mine, desc="videos", disable=not session.is_main):
        if outputs(video, args)[0].is_file():
            continue
        try:
            clips = make(video, vae, args)
        except (OSError, ValueError) as error:
            file = video.path.relative_to(args.input_video_folder).as_posix()
            rejected.append(rejection(file, video.path, error))
            log.warning("%s: rejected: %s", file, rejected[-1].reason)
        else:
            store(video, clips, args)
    return rejected


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Encode all videos; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        model = find_vae(args)
        args = complete(args, model)
        videos, rejected = pair_videos(args.input_video_folder, args.prompt_folder)
    except USER_ERRORS as error:
        return fail(error)
    with distributed_session() as session:
        start_logging(main_rank=session.is_main)
        folder = args.output_latent_folder
        try:
            claim(args, model).take(session)
            vae = model.load_codec(session.device, DTYPES[args.dtype])
        except USER_ERRORS as error:
            return fail(error)
        try:
            with session.uneven_work():
                useless = run(videos, vae, args, session)
            for some in session.gather(useless):
                rejected += some
            rejected.sort()
            if session.is_main:
                write_rejected(folder / "rejected.json", rejected)
        except USER_ERRORS as error:
            return fail(error)
        if session.is_main:
            used = sum(outputs(video, args)[0].is_file() for video in videos)
            log.info("%d videos are encoded in %s", used, folder)
            if rejected:
                log.warning("%d files rejected, see %s", len(rejected), folder / "rejected.json")
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
