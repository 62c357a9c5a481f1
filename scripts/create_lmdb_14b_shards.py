"""Gather encoded clips in LMDB shards: what `data.path` of a training run names.

Reads the .pt files of compute_vae_latent.py, or those of another system that map prompts to
latents. Clips of one shape share shards, so a folder may hold several resolutions and lengths. Any
number of processes (torchrun) makes the same shards; an interrupted call continues after its last
record. What was not taken is listed in report.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from torch import Tensor
from tqdm import tqdm

from utils import start
from utils.claims import (
    REPORT,
    Claim,
    Rejected,
    read_rejected,
    rejection,
    write_rejected,
)
from utils.cli import (
    USER_ERRORS,
    check_at_least,
    command_parser,
    fail,
    interruptible,
    start_logging,
)
from utils.data.captioned_clips import (
    CaptionedVideo,
    Clip,
    clip_files,
    pair_videos,
    read_encoded_clips,
)
from utils.data.shards import ShardWriter
from utils.distributed import Session, distributed_session
from utils.errors import UserError
from utils.files import write_text
from utils.media.images import fit
from utils.media.video import read_frames

log = logging.getLogger(__name__)

STRIDES = {16: 8, 48: 16}  # of the autoencoders of Wan2.1 and Wan2.2, by channels
REJECTED = "rejected.json"  # beside a shard's data: what its process could not take


def parser() -> argparse.ArgumentParser:
    """The command line of create_lmdb_14b_shards.py."""
    result = command_parser(__doc__)
    result.add_argument("--data_path", type=Path, required=True, help="folder of .pt files")
    result.add_argument(
        "--prompt_path", type=Path, default=None,
        help="with --video_path: folder of the videos' .txt files",
    )  # fmt: skip
    result.add_argument(
        "--video_path", type=Path, default=None,
        help="folder of videos, for .pt files without a first frame: that of the video with the "
        "same prompt is taken",
    )  # fmt: skip
    result.add_argument(
        "--spatial_stride", type=int, default=None,
        help="with --video_path: pixels to a latent, of the model whose latents these are "
        "(default: of Wan's autoencoder with as many channels)",
    )  # fmt: skip
    result.add_argument("--lmdb_path", type=Path, required=True)
    result.add_argument("--num_shards", type=int, default=16, help="of each shape, at most")
    result.add_argument("--min_prompt_chars", type=int, default=0, help="reject shorter prompts")
    result.add_argument(
        "--drop_duplicates", action="store_true",
        help="of several videos with one prompt take the first alone",
    )  # fmt: skip
    result.add_argument("--no_images", action="store_true", help="store no first frames")
    return result


Videos = Mapping[str, Sequence[CaptionedVideo]]  # by prompt


@dataclass(frozen=True)
class Item:
    """One clip that goes to the shards."""

    file: str  # from --data_path
    number: int  # in that file
    prompt: str
    source: str  # what tells two clips of one video from two videos with one prompt
    shape: tuple[int, ...]  # of the latents, [C, F, h, w]
    has_frame: bool


@dataclass(frozen=True)
class Plan:
    """What goes where, the same for every process."""

    shards: Mapping[str, Sequence[Item]]
    rejected: Sequence[Rejected]
    duplicates: Sequence[Rejected]  # clips of another video with a prompt that came before
    videos: Videos  # for items without a first frame
    images: bool

    @property
    def count(self) -> int:
        """How many items there are."""
        return sum(map(len, self.shards.values()))


def survey(folder: Path, *, progress: bool) -> Iterator[Item | Rejected]:
    """What each file of a folder holds, without reading the tensors."""
    for path in tqdm(clip_files(folder), desc="survey", disable=not progress):
        file = path.relative_to(folder).as_posix()
        try:
            clips = read_encoded_clips(path)
        except (OSError, ValueError) as error:
            yield rejection(file, path, error)
            continue
        for number, clip in enumerate(clips):
            source, shape = clip.video or f"{file}/{number}", tuple(clip.latents.shape)
            frame = clip.first_frame is not None
            yield Item(file, number, clip.prompt.strip(), source, shape, frame)


def plan(args: argparse.Namespace, *, progress: bool) -> Plan:
    """Sort out what is taken. Raises FileNotFoundError or ConfigError if nothing can be."""
    check_at_least(args, num_shards=1, min_prompt_chars=0, spatial_stride=1)
    videos = find_videos(args)
    found = list(survey(args.data_path, progress=progress))
    items = [entry for entry in found if isinstance(entry, Item)]
    rejected = [entry for entry in found if isinstance(entry, Rejected)]
    images = not args.no_images and (bool(videos) or any(item.has_frame for item in items))
    duplicates, kept = [], []
    first_of: dict[str, Item] = {}  # by prompt
    for item in items:
        fault = _fault(item, args, videos if images else None)
        if fault is not None:
            rejected.append(Rejected(item.file, fault))
            continue
        first = first_of.setdefault(item.prompt, item)
        again = first.source != item.source
        if again:
            duplicates.append(Rejected(item.file, f"has the prompt of {first.file}"))
        if not (again and args.drop_duplicates):
            kept.append(item)
    if not kept:
        first_fault = "; ".join(f"{entry.file}: {entry.reason}" for entry in rejected[:1])
        raise UserError(f"{args.data_path}: holds no clip of use ({first_fault})")
    return Plan(_shards(kept, args.num_shards), rejected, duplicates, videos, images)


def find_videos(args: argparse.Namespace) -> dict[str, list[CaptionedVideo]]:
    """The videos that first frames may be taken from, by prompt."""
    videos: dict[str, list[CaptionedVideo]] = {}
    if args.video_path is not None and not args.no_images:
        pairs, _ = pair_videos(args.video_path, args.prompt_path or args.video_path)
        for pair in pairs:
            same = videos.setdefault(pair.prompt, [])
            if not (same and args.drop_duplicates):
                same.append(pair)
    return videos


def candidates(item: Item, videos: Videos) -> Sequence[CaptionedVideo]:
    """The videos that an item may be from: those of its prompt, of its name if one has it."""
    found = videos.get(item.prompt, ())
    return [video for video in found if video.name == item.source] or found


def stride_of(item: Item, args: argparse.Namespace) -> int | None:
    """Pixels to a latent of an item; None = nobody says."""
    given: int | None = args.spatial_stride
    return STRIDES.get(item.shape[0]) if given is None else given


def _fault(item: Item, args: argparse.Namespace, videos: Videos | None) -> str | None:
    """Why an item cannot be taken. videos: None = no first frame is wanted."""
    min_chars = args.min_prompt_chars
    if not item.prompt:
        return "an empty prompt"
    if len(item.prompt) < min_chars:
        return f"a prompt of {len(item.prompt)} characters, shorter than {min_chars}"
    if videos is None or item.has_frame:
        return None
    return _frame_fault(item, args, candidates(item, videos))


def _frame_fault(
    item: Item, args: argparse.Namespace, found: Sequence[CaptionedVideo]
) -> str | None:
    """Why an item's first frame cannot be taken from one of these videos."""
    if not found:
        return "has no first frame, and no video has its prompt; see --video_path, --no_images"
    if len(found) > 1:
        return (
            f"has no first frame, and {found[0].name} and {found[1].name} both have its prompt, so "
            f"that nobody knows which it is from; see --no_images"
        )
    if stride_of(item, args) is None:
        return f"has {item.shape[0]} channels, of no known autoencoder: give --spatial_stride"
    return None


