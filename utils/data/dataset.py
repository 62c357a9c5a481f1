"""Training data: prompts from a file, a folder or LMDB shards, latents from shards, one order."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from utils import shipped
from utils.claims import REPORT, SETTINGS
from utils.data.lmdb_reading import DamagedRecordError
from utils.data.prompts import read_prompt_folder, read_prompts
from utils.data.shards import ShardReader, shard_paths
from utils.errors import NotFoundError, UserError
from utils.records import MANIFEST
from utils.seeding import generator

Part = Literal["latents", "trajectory", "image"]  # of a record, beside its caption
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, eq=False)
class RawItem:
    """One record before the encoders."""

    prompt: str
    latents: Tensor | None = None  # [C, F, H, W], fp32
    trajectory: Tensor | None = None  # [S, C, F, H, W], fp32, noise to clean
    image: Tensor | None = None  # [3, height, width], uint8, the first frame

    @property
    def shapes(self) -> RecordShapes:
        """Those of its parts."""
        return RecordShapes(
            None if self.latents is None else tuple(self.latents.shape),
            None if self.trajectory is None else tuple(self.trajectory.shape),
            None if self.image is None else (self.image.shape[1], self.image.shape[2]),
        )


@dataclass(frozen=True)
class RecordShapes:
    """How large the parts of a record are; None = it has no such part."""

    latents: tuple[int, ...] | None = None  # [C, F, H, W]
    trajectory: tuple[int, ...] | None = None  # [S, C, F, H, W]
    image: tuple[int, int] | None = None  # height and width, pixels

    def video(self, usual: Sequence[int], spatial_stride: int) -> tuple[int, int, int, int]:
        """[C, F, H, W] of a video that is made from such a record; `usual` of what it leaves open.

        As its latents; or of the size of its image, whose `spatial_stride` pixels make a latent.
        """
        channels, frames, height, width = self.latents or usual
        if self.latents is None and self.image is not None:
            height, width = (side // spatial_stride for side in self.image)
        return channels, frames, height, width


class Dataset(Protocol):
    """Random access to records, and which of them may share a batch."""

    buckets: Mapping[
        RecordShapes, Sequence[int]
    ]  # the records of each shape; all have the same parts

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawItem: ...

    def read(self, index: int, parts: Collection[Part]) -> RawItem:
        """A record with those of `parts` that it has; nothing else of it is read."""

    def prompt(self, index: int) -> str:
        """The caption of one record, without the rest."""


class Prompts:
    """Captions alone, in memory."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self.buckets: Mapping[RecordShapes, Sequence[int]] = {RecordShapes(): range(len(prompts))}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> RawItem:
        return RawItem(self.prompts[index])

    def read(self, index: int, parts: Collection[Part]) -> RawItem:
        """See Dataset: there is nothing but the caption."""
        del parts
        return self[index]

    def prompt(self, index: int) -> str:
        """The caption of one record."""
        return self.prompts[index]


class LatentShards:
    """Captions from LMDB shards, with the latents, trajectories and images that they hold."""

    def __init__(self, folder: Path) -> None:
        self._reader = ShardReader(folder)
        buckets: dict[RecordShapes, list[int]] = {}
        first = 0
        for shard in self._reader.shards:
            shapes = RecordShapes(shard.latent_shape, shard.trajectory_shape, shard.image_shape)
            buckets.setdefault(shapes, []).extend(range(first, first + shard.rows))
            first += shard.rows
        self.buckets: Mapping[RecordShapes, Sequence[int]] = buckets

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> RawItem:
        return self.read(index, PARTS)

    def read(self, index: int, parts: Collection[Part]) -> RawItem:
        """See Dataset."""
        reader = self._reader
        held = {
            "latents": reader.latent_shape,
            "trajectory": reader.trajectory_shape,
            "image": reader.image_shape,
        }
        wanted = {part for part in parts if held[part](index) is not None}
        return RawItem(
            reader.prompt(index),
            reader.latents(index) if "latents" in wanted else None,
            reader.trajectory(index) if "trajectory" in wanted else None,
            reader.image(index) if "image" in wanted else None,
        )

    def prompt(self, index: int) -> str:
        """The caption of one record, without the rest."""
        return self._reader.prompt(index)


