"""Few steps along the student's own path, and rollouts that stop where its two experts meet.

Phased DMD (arXiv:2510.27684): the high expert's part of a sample ends at the noise level of the low
expert's first step, and is judged there. Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from model.experts import side_of
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Denoiser, Sample
from pipeline.bidirectional import BidirectionalInferencePipeline
from pipeline.few_step import OnStep, few_step, predict_x0, remembering, renoise
from utils.seeding import SampleRNG, StepRNG

Phase = Literal["high", "low", "both"]  # whose part of a sample is learnt
Walk = Literal["euler", "renoise"]  # from step to step: along the velocity, or by fresh noise


def euler_steps(
    net: Denoiser,
    x: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    end: float = 0.0,
    *,
    context: Context = FULL_ATTENTION,
    on_step: OnStep | None = None,
) -> Tensor:
    """Move x [B, C, F, H, W] from the first of falling `sigmas` over all of them to `end`, fp32.

    x_next = x + (sigma_next - sigma) velocity; no fresh noise. Returns x at `end`, so clean at 0.
    """
    context = remembering(context)
    for step, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], end], strict=True)):
        x0 = predict_x0(net, x, sigma, conditioning, context)
        x = toward(x, x0, sigma, following)
        if on_step is not None:
            on_step(step + 1, len(sigmas))
    return x


def toward(x: Tensor, x0: Tensor, sigma: float, level: float) -> Tensor:
    """x at `sigma`, moved straight toward x0 to a lower `level`: x + (level - sigma) velocity."""
    return x0 if level == 0.0 else x0 + (level / sigma) * (x - x0)


class EulerInferencePipeline(BidirectionalInferencePipeline):
    """Few steps of a student that was trained on its own path."""

    def walk(
        self,
        net: Denoiser,
        noise: Tensor,
        conditioning: Conditioning,
        rng: SampleRNG,
        on_step: OnStep | None,
    ) -> Tensor:
        """See BidirectionalInferencePipeline; the path is fixed by its noise."""
        del rng
        return euler_steps(net, noise, conditioning, self.sigmas, on_step=on_step)


class PhasedTrainingPipeline:
    """Backward simulation (see BidirectionalTrainingPipeline) of one expert's steps alone.

    high: up to a random exit among the high expert's steps; the sample is x0 as predicted there,
    and where the walk is Euler's, its state at the low expert's first level. low: through the high
    expert without gradient, then up to an exit among the low expert's steps. both: either, drawn.
    """

    def __init__(
        self, sigmas: Sequence[float], gate: float | None, phase: Phase, walk: Walk
    ) -> None:
        """gate: between the levels of the two experts; None = there is one, and one phase."""
        self.sigmas = list(sigmas)
        self.first = 0 if gate is None else sum(side_of(s, gate) == "high" for s in sigmas)
        self.phase = phase
        self.walk = walk

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """x0 [B, C, F, H, W] of `batch.conditioning`, and of the high expert where it stops."""
        high = self.first > 0 and self.draws_high(rng.shared)
        begin, end = (0, self.first) if high else (self.first, len(self.sigmas))
        # One exit for all ranks: unequal forward counts would leave sharded gathers unpaired.
        exit_step = begin + int(torch.randint(end - begin, (), generator=rng.shared))
        noise = rng.samples.randn(batch.latent_shape)
        x = self.before(generator, noise, batch.conditioning, exit_step, rng.samples)
        sigma = self.sigmas[exit_step]
        with torch.set_grad_enabled(grad):
            x0 = predict_x0(generator, x, sigma, batch.conditioning, FULL_ATTENTION)
        if not high:
            return Sample(x0)
        level = self.sigmas[self.first]
        if self.walk == "renoise":
            return Sample(x0, level=level)
        return Sample(x0, level=level, anchor=toward(x, x0.detach(), sigma, level))

    def draws_high(self, shared: torch.Generator) -> bool:
        """Whether this rollout ends with the high expert; the same on all ranks."""
        if self.phase != "both":
            return self.phase == "high"
        return bool(torch.rand((), generator=shared) < 0.5)

    @torch.no_grad()
    def before(
        self,
        generator: Denoiser,
        noise: Tensor,
        conditioning: Conditioning,
        exit_step: int,
        rng: SampleRNG,
    ) -> Tensor:
        """The state [B, C, F, H, W] that a step begins with."""
        if not exit_step:
            return noise
        done, sigma = self.sigmas[:exit_step], self.sigmas[exit_step]
        if self.walk == "euler":
            return euler_steps(generator, noise, conditioning, done, end=sigma)
        return renoise(few_step(generator, noise, conditioning, done, rng), sigma, rng)
