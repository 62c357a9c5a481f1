"""What every inference pipeline offers to training, the command line and the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.types import Conditioning
from pipeline.few_step import OnStep
from utils.errors import UserError
from utils.seeding import SampleRNG


@dataclass(frozen=True)
class Progress:
    """How far a batch of clips is: so many parts of one stage of its making."""

    stage: Literal["denoise", "decode"]  # network steps, or latent frames to pixels
    done: int
    total: int  # of this stage


OnProgress = Callable[[Progress], None]


class InferencePipeline(Protocol):
    """Turns conditioning into latents."""

    def adjusted(
        self, *, steps: int | None = None, cfg_scale: float | None = None
    ) -> InferencePipeline:
        """The same sampler with other settings; None = as it is. Raises UserError if it has none.

        steps: of a clip, or of each block of a causal model.
        """

    def steps(self, frames: int) -> int:
        """How often `on_step` is called per batch of clips of `frames` latent frames."""

    def network_evaluations(self, frames: int) -> int:
        """How often the network runs per such clip; a guided step counts twice."""

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
        """Latents [B, C, f, H, W] of B clips, piece by piece, each as soon as it is known.

        latent_shape: [C, F, H, W] of the whole clips. initial: [B, C, g, H, W], frames that they
        begin with; the first piece repeats them. Raises ValueError where that is not possible.
        """


def sample(
    pipeline: InferencePipeline,
    conditioning: Conditioning,
    unconditional: Conditioning,
    latent_shape: Sequence[int],
    rng: SampleRNG,
    *,
    initial: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """All of a pipeline's stream: latents [B, C, F, H, W], fp32."""
    pieces = pipeline.stream(
        conditioning, unconditional, latent_shape, rng, initial=initial, on_step=on_step
    )
    return torch.cat(list(pieces), dim=2)


def refuse_filling(initial: Tensor | None, latent_shape: Sequence[int]) -> None:
    """Raise UserError if the frames to begin with leave none of [C, F, H, W] to make."""
    if initial is not None and initial.shape[2] >= latent_shape[1]:
        raise UserError(
            f"{initial.shape[2]} given frames of {latent_shape[1]} leave none to make; give fewer, "
            f"or make longer clips"
        )


def refuse_adjusting(steps: int | None, cfg_scale: float | None) -> None:
    """Raise UserError if there is something to adjust: for pipelines of distilled generators."""
    if steps is not None or cfg_scale is not None:
        raise UserError("a distilled generator has fixed steps and no guidance")
