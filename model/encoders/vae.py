"""The video autoencoder: pixels to normalised latents and back, whole or as a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.encoders.vae_names import to_diffusers
from model.folders import component
from utils.media.frame_groups import frame_groups
from utils.weights import WeightFile, Weights, WeightsError


class VideoVAE(Protocol):
    """Pixels [B, 3, P, H, W] in [-1, 1] to normalised latents [B, C, F, h, w] and back.

    P = 1 + k (F - 1), where k is the temporal stride.
    """

    @property
    def temporal_stride(self) -> int:
        """Pixel frames to a latent frame; the first holds one."""

    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """Pixels to latents, all at once."""

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """Latents to pixels, all at once."""

    def stream_encoder(self) -> StreamEncoder:
        """An encoder for one video that arrives in pieces."""

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one video that arrives in pieces."""


class StreamEncoder(Protocol):
    """Encodes successive pixel frames of one video."""

    def encode(self, pixels: Tensor) -> Tensor:
        """The next pixels to latents: 1 + k n frames in the first call, k n in each other."""


class StreamDecoder(Protocol):
    """Decodes successive latent frames of one video."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames to their pixels, 1 for the very first and k for each other."""


class WanVAEWrapper(nn.Module):
    """diffusers' AutoencoderKLWan with Wan's latent normalisation, whole or as a stream.

    Strides 4 in time and 8 in space: P = 1 + 4 (F - 1) pixel frames. Both directions go one latent
    frame at a time in either use, so a stream equals the whole bit for bit, and a long clip needs
    no more device memory than a short one: its pixels may stay on the CPU.
    """

    temporal_stride = 4
    spatial_stride = 8

    vae: Any
    mean: Tensor
    std: Tensor

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        config: Any = vae.config
        mean = torch.tensor(config.latents_mean[: config.z_dim]).view(1, -1, 1, 1, 1)
        std = torch.tensor(config.latents_std[: config.z_dim]).view(1, -1, 1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> WanVAEWrapper:
        """Read a diffusers VAE folder, or an official Wan2.1_VAE.pth of any width.

        Raises WeightsError that lists what is missing, unexpected or of another shape.
        """
        vae, weights = open_vae(path)
        component.fill(vae, weights, dtype, what="Wan2.1's autoencoder")
        return cls(vae)

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, P, 8 h, 8 w] in [-1, 1] to the posterior's mean [B, C, F, h, w]."""
        return self.stream_encoder().encode(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, h, w] to pixels [B, 3, P, 8 h, 8 w] in [-1, 1], fp32."""
        return self.stream_decoder().decode(latents)

    def stream_encoder(self) -> WanStreamEncoder:
        """An encoder for one video that arrives in pieces."""
        return WanStreamEncoder(self)

    def stream_decoder(self) -> WanStreamDecoder:
        """A decoder for one video that arrives in pieces."""
        return WanStreamDecoder(self)


def open_vae(path: Path) -> tuple[Any, Weights]:
    """An AutoencoderKLWan without weights, and what the folder or file `path` holds for it.

    The weights are under diffusers' names. Raises WeightsError if the sizes cannot be told.
    """
    from diffusers import AutoencoderKLWan  # slow to import

    weights: Weights
    if path.is_dir():
        config = component.folder_config(path, "AutoencoderKLWan")
        if config.get("patch_size") is not None:
            raise WeightsError(f"{path}: an autoencoder of Wan2.2; Wan2.1's is needed")
        weights = component.folder_weights(path)
    else:
        file = WeightFile(path)
        shapes = file.shapes()
        try:
            width, channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        except (KeyError, IndexError) as error:
            raise WeightsError(f"{path}: not Wan2.1's autoencoder: lacks {error}") from error
        config = {"base_dim": width, "z_dim": channels}
        weights = component.Renamed(file, {to_diffusers(name): name for name in shapes})
    with component.described(path), torch.device("meta"):
        return AutoencoderKLWan.from_config(config), weights


class WanStreamEncoder:
    """Keeps the last frames that each causal convolution saw between calls."""

    def __init__(self, wrapper: WanVAEWrapper) -> None:
        self._wrapper = wrapper
        self._cache = _empty_cache(wrapper.vae.encoder)
        self._started = False

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The next pixels [B, 3, p, 8 h, 8 w] to latents, p = 1 + 4 k at first, then 4 k."""
        vae, mean = self._wrapper.vae, self._wrapper.mean
        strides = self._wrapper.temporal_stride, self._wrapper.spatial_stride
        parts = []
        for frames in frame_groups(pixels, strides, started=self._started):
            moved = frames.to(mean.device, vae.dtype)
            features = vae.encoder(moved, feat_cache=self._cache, feat_idx=[0])
            self._started = True
            parts.append(vae.quant_conv(features)[:, : mean.shape[1]].float())
        return (torch.cat(parts, dim=2) - mean) / self._wrapper.std


class WanStreamDecoder:
    """Keeps the last frames that each causal convolution saw between calls."""

    def __init__(self, wrapper: WanVAEWrapper) -> None:
        self._wrapper = wrapper
        self._cache = _empty_cache(wrapper.vae.decoder)
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, C, f, h, w] to their pixels, 1 then 4 frames each."""
        vae = self._wrapper.vae
        z = latents.to(self._wrapper.mean.device).float() * self._wrapper.std + self._wrapper.mean
        parts = []
        for frame in z.to(vae.dtype).split(1, dim=2):
            pixels = vae.decoder(
                vae.post_quant_conv(frame),
                feat_cache=self._cache,
                feat_idx=[0],
                first_chunk=not self._started,
            )
            self._started = True
            parts.append(pixels.float().clamp(-1.0, 1.0))
        return torch.cat(parts, dim=2)


def _empty_cache(half: nn.Module) -> list[Any]:
    return [None] * sum(type(m).__name__ == "WanCausalConv3d" for m in half.modules())
