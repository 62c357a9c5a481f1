"""Samples of a generator from real videos: noised, and predicted in one pass (CausVid)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.causal import CausalLayout, count_blocks, on_real_video, per_block
from model.flow import add_noise, on_device
from model.given import count_given, on_given
from model.types import Batch, Denoiser, Sample
from pipeline.blocks import BlockSigmas
from utils.seeding import StepRNG


class DataRollout:
    """Real latents, each block at one listed noise level of its own, predicted at once.

    What CausVid (arXiv:2412.07772) trains on in place of its own samples: cheap, since one pass
    makes all blocks, but the past that a block sees is never the generator's own.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        layout: CausalLayout | None,
        *,
        teacher_forcing: bool,
        first_sigmas: Sequence[float] | None = None,
    ) -> None:
        """layout None: a bidirectional generator, with one noise level per video.

        teacher_forcing: blocks see the clean past instead of the noisy one. first_sigmas: of a
        video's first block; None = as of all others.
        """
        self.sigmas = BlockSigmas(sigmas, first_sigmas)
        self.layout = layout
        self.teacher_forcing = teacher_forcing

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """x0 [B, C, F, H, W], predicted from `batch.x0` and `batch.conditioning`.

        Begins with `batch.given`, which the generator sees clean.
        """
        clean = batch.x0
        assert clean is not None, "a DataRollout needs real latents"
        frames = clean.shape[2]
        draws = rng.samples.rand((count_blocks(self.layout, frames),)).to(clean.device)
        sigma = per_block(self.drawn(draws), self.layout, frames)
        noisy = add_noise(clean, rng.samples.randn(clean.shape[1:]), sigma)
        net = on_real_video(generator, self.layout, clean if self.teacher_forcing else None)
        net = on_given(net, batch.given)
        with torch.set_grad_enabled(grad):
            x0 = net(noisy, sigma, batch.conditioning).x0
        return Sample(x0, given_frames=count_given(batch.given))

    def drawn(self, draws: Tensor) -> Tensor:
        """Draws [B, blocks] in [0, 1) to a listed level of each block."""
        first, later = (on_device(self.sigmas.of(frame), draws.device) for frame in (0, 1))
        levels = later[(draws * len(later)).long()]
        if self.sigmas.first is not None:
            levels[:, 0] = first[(draws[:, 0] * len(first)).long()]
        return levels
