"""From draws of the data order to encoded batches on the device, read ahead by a thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from model.conditioning import ConditioningEncoder, first_latents
from model.encoders.idle import Encoders
from model.encoders.vae import VideoVAE
from model.types import Batch, Keyframes
from trainer.faults import Share
from trainer.run import Run
from utils.data.dataset import DataOrder, Dataset, Part, RawItem, check_finite
from utils.data.lmdb_reading import DamagedRecordError
from utils.errors import UserError
from utils.media.images import to_signed
from utils.seeding import generator

CAPTION = 80  # characters of a prompt that name a sample
TRIES = 16  # other records for one that is damaged; if all are, no more than that can be said


@dataclass(frozen=True)
class Skipped:
    """A record that could not be read when it was drawn, and which took its place."""

    draw: int  # of the run's data order
    record: int
    replacement: int
    reason: str


@dataclass(frozen=True, eq=False)
class _Read:
    """What some draws gave."""

    items: list[RawItem]
    skipped: list[Skipped]


class BatchLoader:
    """Reads records, and encodes what the networks are conditioned on.

    A record that is damaged is replaced by another, which depends on the seed and the draw alone.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        encoder: ConditioningEncoder,
        encoders: Encoders,
        vae: VideoVAE | None = None,
    ) -> None:
        """encoders: what `encoder` and `vae` are made of.

        vae: for batches that begin with images, of data without latents.
        """
        self.run = run
        self.dataset = dataset
        self.encoder = encoder
        self.encoders = encoders
        self.device = encoders.device
        self.vae = vae
        config = run.config
        self.order = DataOrder(list(dataset.buckets.values()), config.batch_size, config.seed)
        self.parts = read_parts(run, dataset)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: dict[tuple[int, ...], Future[_Read]] = {}
        self.skipped: list[Skipped] = []  # in batches that were handed out, and not told yet

    def __call__(self, draws: int, indices: Sequence[int]) -> Batch:
        """The samples at `indices` of the global batch that begins at draw number `draws`."""
        wanted = tuple(draws + i for i in indices)
        ahead = self._ahead.pop(wanted, None)
        read = self._read(wanted) if ahead is None else ahead.result()
        self.skipped += read.skipped
        return self.batch(read.items, given=self.begins(draws))

    def begins(self, draws: int) -> bool:
        """Whether the global batch that begins at draw number `draws` begins with given frames.

        Keyed by the batch alone: ranks and micro-batches must agree, since a causal rollout runs
        other passes then; so do the phases of a step that are handed the same samples.
        """
        share = self.run.given_share
        if share in (0.0, 1.0):
            return share == 1.0
        rng = generator(self.run.config.seed, "image share", draws)
        return float(torch.rand((), generator=rng)) < share

    def prefetch(self, draws: int, indices: Sequence[int]) -> None:
        """Begin to read what `__call__` will be asked for next; other reads ahead are dropped."""
        wanted = tuple(draws + i for i in indices)
        self._ahead = {wanted: self._reader.submit(self._read, wanted)}

    def take_skipped(self) -> list[Skipped]:
        """What was skipped in batches since this was last asked."""
        taken, self.skipped = self.skipped, []
        return taken

    def share(self, draws: int, parts: Sequence[Sequence[int]], losses: Sequence[Tensor]) -> Share:
        """This rank's samples of a phase, named, whose losses may not have been finite.

        draws: where the global batch begins; parts: positions in it, by micro-batch, as losses.
        """
        finite = [bool(torch.isfinite(loss)) for loss in losses]
        wanted = [draws + i for part in parts for i in part]
        records = [self.order[draw] for draw in wanted]
        suspect = [not fine for part, fine in zip(parts, finite, strict=True) for _ in part]
        return Share(wanted, records, [self._caption(record) for record in records], suspect)

    def _caption(self, record: int) -> str:
        try:
            return self.dataset.prompt(record)[:CAPTION]
        except (OSError, UserError):  # it may be damaged, which is why it is named
            return ""

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)
        self._ahead = {}  # a record in memory would keep its LMDB open

    def _read(self, draws: Sequence[int]) -> _Read:
        skipped: list[Skipped] = []
        return _Read([self._read_one(draw, skipped) for draw in draws], skipped)

    def _read_one(self, draw: int, skipped: list[Skipped]) -> RawItem:
        """The record of a draw, or another in its place, which is added to `skipped`."""
        record, faults = self.order[draw], dict[int, str]()
        for attempt in range(TRIES):
            if record not in faults:
                try:
                    item = self.dataset.read(record, self.parts)
                    check_finite(item, f"{self.run.config.data.path}: record {record}")
                except DamagedRecordError as error:
                    faults[record] = str(error)
                else:
                    skipped += [Skipped(draw, bad, record, why) for bad, why in faults.items()]
                    return item
            record = self.order.replacement(draw, attempt)
        raise DamagedRecordError(
            f"no record could be read in place of record {self.order[draw]}, {len(faults)} were "
            f"tried: {next(iter(faults.values()))}; mend the data, then run the same command again"
        )

    def batch(self, items: Sequence[RawItem], *, given: bool) -> Batch:
        """Records of one shape, encoded; `given`: they begin with their first latent frames."""
        with self.encoders.held():
            return self._batch(items, given=given)

    def _batch(self, items: Sequence[RawItem], *, given: bool) -> Batch:
        x0 = self._stack(item.latents for item in items)
        images = self._stack(item.image for item in items)
        first = None if images is None else to_signed(images)
        shape = self.run.latent_shape
        if self.run.config.data.buckets:
            shape = items[0].shapes.video(shape, self.run.model.latent.spatial_stride)
        keyframes = Keyframes(first) if first is not None and self.encoder.reads_images else None
        conditioning = self.encoder.encode(
            [item.prompt for item in items], keyframes, frames=shape[1]
        )
        trajectory = self._stack(item.trajectory for item in items)
        clean = x0 if trajectory is None else trajectory[:, -1]
        return Batch(
            conditioning=conditioning,
            unconditional=self.encoder.unconditional(conditioning),
            latent_shape=shape,
            x0=x0,
            given=self._first_frames(clean, first) if given else None,
            trajectory=trajectory,
        )

    def _first_frames(self, clean: Tensor | None, first: Tensor | None) -> Tensor:
        """First latent frames [B, C, 1, H, W] of clean videos, or without them of images."""
        if clean is not None:
            return clean[:, :, :1]
        assert self.vae is not None, "a given first frame needs latents, or images and the VAE"
        assert first is not None, "a given first frame needs latents or images"
        return first_latents(self.vae, first)

    def _stack(self, tensors: Iterable[Tensor | None]) -> Tensor | None:
        """One tensor per sample as a batch on the device, where the data has them."""
        found = [tensor for tensor in tensors if tensor is not None]
        if not found:
            return None
        batch = torch.stack(found)
        if self.device.type == "cuda":  # pinned, so that the copy waits for nothing
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)


def read_parts(run: Run, dataset: Dataset) -> set[Part]:
    """What of its records a run uses; the rest is not read."""
    held, given = next(iter(dataset.buckets)), run.given_share > 0.0
    parts: set[Part] = set()
    if run.needs.latents or (given and not run.needs.trajectories):
        parts.add("latents")
    if run.needs.trajectories:
        parts.add("trajectory")
    elif given and held.latents is None:
        parts.add("image")
    if run.reads_images:
        parts.add("image")
    if run.config.data.buckets:  # their shapes tell the sample's
        parts.add("image" if held.latents is None else "latents")
    return parts
