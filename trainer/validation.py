"""Pictures while training: fixed prompts and noise through the run's own inference pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.encoders.vae import VideoVAE
from model.types import Denoiser
from pipeline.protocol import sample
from trainer.batches import BatchLoader
from trainer.run import Run
from utils.data.dataset import RawItem
from utils.distributed import Session
from utils.media.video import contact_sheet, save_png, to_unit
from utils.seeding import sample_rng


@dataclass(frozen=True, eq=False)
class Validator:
    """Samples the same few records again and again."""

    run: Run
    items: Sequence[RawItem]
    vae: VideoVAE
    folder: Path
    session: Session

    def show(self, generator: Denoiser, batches: BatchLoader, step: int) -> Path:
        """Sample with `generator` as it is; the main rank writes <folder>/step_N.png.

        Every rank samples the same clips: a sharded network needs them all.
        """
        path = self.folder / f"step_{step:06d}.png"
        given = self.run.given_share > 0.0 and self.run.config.validation.prompts is None
        batch = batches.batch(self.items, given=given)
        seed = self.run.config.seed
        rng = sample_rng(seed, "validation", range(len(self.items)), self.session.device)
        latents = sample(
            self.run.pipeline(generator),
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
