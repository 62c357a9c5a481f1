"""The video autoencoder: pixels to normalised latents and back, whole or as a stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from model.encoders.vae_names import to_diffusers
from model.encoders.vae_sizes import WAN21, name_of, sizes_in_file
from model.folders import component
from utils.errors import UserError
from utils.media.frame_groups import frame_groups
from utils.weights import WeightFile, Weights, WeightsError


class VideoVAE(Protocol):
    """Pixels [B, 3, P, s h, s w] in [-1, 1] to normalised latents [B, C, F, h, w] and back.

    P = 1 + k (F - 1), where k is the temporal stride, and s the spatial one.
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

    Of Wan2.1 (strides 4 in time, 8 in space; 16 channels) or Wan2.2 (4, 16; 48 channels, and
    pixels come in patches). P = 1 + 4 (F - 1) pixel frames. Both directions go one latent
    frame at a time in either use, so a stream equals the whole bit for bit, and a long clip needs
    no more device memory than a short one: its pixels may stay on the CPU.
    """

    vae: Any
    mean: Tensor
    std: Tensor
    channels: int  # of latents
    temporal_stride: int
    spatial_stride: int
    patch: int  # pixels on a side that become channels before anything else

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        config: Any = vae.config
        self.channels = config.z_dim
        self.patch = config.patch_size or 1
        self.temporal_stride = 2 ** sum(config.temperal_downsample)
        self.spatial_stride = self.patch * 2 ** (len(config.dim_mult) - 1)
        for name in ("mean", "std"):
            values = torch.tensor(config[f"latents_{name}"][: self.channels])
            self.register_buffer(name, values.view(1, -1, 1, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> WanVAEWrapper:
        """Read a diffusers VAE folder, or an official Wan2.1_VAE.pth or Wan2.2_VAE.pth.

        Of any width. Raises WeightsError that lists what is missing, unexpected or of another
        shape.
        """
        vae, weights = open_vae(path)
        component.fill(vae, weights, dtype, what=name_of(vae.config))
        return cls(vae)

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, P, s h, s w] in [-1, 1] to the posterior's mean [B, C, F, h, w]."""
        return self.stream_encoder().encode(pixels)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, h, w] to pixels [B, 3, P, s h, s w] in [-1, 1], fp32."""
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
    weights: Weights
    if path.is_dir():
        sizes = component.folder_config(path, "AutoencoderKLWan")
        weights = component.folder_weights(path)
    else:
        file = WeightFile(path)
        shapes = file.shapes()
        try:
            sizes = sizes_in_file(shapes)
        except UserError as error:
            raise WeightsError(f"{path}: not an autoencoder of Wan: {error}") from error
        weights = component.Renamed(file, {to_diffusers(name): name for name in shapes})
    with component.described(path):
        vae = meta_vae(sizes)
    _check_statistics(path, vae.config)
    return vae, weights


def meta_vae(sizes: Mapping[str, Any] = WAN21) -> Any:
    """An AutoencoderKLWan of `sizes` on the meta device: WAN21 or WAN22 for the published ones."""
    from diffusers import AutoencoderKLWan  # slow to import

    with torch.device("meta"):
        return AutoencoderKLWan.from_config(dict(sizes))


def _check_statistics(path: Path, config: Any) -> None:
    """Raise WeightsError unless there is a mean and a deviation of each latent channel."""
    found = len(config.latents_mean), len(config.latents_std)
    if min(found) < config.z_dim:
        raise WeightsError(
            f"{path}: config.json gives {found[0]} latents_mean and {found[1]} latents_std for "
            f"{config.z_dim} channels; copy config.json from the release, which has them all"
        )


def to_patches(pixels: Tensor, size: int) -> Tensor:
    """[B, c, f, H, W] to [B, c size^2, f, H / size, W / size]: colour, then column, then row."""
    return rearrange(pixels, "b c f (h p) (w q) -> b (c q p) f h w", p=size, q=size)


def from_patches(patches: Tensor, size: int) -> Tensor:
    """Undo `to_patches`."""
    return rearrange(patches, "b (c q p) f h w -> b c f (h p) (w q)", p=size, q=size)


class WanStreamEncoder:
    """Keeps the last frames that each causal convolution saw between calls."""

    def __init__(self, wrapper: WanVAEWrapper) -> None:
        self._wrapper = wrapper
        self._cache = _empty_cache(wrapper.vae.encoder)
        self._started = False

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The next pixels [B, 3, p, s h, s w] to latents, p = 1 + 4 k at first, then 4 k."""
        vae, mean = self._wrapper.vae, self._wrapper.mean
        strides = self._wrapper.temporal_stride, self._wrapper.spatial_stride
        parts = []
        for frames in frame_groups(pixels, strides, started=self._started):
            patches = to_patches(frames.to(mean.device, vae.dtype), self._wrapper.patch)
            features = vae.encoder(patches, feat_cache=self._cache, feat_idx=[0])
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
            parts.append(from_patches(pixels, self._wrapper.patch).float().clamp(-1.0, 1.0))
        return torch.cat(parts, dim=2)


def _empty_cache(half: nn.Module) -> list[Any]:
    return [None] * sum(type(m).__name__ == "WanCausalConv3d" for m in half.modules())
