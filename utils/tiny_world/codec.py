"""A linear video codec with Wan's strides and channels: the tiny world's stand-in for the VAE.

Causal in time: frame 0 alone, then groups of 4; 8 x 8 patches; principal components, whitened.
Letters: P = 1 + 4 (F - 1) pixel frames, pixels [B, 3, P, 8 H, 8 W] in [-1, 1], latents
[B, 16, F, H, W] with zero mean and unit variance per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from utils.errors import UserError
from utils.strides import SPATIAL_STRIDE, TEMPORAL_STRIDE
from utils.weights import WeightFile, load_weights, write_weights

CHANNELS = 16
FILE_NAME = "patch_codec.safetensors"


class PatchCodec(nn.Module):
    """One basis for the first frame and one for groups of four; encode and decode are matmuls."""

    def __init__(self) -> None:
        super().__init__()
        for name, frames in (("first", 1), ("group", TEMPORAL_STRIDE)):
            width = 3 * frames * SPATIAL_STRIDE**2
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_encode", torch.zeros(width, CHANNELS))
            self.register_buffer(f"{name}_decode", torch.zeros(CHANNELS, width))

    @classmethod
    def fit(cls, pixels: Tensor) -> PatchCodec:
        """Principal components of clips [B, 3, P, 8 H, 8 W]. Deterministic."""
        codec = cls()
        for name, frames in (("first", pixels[:, :, :1]), ("group", pixels[:, :, 1:])):
            rows = _to_patches(frames, 1 if name == "first" else TEMPORAL_STRIDE)
            rows = rows.flatten(0, 3).double()
            mean = rows.mean(dim=0)
            values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
            basis = vectors[:, -CHANNELS:].flip(1)
            largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
            basis = basis * largest.sign()  # eigenvectors have no sign of their own
            deviation = values[-CHANNELS:].flip(0).sqrt()
            codec.get_buffer(f"{name}_mean").copy_(mean)
            codec.get_buffer(f"{name}_encode").copy_(basis / deviation)
            codec.get_buffer(f"{name}_decode").copy_((basis * deviation).T)
        return codec

    @classmethod
    def load(cls, path: Path) -> PatchCodec:
        """Read a codec that `save` wrote. Raises WeightsError if it is none."""
        codec = cls()
        load_weights(codec, WeightFile(path), what="the patch codec")
        return codec

    def save(self, path: Path) -> None:
        """Write the codec as safetensors."""
        write_weights(self.state_dict(), path, {"codec": "patch"})

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, P, 8 H, 8 W] in [-1, 1] to latents [B, 16, F, H, W]."""
        return self.stream_encoder().encode(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """latents [B, 16, F, H, W] to pixels [B, 3, P, 8 H, 8 W] in [-1, 1]."""
        decoder = self.stream_decoder()
        return torch.cat([decoder.decode(frame) for frame in latents.split(1, dim=2)], dim=2)

    def stream_encoder(self) -> PatchStreamEncoder:
        """An encoder for one video that arrives in pieces."""
        return PatchStreamEncoder(self)

    def stream_decoder(self) -> PatchStreamDecoder:
        """A decoder for one video that arrives in pieces."""
        return PatchStreamDecoder(self)

    @torch.no_grad()
    def encode_frame(self, pixels: Tensor, name: str, stride: int) -> Tensor:
        """The pixels [B, 3, stride, 8 H, 8 W] of one latent frame to [B, 16, 1, H, W]."""
        frames = pixels.to(self.get_buffer(f"{name}_mean").device)
        rows = _to_patches(frames, stride) - self.get_buffer(f"{name}_mean")
        return rearrange(rows @ self.get_buffer(f"{name}_encode"), "b f h w c -> b c f h w")

    @torch.no_grad()
    def decode_frame(self, latents: Tensor, name: str, stride: int) -> Tensor:
        """One latent frame [B, 16, 1, H, W] to its pixel frames [B, 3, stride, 8 H, 8 W]."""
        rows = rearrange(latents, "b c f h w -> b f h w c") @ self.get_buffer(f"{name}_decode")
        pixels = rearrange(
            rows + self.get_buffer(f"{name}_mean"),
            "b f h w (c t p q) -> b c (f t) (h p) (w q)",
            t=stride,
            p=SPATIAL_STRIDE,
            q=SPATIAL_STRIDE,
        )
        return pixels.clamp(-1.0, 1.0)


class PatchStreamEncoder:
    """Encodes successive pixel frames of one video; equal to encoding it whole."""

    def __init__(self, codec: PatchCodec) -> None:
        self._codec = codec
        self._started = False

    def encode(self, pixels: Tensor) -> Tensor:
        """The next pixels [B, 3, p, 8 H, 8 W] to latents, p = 1 + 4 k at first, then 4 k."""
        parts = []
        for piece in frame_groups(pixels, started=self._started):
            name, stride = ("group", TEMPORAL_STRIDE) if self._started else ("first", 1)
            parts.append(self._codec.encode_frame(piece, name, stride))
            self._started = True
        return torch.cat(parts, dim=2)


class PatchStreamDecoder:
    """Decodes successive latent frames of one video; equal to decoding it whole."""

    def __init__(self, codec: PatchCodec) -> None:
        self._codec = codec
        self._started = False

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, 16, f, H, W] to their pixels, 1 then 4 frames each."""
        parts = []
        for frame in latents.float().split(1, dim=2):
            name, stride = ("group", TEMPORAL_STRIDE) if self._started else ("first", 1)
            parts.append(self._codec.decode_frame(frame, name, stride))
            self._started = True
        return torch.cat(parts, dim=2)


def frame_groups(pixels: Tensor, *, started: bool) -> Iterator[Tensor]:
    """The pixels of one latent frame after the other: [B, 3, 1, H, W] at first, then four frames.

    started: the clip's first frame came earlier. Raises ValueError for pixels [B, 3, P, H, W] whose
    frames or sides cannot be grouped.
    """
    frames, height, width = pixels.shape[2:]
    if (frames - (not started)) % TEMPORAL_STRIDE or not frames:
        wanted = "every later piece of a clip must have" if started else "a clip must have 1 +"
        raise UserError(f"{wanted} 4 k frames, got {frames}")
    if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        raise UserError(f"the sides of a clip must be multiples of 8, got {height} x {width}")
    groups = [] if started else [1]
    return iter(pixels.split(groups + [TEMPORAL_STRIDE] * (frames // TEMPORAL_STRIDE), dim=2))


def _to_patches(frames: Tensor, stride: int) -> Tensor:
    """[B, 3, F t, H p, W q] to rows [B, F, H, W, 3 t p q]."""
    return rearrange(
        frames.float(),
        "b c (f t) (h p) (w q) -> b f h w (c t p q)",
        t=stride,
        p=SPATIAL_STRIDE,
        q=SPATIAL_STRIDE,
    )
