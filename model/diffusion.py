"""Flow matching on real latents: how a teacher is made or fine-tuned (arXiv:2210.02747)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.base import Method, MethodConfig
from model.flow import add_noise, shift
from model.types import Batch, Conditioning, Denoiser, LossOutput
from utils.seeding import StepRNG


@dataclass(frozen=True)
class DiffusionConfig(MethodConfig):
    """How noise levels and captions are drawn."""

    timestep_shift: float = 5.0  # of the uniform noise levels
    caption_dropout: float = 0.1  # share of samples trained on the negative prompt, for guidance

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        if not self.timestep_shift > 0:
            yield f"loss.timestep_shift: must be positive, got {self.timestep_shift}"
        if not 0.0 <= self.caption_dropout <= 1.0:
            yield f"loss.caption_dropout: must lie in [0, 1], got {self.caption_dropout}"


class Diffusion(Method):
    """Mean squared error of the velocity at a random noise level."""

    needs_latents = True
    config_class = DiffusionConfig

    def __init__(self, config: DiffusionConfig, networks: Mapping[str, Denoiser]) -> None:
        self.config = config
        self.generator = networks["generator"]

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """|| velocity(x_sigma) - (noise - x0) ||^2, averaged over samples and elements."""
        x0 = batch.x0
        assert x0 is not None, "a Diffusion batch carries latents"
        sigma = shift(rng.samples.rand((1,)), self.config.timestep_shift).to(x0.device)
        noise = rng.samples.randn(x0.shape[1:])
        dropped = rng.samples.rand((1, 1)) < self.config.caption_dropout
        text = torch.where(dropped.to(x0.device), batch.unconditional.text, batch.conditioning.text)
        conditioning = Conditioning(text, batch.conditioning.clip, batch.conditioning.first_frame)
        velocity = self.generator(add_noise(x0, noise, sigma), sigma, conditioning).velocity
        return LossOutput(F.mse_loss(velocity, noise - x0))
