"""How videos are made block by block: the settings, and the noise levels of each block's steps.

Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from model.causal import CausalLayout
from model.flow import TIMESTEPS

# Settings of training rollouts alone.
ROLLOUT_KEYS = (
    "kv_gradient", "same_step_across_blocks", "last_step_only", "gradient_frames",
    "rollout_frames", "given_first_frame",
)  # fmt: skip


@dataclass(frozen=True)
class CausalConfig(CausalLayout):
    """The layout, and how a generator is rolled out over it in training."""

    context_noise: float = 0.0  # timestep in [0, 1000) of the noise on the past, also in inference
    kv_gradient: Literal["detach", "straight_through"] = "detach"  # into earlier blocks
    same_step_across_blocks: bool = True  # one exit step for all blocks, or one for each
    last_step_only: bool = False  # always run all steps
    gradient_frames: int | None = None  # only blocks within the last so many; None = the scored
    rollout_frames: int | None = None  # make up to so many, score the last latent_shape[1] of them
    given_first_frame: bool = False  # begin with the data's first latent frame, or its image

    def problems(self, frames: int) -> Iterator[str]:
        """What is impossible about these settings for videos of `frames` latent frames."""
        found = list(super().problems(frames))
        yield from found
        if not 0.0 <= self.context_noise < TIMESTEPS:
            yield f"causal.context_noise: must lie in [0, 1000), got {self.context_noise}"
        if found:
            return
        last = self.blocks(frames)[-1]
        if self.gradient_frames is not None and self.gradient_frames < last:
            yield (
                f"causal.gradient_frames: must hold the last block, {last} or more, or be null, "
                f"got {self.gradient_frames}"
            )
        if self.rollout_frames is not None and self.rollout_frames < frames:
            yield (
                f"causal.rollout_frames: must be at least the {frames} frames of latent_shape, "
                f"got {self.rollout_frames}"
            )
        elif self.rollout_frames is not None and self.rollout_frames > frames == 1:
            yield "causal.rollout_frames: must be null or 1 if one frame is scored (latent_shape)"
        elif self.rollout_frames is not None:
            try:
                self.blocks(self.rollout_frames)
            except ValueError as error:
                yield f"causal.rollout_frames: {error}"
        if self.given_first_frame:
            try:
                self.split(frames, 1)
            except ValueError as error:
                yield (
                    f"causal.given_first_frame: {error}; set causal.independent_first_frame=true"
                )


@dataclass(frozen=True)
class BlockSigmas:
    """Noise levels of the steps of each block, descending from 1."""

    later: Sequence[float]
    first: Sequence[float] | None = None  # of the block that a video begins with; None = as later

    def of(self, frame: int) -> list[float]:
        """Those of the block that begins at `frame` of its video."""
        return list(self.later if frame or self.first is None else self.first)
