"""Few-step samples of a bidirectional generator: the training rollout and its inference twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.flow import constant_sigma
from model.types import Batch, Conditioning, Denoiser, Sample
from pipeline.few_step import few_step, renoise
from utils.seeding import SampleRNG, StepRNG


class BidirectionalTrainingPipeline:
    """Backward simulation (DMD2, arXiv:2405.14867 sec. 4.5): what inference would have made.

    Steps before a random exit run without gradient, the exit step with it, later ones not at all.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = list(sigmas)

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """x0 [B, C, F, H, W] of `batch.conditioning` after exit + 1 network evaluations."""
        # One exit for all ranks: unequal forward counts would leave sharded gathers unpaired.
        exit_step = int(torch.randint(len(self.sigmas), (), generator=rng.shared))
        x = rng.samples.randn(batch.latent_shape)
        with torch.no_grad():
            if exit_step:
                x = few_step(generator, x, batch.conditioning, self.sigmas[:exit_step], rng.samples)
                x = renoise(x, self.sigmas[exit_step], rng.samples)
        sigma = constant_sigma(self.sigmas[exit_step], x)
        with torch.set_grad_enabled(grad):
            return Sample(generator(x, sigma, batch.conditioning).x0)


class BidirectionalInferencePipeline:
    """All steps over the whole clip at once: one network evaluation each, no guidance."""

    def __init__(self, generator: Denoiser, sigmas: Sequence[float]) -> None:
        self.generator = generator
        self.sigmas = list(sigmas)

    @property
    def steps(self) -> int:
        """How many noise levels are visited."""
        return len(self.sigmas)

    @property
    def network_evaluations(self) -> int:
        """How often the network runs per sample."""
        return len(self.sigmas)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        latent_shape: Sequence[int],
        rng: SampleRNG,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, F, H, W] for `conditioning`; latent_shape: [C, F, H, W]."""
        del unconditional  # a distilled generator needs none
        noise = rng.randn(latent_shape)
        return few_step(self.generator, noise, conditioning, self.sigmas, rng, on_step=on_step)