@dataclass(frozen=True)
class TrajectoryManifest:
    """How the ODE pairs of a folder were made; also what tells a run that continues from others."""

    DESCRIBES: ClassVar[str] = "ODE pairs"

    count: int  # pairs when it is finished
    denoising_step_list: list[int]  # the states that are kept, noise first; the end comes last
    timestep_shift: float
    latent_shape: list[int]  # [C, F, H, W]
    steps: int  # Euler steps of the teacher
    cfg_scale: float
    seed: int
    prompts: str  # a hash of them
    negative_prompt: str
    mixed_precision: bool
    weights: str  # where the teacher came from
    images: bool = False  # whether all states begin with an image as their first latent frame


def captions(dataset: Dataset) -> Iterator[str | None]:
    """The caption of every record, in order; None = it cannot be read."""
    for index in range(len(dataset)):
        try:
            yield dataset.prompt(index)
        except DamagedRecordError:
            yield None


def check_finite(item: RawItem, what: str) -> None:
    """Raise DamagedRecordError if a record holds NaN or infinity. what: names it."""
    for name in ("latents", "trajectory"):
        values = getattr(item, name)
        if values is not None and not bool(values.isfinite().all()):
            raise DamagedRecordError(f"{what}: its {name} hold values that are not finite")


def open_dataset(path: Path) -> Dataset:
    """Open what lies at `path`: prompts (see read_prompts), or a folder of LMDB shards.

    Raises FileNotFoundError or ValueError with what was expected there.
    """
    path = shipped.find(path)
    if path.is_file():
        return Prompts([item.text for item in read_prompts(path)])
    if shard_paths(path):
        if (path / SETTINGS).is_file() and not (path / REPORT).is_file():
            raise UserError(
                f"{path}: scripts/create_lmdb_14b_shards.py was stopped before it was done; run "
                f"the same command again"
            )
        return LatentShards(path)
    if (path / MANIFEST).is_file():
        raise NotFoundError(
            f"{path}: has a manifest of ODE pairs but no pair yet; run "
            f"scripts/generate_ode_pairs.py again"
        )
    if not path.is_dir():
        raise NotFoundError(
            f"{path}: no such data; give a .txt file with one prompt per line, a folder of .txt "
            f"files with one prompt each, or a folder of LMDB shards"
        )
    return Prompts(read_prompt_folder(path))


class DataOrder:
    """Which record the n-th draw of a run takes; a closed form, so that a resumed run goes on.

    Each bucket is read by itself, in a new permutation each time through. Batches of one bucket
    each come in epochs, in which a bucket has batches in proportion to its size, and which shuffle
    the order of buckets.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self._buckets = buckets
        self._batch_size = batch_size
        self._seed = seed
        self._batches = [max(1, round(len(records) / batch_size)) for records in buckets]
        self._permutation = functools.lru_cache(maxsize=2 * len(buckets))(
            lambda size, epoch: torch.randperm(
                size, generator=generator(seed, "epoch", epoch)
            ).tolist()
        )
        batches = self._batches  # not self, which would be a cycle
        self._slots = functools.lru_cache(maxsize=2)(
            lambda epoch: _shuffled_slots(batches, generator(seed, "buckets", epoch))
        )

    def replacement(self, draw: int, attempt: int) -> int:
        """Another record for a draw whose own cannot be read: of its bucket, keyed as all is.

        attempt: which one, from 0 on, as they may be damaged too.
        """
        bucket, _, _, _ = self._slot(draw)
        records = self._buckets[bucket]
        rng = generator(self._seed, "replacement", draw, attempt)
        return records[int(torch.randint(len(records), (), generator=rng))]

    def _slot(self, draw: int) -> tuple[int, int, int, int]:
        """The bucket of a draw, its batches in this epoch before, the epoch, place in the batch."""
        batch, place = divmod(draw, self._batch_size)
        epoch, slot = divmod(batch, sum(self._batches))
        return *self._slots(epoch)[slot], epoch, place

    def __getitem__(self, draw: int) -> int:
        bucket, earlier, epoch, place = self._slot(draw)
        records = self._buckets[bucket]
        read = (epoch * self._batches[bucket] + earlier) * self._batch_size + place
        return records[self._permutation(len(records), read // len(records))[read % len(records)]]


def _shuffled_slots(batches: Sequence[int], rng: torch.Generator) -> list[tuple[int, int]]:
    """An epoch's batches: the bucket of each, and how many of that bucket come before it."""
    buckets = [bucket for bucket, count in enumerate(batches) for _ in range(count)]
    before = [0] * len(batches)
    slots = []
    for i in torch.randperm(len(buckets), generator=rng).tolist():
        slots.append((buckets[i], before[buckets[i]]))
        before[buckets[i]] += 1
    return slots
