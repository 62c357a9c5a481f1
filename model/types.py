"""The types that travel between rooms, and the words and letters of this code base.

Words: generator (the student), critic (the fake score), teacher (the real score), x0 (clean
latents), noise, sigma (noise level in [0, 1]), timestep (1000 sigma, Wan's embedding only),
velocity (noise - x0), cfg_scale (1 = no guidance), rollout (how the generator makes a sample).

Letters: B batch, C latent channels, F latent frames, H W latent height and width, L text tokens,
N video tokens, D width of the transformer, k temporal stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from model.wan.context import FULL_ATTENTION, Context, Side
from utils.errors import UserError
from utils.seeding import StepRNG

__all__ = [
    "FULL_ATTENTION",
    "Batch",
    "Conditioning",
    "Context",
    "Denoiser",
    "FeatureSpec",
    "Keyframes",
    "LatentSpec",
    "LossOutput",
    "Prediction",
    "Rollout",
    "Sample",
    "Side",
    "StepRNG",
    "Walk",
]

# From one of few steps to the next: by fresh noise on what is predicted, or along the velocity.
Walk = Literal["renoise", "euler"]


@dataclass(frozen=True)
class LatentSpec:
    """How a model's latents relate to pixels and to tokens.

    The first latent frame holds one pixel frame and every other `temporal_stride` of them.
    """

    channels: int
    temporal_stride: int  # pixel frames to a latent frame
    spatial_stride: int  # pixels to a latent row or column
    patch: tuple[int, int]  # latent rows and columns to a token; tokens never span frames

    def pixel_frames(self, frames: int) -> int:
        """Pixel frames of so many latent frames."""
        return 1 + self.temporal_stride * (frames - 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """Latent frames of so many pixel frames. Raises UserError unless they come out even."""
        if pixel_frames < 1 or (pixel_frames - 1) % self.temporal_stride:
            raise UserError(
                f"{pixel_frames} pixel frames: must be 1 + {self.temporal_stride} k, as latent "
                f"frames hold them"
            )
        return 1 + (pixel_frames - 1) // self.temporal_stride

    def pixel_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of latents of `height` x `width`."""
        return self.spatial_stride * height, self.spatial_stride * width

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of pixels of `size`. Raises UserError."""
        height, width = size
        if height % self.spatial_stride or width % self.spatial_stride:
            raise UserError(
                f"{height} x {width} pixels: sides must be multiples of {self.spatial_stride}"
            )
        return height // self.spatial_stride, width // self.spatial_stride

    @property
    def pixel_step(self) -> tuple[int, int]:
        """The least steps of a clip's height and width: the pixels of one token."""
        return self.spatial_stride * self.patch[0], self.spatial_stride * self.patch[1]

    def nearest_size(self, shape: tuple[int, int], area: int) -> tuple[int, int]:
        """The size of about `area` pixels with the aspect ratio of `shape`, in whole tokens."""
        factor = math.sqrt(area / (shape[0] * shape[1]))
        height, width = (
            max(1, round(side * factor / step)) * step
            for side, step in zip(shape, self.pixel_step, strict=True)
        )
        return height, width

    def size_of_image(self, shape: tuple[int, int], area: int) -> tuple[int, int]:
        """The size of at most `area` pixels for clips that begin with an image of `shape`.

        As TI2V-5B was released: whole steps that fit, counted along one side first and then along
        the other; of both ways the one nearer to the image's aspect ratio.
        """
        rows, columns = self.pixel_step
        wanted = shape[1] / shape[0]  # width over height
        width = whole_steps(math.sqrt(area * wanted), columns)
        wide = (whole_steps(area / width, rows), width)
        height = whole_steps(math.sqrt(area / wanted), rows)
        high = (height, whole_steps(area / height, columns))

        def error(size: tuple[int, int]) -> float:
            ratio = size[1] / size[0]
            return max(wanted / ratio, ratio / wanted)

        return wide if error(wide) < error(high) else high

    def tokens(self, shape: Sequence[int]) -> int:
        """How many tokens the transformer sees of latents [C, F, H, W]."""
        _, frames, height, width = shape
        return frames * (height // self.patch[0]) * (width // self.patch[1])

    def problems(self, shape: Sequence[int]) -> Iterator[str]:
        """Why the model cannot make latents of `shape`, [C, F, H, W]; one sentence each."""
        channels, _, height, width = shape
        if channels != self.channels:
            yield f"has {channels} channels, the model makes {self.channels}"
        if height % self.patch[0] or width % self.patch[1]:
            yield (
                f"{height} x {width} does not divide into patches of "
                f"{self.patch[0]} x {self.patch[1]}"
            )


def whole_steps(length: float, step: int) -> int:
    """The greatest multiple of `step` that `length` holds, but one step at least."""
    return max(1, int(length // step)) * step


@dataclass(frozen=True)
class FeatureSpec:
    """The features of a denoiser that discriminator heads read: [B, N, width] after each layer."""

    layers: int
    width: int
    heads: int
    eps: float


@dataclass(frozen=True, eq=False)
class Keyframes:
    """Images that videos begin with and, for first-last-frame models, end with."""

    first: Tensor  # [B, 3, height, width], pixels in [-1, 1]
    last: Tensor | None = None  # of the same shape

    def row(self, index: int) -> Keyframes:
        """Those of one sample, as a batch of one."""
        rows = slice(index, index + 1)
        return Keyframes(self.first[rows], None if self.last is None else self.last[rows])


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the denoiser is conditioned on. Never mutated; `dataclasses.replace` makes a new one."""

    text: Tensor  # [B, L, text_dim] encoder states, zero past each prompt's end
    clip: Tensor | None = None  # [B, n per image, image_dim] CLIP states of the keyframes, I2V only
    first_frame: Tensor | None = None  # [B, k + C, F, H, W] mask and latents of them, I2V only

    def frames(self, first: int, last: int) -> Conditioning:
        """The part that belongs to frames first .. last, the last one not included."""
        if self.first_frame is None:
            return self
        return replace(self, first_frame=self.first_frame[:, :, first:last])


@dataclass(frozen=True, eq=False)
class Prediction:
    """One network evaluation, in both parameterisations; fp32."""

    x0: Tensor  # [B, C, F, H, W]
    velocity: Tensor  # [B, C, F, H, W], noise - x0


class Denoiser(Protocol):
    """A network behind Wan's flow parameterisation."""

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """Predict from x [B, C, F, H, W] at noise level sigma [B, 1] or [B, F] in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss receives: a raw batch after the encoders."""

    conditioning: Conditioning
    unconditional: Conditioning  # the negative prompt, same batch size, same image
    latent_shape: tuple[int, int, int, int]  # [C, F, H, W] of the samples to make
    x0: Tensor | None = None  # [B, C, F, H, W] real latents, when the data has them
    given: Tensor | None = None  # [B, C, g, H, W], frames that its samples begin with
    trajectory: Tensor | None = None  # [B, S, C, F, H, W] a teacher's states, noise to clean


@dataclass(frozen=True, eq=False)
class Sample:
    """What a rollout hands to an objective."""

    x0: Tensor  # [B, C, F, H, W], fp32; carries a gradient when the rollout was asked to
    given_frames: int = 0  # so many frames at the start are not the generator's: no loss on them
    level: float = 0.0  # the noise level that the generator's part of it ends at: judged above it
    anchor: Tensor | None = None  # what the sampler holds there, without gradient; None = not it


class Rollout(Protocol):
    """Makes samples from the generator the way that inference will."""

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """Samples of `batch.conditioning`; `grad`: whether they carry the generator's gradient."""


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss and what is worth watching about it."""

    loss: Tensor  # scalar, the mean over the local batch
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars, on device