def _shards(items: Sequence[Item], num_shards: int) -> dict[str, list[Item]]:
    """The items of each shard: of one shape, dealt out in turn."""
    shards: dict[str, list[Item]] = {}
    counts: dict[tuple[int, ...], int] = {}
    for item in items:
        number = counts.get(item.shape, 0)
        counts[item.shape] = number + 1
        words = "x".join(map(str, item.shape))
        shards.setdefault(f"shard_{words}_{number % num_shards:05d}", []).append(item)
    return shards


def settings(args: argparse.Namespace, work: Plan) -> dict[str, object]:
    """All that the shards depend on."""
    digest = hashlib.blake2b(digest_size=8)
    for name, items in work.shards.items():
        digest.update(json.dumps([name, [asdict(item) for item in items]]).encode())
    made_with: dict[str, object] = {
        "content of --data_path": f"{work.count} clips ({digest.hexdigest()})",
        "num_shards": args.num_shards,
        "min_prompt_chars": args.min_prompt_chars,
        "images": work.images,
    }
    if args.spatial_stride not in (None, STRIDES[16]):  # folders of before this choice go on
        made_with["spatial_stride"] = args.spatial_stride
    return made_with


def load(item: Item, args: argparse.Namespace, work: Plan) -> tuple[Tensor, Tensor | None]:
    """The latents [C, F, h, w], fp16, and the first frame, uint8 [3, H, W], of one item.

    Raises ValueError or OSError if they are of no use.
    """
    clip = read_encoded_clips(args.data_path / item.file)[item.number]
    latents = clip.latents.to(torch.float16)
    if not bool(latents.isfinite().all()):
        raise UserError("its latents are not finite")
    return latents, first_frame(clip, item, work, stride_of(item, args)) if work.images else None


