"""Rollouts that stop where a student's two experts meet.

Phased DMD (arXiv:2510.27684): the high expert's part of a sample ends at the noise level of the low
expert's first step, and is judged there. Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from model.experts import side_of
from model.types import FULL_ATTENTION, Batch, Denoiser, Sample, Walk
from pipeline.few_step import predict_x0, state_at, toward
from utils.seeding import StepRNG

Phase = Literal["high", "low", "both"]  # whose part of a sample is learnt


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
        done, text, sigma = self.sigmas[: exit_step + 1], batch.conditioning, self.sigmas[exit_step]
        x = state_at(generator, noise, text, done, rng.samples, walk=self.walk)
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
