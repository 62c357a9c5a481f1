"""The video autoencoder: pixels to normalised latents and back, whole or as a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.folder import ModelFolder
from model.patch_codec import PatchCodec
from utils.weights import WeightFile, WeightsError


class VideoVAE(Protocol):
    """Pixels [B, 3, P, H, W] in [-1, 1] to normalised latents [B, C, F, h, w] and back."""

    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """Pixels to latents; P = 1 + 4 (F - 1)."""

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """Latents to pixels, all at once."""

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one video that arrives in pieces."""


class StreamDecoder(Protocol):
    """Decodes successive latent frames of one video."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames to their pixels, 1 for the very first and 4 for each other."""


class WanVAEWrapper(nn.Module):
    """diffusers' AutoencoderKLWan with Wan's latent normalisation, whole or as a stream.

    Strides 4 in time and 8 in space: P = 1 + 4 (F - 1) pixel frames. Decoding goes one latent
    frame at a time in either use, so a stream equals the whole bit for bit.
    """

    vae: Any
    mean: Tensor
    std: Tensor

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        config: Any = vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> WanVAEWrapper:
        """Read a diffusers VAE folder, or an official Wan2.1_VAE.pth. Raises WeightsError."""
        from diffusers import AutoencoderKLWan  # slow to import

        if path.is_dir():
            return cls(AutoencoderKLWan.from_pretrained(str(path), torch_dtype=dtype))
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        weights = WeightFile(path)
        official = {name: weights.read(name) for name in weights.shapes()}
        vae = AutoencoderKLWan()
        try:
            vae.load_state_dict(convert_wan_vae_to_diffusers(official))
        except (RuntimeError, ValueError, IndexError) as error:
            raise WeightsError(f"{path}: not Wan2.1's autoencoder: {error}") from error
        return cls(vae.to(dtype))

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, P, 8 h, 8 w] in [-1, 1] to the posterior's mean [B, C, F, h, w]."""
        if (pixels.shape[2] - 1) % 4:
            raise ValueError(f"a clip must have 1 + 4 k frames, got {pixels.shape[2]}")
        mode = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.mean) / self.std

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, h, w] to pixels [B, 3, P, 8 h, 8 w] in [-1, 1], fp32."""
        return self.stream_decoder().decode(latents)

    def stream_decoder(self) -> WanStreamDecoder:
        """A decoder for one video that arrives in pieces."""
        return WanStreamDecoder(self)


class WanStreamDecoder:
    """Keeps the last frames that each causal convolution saw between calls."""

    def __init__(self, wrapper: WanVAEWrapper) -> None:
        self._wrapper = wrapper
        vae = wrapper.vae
        count = sum(type(m).__name__ == "WanCausalConv3d" for m in vae.decoder.modules())
        self._cache: list[Any] = [None] * count
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, C, f, h, w] to their pixels, 1 then 4 frames each."""
        vae = self._wrapper.vae
        z = latents.float() * self._wrapper.std + self._wrapper.mean
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


def load_vae(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> VideoVAE:
    """The video codec of a model folder: Wan's autoencoder, or the tiny world's codec."""
    path = folder.vae
    assert path is not None, "check_model comes first"
    if path.suffix == ".safetensors":
        return PatchCodec.load(path).to(device)
    return WanVAEWrapper.load(path, dtype).to(device)
