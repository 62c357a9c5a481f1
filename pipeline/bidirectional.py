"""Few-step samples of a bidirectional generator: the training rollout and its inference twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.given import count_given, on_given
from model.types import FULL_ATTENTION, Batch, Conditioning, Denoiser, Sample, Walk
from pipeline.few_step import OnStep, euler_steps, few_step, predict_x0, state_at
from pipeline.protocol import refuse_adjusting, refuse_filling
from utils.seeding import SampleRNG, StepRNG


class BidirectionalTrainingPipeline:
    """Backward simulation (DMD2, arXiv:2405.14867 sec. 4.5): what inference would have made.

    Steps before a random exit run without gradient, the exit step with it, later ones not at all.
    """

    def __init__(self, sigmas: Sequence[float], walk: Walk = "renoise") -> None:
        self.sigmas = list(sigmas)
        self.walk = walk

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """x0 [B, C, F, H, W] of `batch.conditioning` after exit + 1 network evaluations.

        Begins with `batch.given`, which the generator sees clean.
        """
        # One exit for all ranks: unequal forward counts would leave sharded gathers unpaired.
        exit_step = int(torch.randint(len(self.sigmas), (), generator=rng.shared))
        net, text = on_given(generator, batch.given), batch.conditioning
        noise, done = rng.samples.randn(batch.latent_shape), self.sigmas[: exit_step + 1]
        x = state_at(net, noise, text, done, rng.samples, walk=self.walk)
        with torch.set_grad_enabled(grad):
            x0 = predict_x0(net, x, done[-1], text, FULL_ATTENTION)
        return Sample(x0, given_frames=count_given(batch.given))


class BidirectionalInferencePipeline:
    """All steps over the whole clip at once: one network evaluation each, no guidance."""

    def __init__(self, generator: Denoiser, sigmas: Sequence[float]) -> None:
        self.generator = generator
        self.sigmas = list(sigmas)

    def adjusted(
        self, *, steps: int | None = None, cfg_scale: float | None = None
    ) -> BidirectionalInferencePipeline:
        """See pipeline.protocol.InferencePipeline; there is nothing to adjust."""
        refuse_adjusting(steps, cfg_scale)
        return self

    def steps(self, frames: int) -> int:
        """See pipeline.protocol.InferencePipeline."""
        del frames
        return len(self.sigmas)

    def network_evaluations(self, frames: int) -> int:
        """One per step."""
        return self.steps(frames)

    def stream(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        latent_shape: Sequence[int],
        rng: SampleRNG,
        *,
        initial: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Tensor]:
        """The whole clip at once; a distilled generator needs no negative prompt."""
        del unconditional
        refuse_filling(initial, latent_shape)
        net = on_given(self.generator, initial)
        with torch.no_grad():
            x0 = self.walk(net, rng.randn(latent_shape), conditioning, rng, on_step)
        yield x0

    def walk(
        self,
        net: Denoiser,
        noise: Tensor,
        conditioning: Conditioning,
        rng: SampleRNG,
        on_step: OnStep | None,
    ) -> Tensor:
        """All steps from the noise to x0, [B, C, F, H, W]."""
        return few_step(net, noise, conditioning, self.sigmas, rng, on_step=on_step)


class EulerInferencePipeline(BidirectionalInferencePipeline):
    """Few steps of a student that was trained on its own path, without fresh noise."""

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
