"""A linear video codec with Wan's strides and channels: the tiny world's stand-in for the VAE.

Causal in time: frame 0 alone, then groups of k; s x s patches; principal components, whitened.
Letters: P = 1 + k (F - 1) pixel frames, pixels [B, 3, P, s H, s W] in [-1, 1], latents
[B, C, F, H, W] with zero mean and unit variance per channel. As Wan2.1: C 16, k 4, s 8; as
Wan2.2's TI2V: C 48, k 4, s 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from utils.media.frame_groups import frame_groups
from utils.weights import WeightFile, WeightsError, load_weights, write_weights

CHANNELS = 16
SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 4
FILE_NAME = "patch_codec.safetensors"
MAX_WHOLE = 1024  # rows of a covariance whose eigenvectors are all computed
ITERATIONS = 8  # right to 1e-7


@dataclass(frozen=True)
class CodecSizes:
    """What a codec makes of pixels; Wan2.1's unless said."""

    channels: int = CHANNELS
    temporal_stride: int = TEMPORAL_STRIDE
    spatial_stride: int = SPATIAL_STRIDE

    @classmethod
    def of(cls, path: Path) -> CodecSizes:
        """Those of the codec in a file, read off its shapes. Raises WeightsError if it is none."""
        shapes = WeightFile(path).shapes()
        first, group = (shapes.get(f"{name}_encode", ()) for name in ("first", "group"))
        if len(first) != 2 or len(group) != 2 or first[0] % 3 or not first[0]:
            raise WeightsError(f"{path}: does not fit the patch codec: its bases are missing")
        return cls(first[1], group[0] // first[0], math.isqrt(first[0] // 3))


WAN21 = CodecSizes()
WAN22 = CodecSizes(channels=48, spatial_stride=16)


class PatchCodec(nn.Module):
    """One basis for the first frame and one for groups of k; encode and decode are matmuls."""

    channels: int
    temporal_stride: int
    spatial_stride: int

    def __init__(self, sizes: CodecSizes = WAN21) -> None:
        super().__init__()
        self.channels = sizes.channels
        self.temporal_stride, self.spatial_stride = sizes.temporal_stride, sizes.spatial_stride
        for name, frames in (("first", 1), ("group", self.temporal_stride)):
            width = 3 * frames * self.spatial_stride**2
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_encode", torch.zeros(width, self.channels))
            self.register_buffer(f"{name}_decode", torch.zeros(self.channels, width))

    @classmethod
    def fit(cls, pixels: Tensor, sizes: CodecSizes = WAN21) -> PatchCodec:
        """Principal components of clips [B, 3, P, s H, s W]. Deterministic."""
        codec = cls(sizes)
        for name, frames in (("first", pixels[:, :, :1]), ("group", pixels[:, :, 1:])):
            rows = codec.to_patches(frames, 1 if name == "first" else codec.temporal_stride)
            rows = rows.flatten(0, 3).double()
            mean = rows.mean(dim=0)
            covariance = (rows - mean).T @ (rows - mean) / len(rows)
            values, vectors = _largest(covariance, codec.channels)
            basis = vectors.flip(1)
            largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
            basis = basis * largest.sign()  # eigenvectors have no sign of their own
            deviation = values.flip(0).sqrt()
            codec.get_buffer(f"{name}_mean").copy_(mean)
            codec.get_buffer(f"{name}_encode").copy_(basis / deviation)
            codec.get_buffer(f"{name}_decode").copy_((basis * deviation).T)
        return codec

    @classmethod
    def load(cls, path: Path) -> PatchCodec:
        """Read a codec that `save` wrote. Raises WeightsError if it is none."""
        codec = cls(CodecSizes.of(path))
        load_weights(codec, WeightFile(path), what="the patch codec")
        return codec

    def save(self, path: Path) -> None:
        """Write the codec as safetensors."""
        write_weights(self.state_dict(), path, {"codec": "patch"})

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, P, s H, s W] in [-1, 1] to latents [B, C, F, H, W]."""
        return self.stream_encoder().encode(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, H, W] to pixels [B, 3, P, s H, s W] in [-1, 1]."""
        decoder = self.stream_decoder()
        return torch.cat([decoder.decode(frame) for frame in latents.split(1, dim=2)], dim=2)

    def stream_encoder(self) -> PatchStreamEncoder:
        """An encoder for one video that arrives in pieces."""
        return PatchStreamEncoder(self)

    def stream_decoder(self) -> PatchStreamDecoder:
        """A decoder for one video that arrives in pieces."""
        return PatchStreamDecoder(self)

    def to_patches(self, frames: Tensor, stride: int) -> Tensor:
        """[B, 3, F t, H p, W q] to rows [B, F, H, W, 3 t p q], where t is `stride`."""
        return rearrange(
            frames.float(),
            "b c (f t) (h p) (w q) -> b f h w (c t p q)",
            t=stride,
            p=self.spatial_stride,
            q=self.spatial_stride,
        )

    @torch.no_grad()
    def encode_frame(self, pixels: Tensor, name: str, stride: int) -> Tensor:
        """The pixels [B, 3, stride, s H, s W] of one latent frame to [B, C, 1, H, W]."""
        frames = pixels.to(self.get_buffer(f"{name}_mean").device)
        rows = self.to_patches(frames, stride) - self.get_buffer(f"{name}_mean")
        return rearrange(rows @ self.get_buffer(f"{name}_encode"), "b f h w c -> b c f h w")

    @torch.no_grad()
    def decode_frame(self, latents: Tensor, name: str, stride: int) -> Tensor:
        """One latent frame [B, C, 1, H, W] to its pixel frames [B, 3, stride, s H, s W]."""
        rows = rearrange(latents, "b c f h w -> b f h w c") @ self.get_buffer(f"{name}_decode")
        pixels = rearrange(
            rows + self.get_buffer(f"{name}_mean"),
            "b f h w (c t p q) -> b c (f t) (h p) (w q)",
            t=stride,
            p=self.spatial_stride,
            q=self.spatial_stride,
        )
        return pixels.clamp(-1.0, 1.0)