def first_frame(clip: Clip, item: Item, work: Plan, stride: int | None) -> Tensor:
    """The picture that a clip begins with, uint8 [3, stride h, stride w]."""
    if clip.first_frame is not None:
        return clip.first_frame
    assert stride is not None, "such items are rejected"
    height, width = item.shape[-2:]
    (video,) = candidates(item, work.videos)
    with contextlib.closing(read_frames(video.path, limit=1)) as frames:
        return fit(next(frames), (stride * height, stride * width))


def fill(
    folder: Path, items: Sequence[Item], args: argparse.Namespace, work: Plan, bar: tqdm
) -> None:
    """Append to one shard what it lacks.

    Each item adds a record or a line to the shard's rejected.json, so the two together tell where
    a killed call stopped.
    """
    rejected = read_rejected(folder / REJECTED)
    with ShardWriter(folder) as writer:
        done = writer.rows + len(rejected)
        bar.update(done)
        for item in items[done:]:
            try:
                latents, frame = load(item, args, work)
            except (OSError, ValueError) as error:
                rejected.append(rejection(item.file, args.data_path / item.file, error))
                write_rejected(folder / REJECTED, rejected)
                log.warning("%s: rejected: %s", item.file, rejected[-1].reason)
            else:
                images = None if frame is None else frame[None]
                writer.append([item.prompt], latents[None], images=images)
            bar.update()


def run(args: argparse.Namespace, work: Plan, session: Session) -> None:
    """Fill this process's shards."""
    mine = sorted(work.shards)[session.rank :: session.world_size]
    total = sum(len(work.shards[name]) for name in mine)
    with tqdm(total=total, desc="records", disable=not session.is_main) as bar:
        for name in mine:
            fill(args.lmdb_path / name, work.shards[name], args, work, bar)


def report(args: argparse.Namespace, work: Plan) -> dict[str, object]:
    """What was taken and what was not, with reasons."""
    late = [
        entry for name in work.shards for entry in read_rejected(args.lmdb_path / name / REJECTED)
    ]
    rejected = sorted([*work.rejected, *late])
    return {
        "records": work.count - len(late),
        "images": work.images,
        "duplicates": len(work.duplicates),
        "duplicates_dropped": args.drop_duplicates,
        "rejected": len(rejected),
        "duplicate_files": [asdict(entry) for entry in work.duplicates],
        "rejected_files": [asdict(entry) for entry in rejected],
    }


def claim(args: argparse.Namespace, work: Plan) -> Claim:
    """What makes a folder that of these shards."""
    return Claim(
        args.lmdb_path, settings(args, work), holds="shards", flag="--lmdb_path",
        results="**/data.mdb",
    )  # fmt: skip


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Make all shards; returns the exit status."""
    args = parser().parse_args(arguments)
    with distributed_session() as session:
        start_logging(main_rank=session.is_main)
        try:
            work = plan(args, progress=session.is_main)
            claim(args, work).take(session)
        except USER_ERRORS as error:
            return fail(error)
        try:
            with session.uneven_work():
                run(args, work, session)
            if session.is_main:
                summary = report(args, work)
                text = json.dumps(summary, indent=1, ensure_ascii=False)
                write_text(args.lmdb_path / REPORT, text + "\n")
        except USER_ERRORS as error:
            return fail(error)
        if session.is_main:
            log.info(
                "%s: %d records; %d with the prompt of another video were %s, %d files were "
                "rejected, see report.json",
                args.lmdb_path, summary["records"], summary["duplicates"],
                "dropped" if args.drop_duplicates else "kept", summary["rejected"],
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
