"""Pictures while training: fixed prompts and noise through the run's own inference pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.encoders.vae import VideoVAE
from model.types import Denoiser
from pipeline.protocol import InferencePipeline, sample
from trainer.batches import BatchLoader
from utils.data.dataset import RawItem
from utils.distributed import Session
from utils.media.video import contact_sheet, save_png, to_unit
from utils.seeding import sample_rng


@dataclass(frozen=True, eq=False)
class Validator:
    """Samples the same few records again and again."""

    items: Sequence[RawItem]
    build_pipeline: Callable[[Denoiser], InferencePipeline]
    vae: VideoVAE
    folder: Path
    every: int
    seed: int
    session: Session

    def due(self, step: int) -> bool:
        """Whether samples are wanted after `step`."""
        return self.every > 0 and step % self.every == 0

    def run(self, generator: Denoiser, batches: BatchLoader, step: int) -> Path:
        """Sample with `generator` as it is; the main rank writes <folder>/step_N.png.

        Every rank samples the same clips: a sharded network needs them all.
        """
        path = self.folder / f"step_{step:06d}.png"
        pipeline = self.build_pipeline(generator)
        batch = batches.batch(self.items)
        rng = sample_rng(self.seed, "validation", range(len(self.items)), self.session.device)
        latents = sample(
            pipeline,
            batch.conditioning,
            batch.unconditional,
            batch.latent_shape,
            rng,
            initial=batch.given,
        )
        if self.session.is_main:
            clips = [self.vae.decode_to_pixel(row[None])[0] for row in latents]
            prompts = [item.prompt for item in self.items]
            save_png(contact_sheet([to_unit(clip) for clip in clips], prompts), path)
        return path
