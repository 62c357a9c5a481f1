"""Flow matching on real latents: how a teacher is made or fine-tuned (arXiv:2210.02747)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import Method, MethodConfig, Needs
from model.causal import TeacherForced, count_blocks, on_real_video, per_block
from model.experts import boundary_problems, draw_part
from model.flow import add_noise, constant_sigma
from model.given import OnGiven, count_given, learnt, on_given
from model.types import Batch, Conditioning, Denoiser, LossOutput
from utils.seeding import StepRNG

GIVEN_NOISE = (-3.5, 0.5)  # mean and deviation of the logarithm of a given frame's noise level


@dataclass(frozen=True)
class DiffusionConfig(MethodConfig):
    """How noise levels and captions are drawn, and what a causal model sees of the past."""

    timestep_shift: float = 5.0  # of the uniform noise levels
    caption_dropout: float = 0.1  # share of samples trained on the negative prompt, for guidance
    teacher_forcing: bool = True  # causal models: the clean past; false = diffusion forcing
    clean_noise: float = 0.0  # teacher forcing: the past is noised up to this sigma, at random
    # Share of samples whose given first frame is noised a little (to about 0.03), as TI2V-5B was
    # trained with 0.2; whole videos alone. 0 = given frames are always clean.
    given_noise: float = 0.0
    # Of two experts, the noise level from which on the high one learns; None = the model's.
    boundary: float | None = None

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        if not self.timestep_shift > 0:
            yield f"loss.timestep_shift: must be positive, got {self.timestep_shift}"
        for name in ("caption_dropout", "clean_noise", "given_noise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                yield f"loss.{name}: must lie in [0, 1], got {getattr(self, name)}"
        if self.clean_noise and not self.teacher_forcing:
            yield f"loss.clean_noise: {self.clean_noise} has no effect without loss.teacher_forcing"
        yield from boundary_problems("loss.boundary", self.boundary)

    def run_problems(self, *, steps: int, causal: bool) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().run_problems(steps=steps, causal=causal)
        if not causal and 0.0 < self.clean_noise <= 1.0:
            yield "loss.clean_noise: has no effect without generator_type: causal"
        if causal and 0.0 < self.given_noise <= 1.0:
            yield (
                "loss.given_noise: has no effect with generator_type: causal, whose past "
                "loss.clean_noise noises"
            )


class Diffusion(Method):
    """Mean squared error of the velocity at a random noise level.

    Of a causal model, each block has a level of its own; the past is clean (teacher forcing) or
    as noisy as it was drawn (diffusion forcing, arXiv:2407.01392).
    """

    config_class = DiffusionConfig
    trainer = "diffusion"
    config: DiffusionConfig

    @classmethod
    def needs(cls, config: DiffusionConfig) -> Needs:
        """Real latents; the trained model follows its ODE in many steps."""
        del config
        return Needs(latents=True, sampler="many_step")

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """|| velocity(x_sigma) - (noise - x0) ||^2, averaged over samples and elements."""
        x0, layout = batch.x0, self.parts.layout
        assert x0 is not None, "a Diffusion batch carries latents"
        frames = x0.shape[2]
        part = draw_part(self.parts.experts, rng.shared, self.config.timestep_shift)
        levels = part.shifted(
            rng.samples.rand((count_blocks(layout, frames),)), self.config.timestep_shift
        )
        sigma = per_block(levels.to(x0.device), layout, frames)
        noise = rng.samples.randn(x0.shape[1:])
        dropped = rng.samples.rand((1, 1)) < self.config.caption_dropout
        text = torch.where(dropped.to(x0.device), batch.unconditional.text, batch.conditioning.text)
        conditioning = Conditioning(text, batch.conditioning.clip, batch.conditioning.first_frame)
        net = self.with_given(self.forced(x0, rng), batch.given, rng)
        x = add_noise(x0, noise, sigma)
        velocity = net(x, sigma, conditioning, context=part.context).velocity
        given = count_given(batch.given)
        return LossOutput(F.mse_loss(learnt(velocity, given), learnt(noise - x0, given)))

    def with_given(self, net: Denoiser, given: Tensor | None, rng: StepRNG) -> Denoiser:
        """`net` on videos that begin with `given`, which is noised a little as often as asked."""
        if given is None or not self.config.given_noise:
            return on_given(net, given)
        mean, deviation = GIVEN_NOISE
        level = (mean + deviation * rng.samples.randn((1,)).to(given.device)).exp().clamp(max=1.0)
        noised = rng.samples.rand((1,)).to(given.device) < self.config.given_noise
        level = torch.where(noised, level, constant_sigma(0.0, given))
        return OnGiven(net, add_noise(given, rng.samples.randn(given.shape[1:]), level), level)

    def forced(self, x0: Tensor, rng: StepRNG) -> Denoiser:
        """The generator on the past that training forces on it: of the video x0, clean or noisy."""
        layout, forced = self.parts.layout, self.config.teacher_forcing
        if layout is None or not forced or not self.config.clean_noise:
            return on_real_video(self.generator, layout, x0 if forced else None)
        level = self.config.clean_noise * rng.samples.rand((1,)).to(x0.device)
        past = add_noise(x0, rng.samples.randn(x0.shape[1:]), level)
        return TeacherForced(self.generator, layout, past, level)
