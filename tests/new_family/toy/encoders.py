"""What the toy's text and pixels become: a table of words, and means of small squares."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoders.text import TextEncoder
from utils.media.frame_groups import frame_groups
from utils.seeding import derive_seed
from utils.weights import WeightFile, WeightsError

TEMPORAL_STRIDE, SPATIAL_STRIDE, CHANNELS = 2, 4, 6


class ToyTextEncoder(TextEncoder):
    """Each word is a row of a table, whatever stands beside it."""

    table: Tensor

    def __init__(self, path: Path, length: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        file = WeightFile(path)
        found = file.shapes().get("table", ())
        if len(found) != 2 or found[1] != width:
            raise WeightsError(f"{path}: must hold 'table' of width {width}, got {found}")
        self.length = length
        self.register_buffer("table", file.read("table").to(dtype))

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        """States [B, length, width], zero past each prompt's end."""
        states = self.table.new_zeros(len(prompts), self.length, self.table.shape[1])
        for row, prompt in zip(states, prompts, strict=True):
            words = prompt.split()[: self.length]
            for place, word in enumerate(words):
                row[place] = self.table[derive_seed(word) % len(self.table)]
        return states

    def tokens_cut(self, prompt: str) -> int:
        """How many words of a prompt the model does not read."""
        return max(0, len(prompt.split()) - self.length)


class ToyCodec:
    """Latents [B, 6, F, h, w]: the colours of two frames, in squares of 4 x 4 pixels.

    It is its own stream: nothing is kept between pieces but whether the clip has begun.
    """

    temporal_stride = TEMPORAL_STRIDE

    def __init__(self, scale: Tensor, *, started: bool = False) -> None:
        self.scale = scale
        self._started = started

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The next pixels [B, 3, p, 4 h, 4 w], p = 1 + 2 n at first, then 2 n."""
        parts = []
        strides = (TEMPORAL_STRIDE, SPATIAL_STRIDE)
        for frames in frame_groups(pixels.to(self.scale.device), strides, started=self._started):
            pair = frames.expand(-1, -1, TEMPORAL_STRIDE, -1, -1) if not self._started else frames
            self._started = True
            small = F.avg_pool3d(pair.float(), (1, SPATIAL_STRIDE, SPATIAL_STRIDE))
            parts.append(small.flatten(1, 2)[:, :, None])
        return torch.cat(parts, dim=2) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames to their pixels, 1 for the very first and 2 for each other."""
        parts = []
        for frame in latents.float().split(1, dim=2):
            pair = (frame[:, :, 0] / self.scale).unflatten(1, (3, TEMPORAL_STRIDE))
            large = F.interpolate(pair, scale_factor=(1, SPATIAL_STRIDE, SPATIAL_STRIDE))
            parts.append(large if self._started else large[:, :, :1])
            self._started = True
        return torch.cat(parts, dim=2).clamp(-1.0, 1.0)

    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """A whole clip to latents."""
        return self.stream_encoder().encode(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """The latents of a whole clip to pixels."""
        return self.stream_decoder().decode(latents)

    def stream_encoder(self) -> ToyCodec:
        """For one video that arrives in pieces."""
        return ToyCodec(self.scale)

    def stream_decoder(self) -> ToyCodec:
        """For one video that arrives in pieces."""
        return ToyCodec(self.scale)
