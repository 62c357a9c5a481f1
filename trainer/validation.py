"""Pictures while training: fixed prompts and noise through the run's own inference pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.conditioning import ConditioningEncoder
from model.types import Denoiser
from model.vae import VideoVAE
from pipeline.protocol import InferencePipeline, sample
from utils.distributed import Session
from utils.seeding import sample_rng
from utils.video import contact_sheet, save_png, to_unit


@dataclass(frozen=True, eq=False)
class Validator:
    """Samples the same few prompts again and again."""

    prompts: Sequence[str]
    build_pipeline: Callable[[Denoiser], InferencePipeline]
    vae: VideoVAE
    latent_shape: Sequence[int]
    folder: Path
    every: int
    seed: int
    session: Session

    def due(self, step: int) -> bool:
        """Whether samples are wanted after `step`."""
        return self.every > 0 and step % self.every == 0

    def run(self, generator: Denoiser, encoder: ConditioningEncoder, step: int) -> Path:
        """Sample with `generator` as it is; the main rank writes <folder>/step_N.png.

        Every rank samples the same clips: a sharded network needs them all.
        """
        path = self.folder / f"step_{step:06d}.png"
        pipeline = self.build_pipeline(generator)
        rng = sample_rng(self.seed, "validation", range(len(self.prompts)), self.session.device)
        latents = sample(
            pipeline,
            encoder.encode(self.prompts),
            encoder.unconditional(len(self.prompts)),
            self.latent_shape,
            rng,
        )
        if self.session.is_main:
            clips = [self.vae.decode_to_pixel(row[None])[0] for row in latents]
            save_png(contact_sheet([to_unit(clip) for clip in clips], self.prompts), path)
        return path
