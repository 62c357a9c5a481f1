"""What every inference pipeline offers to training, the command line and the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from model.types import Conditioning
from utils.seeding import SampleRNG


class InferencePipeline(Protocol):
    """Turns conditioning into latents."""

    @property
    def steps(self) -> int:
        """How often `on_step` is called per batch."""

    @property
    def network_evaluations(self) -> int:
        """How often the network runs per sample; a guided step counts twice."""

    def sample(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        latent_shape: Sequence[int],
        rng: SampleRNG,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, F, H, W] for B prompts; latent_shape: [C, F, H, W].

        `on_step(done, total)` is called after each step.
        """