class PatchStreamEncoder:
    """Encodes successive pixel frames of one video; equal to encoding it whole."""

    def __init__(self, codec: PatchCodec) -> None:
        self._codec = codec
        self._started = False

    def encode(self, pixels: Tensor) -> Tensor:
        """The next pixels [B, 3, p, s H, s W] to latents, p = 1 + k n at first, then k n."""
        parts = []
        codec = self._codec
        strides = codec.temporal_stride, codec.spatial_stride
        for piece in frame_groups(pixels, strides, started=self._started):
            name, stride = ("group", codec.temporal_stride) if self._started else ("first", 1)
            parts.append(codec.encode_frame(piece, name, stride))
            self._started = True
        return torch.cat(parts, dim=2)


class PatchStreamDecoder:
    """Decodes successive latent frames of one video; equal to decoding it whole."""

    def __init__(self, codec: PatchCodec) -> None:
        self._codec = codec
        self._started = False

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, C, f, H, W] to their pixels, 1 then k frames each."""
        parts = []
        for frame in latents.float().split(1, dim=2):
            name, stride = ("group", self._codec.temporal_stride) if self._started else ("first", 1)
            parts.append(self._codec.decode_frame(frame, name, stride))
            self._started = True
        return torch.cat(parts, dim=2)


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [count] of a covariance [n, n], in rising order, and their vectors.

    Of large matrices by iterating a subspace of twice as many: all of them would take a minute.
    """
    if len(matrix) <= MAX_WHOLE:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-count:], vectors[:, -count:]
    basis = matrix[:, :: len(matrix) // (2 * count)]
    for _ in range(ITERATIONS):
        basis = matrix @ torch.linalg.qr(basis).Q
    basis = torch.linalg.qr(basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    return values[-count:], (basis @ vectors)[:, -count:]
