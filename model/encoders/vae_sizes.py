"""Sizes and latent statistics of Wan's two autoencoders, and how a file tells which it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError

Sizes = dict[str, Any]  # what diffusers' AutoencoderKLWan is built with, where it differs

_MEAN22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

WAN21: Sizes = {}  # diffusers' defaults
WAN22: Sizes = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": list(_MEAN22),  # the defaults are the 16 of Wan2.1
    "latents_std": list(_STD22),
}
_WIDEST = 4  # times the base width: what the decoder begins with


def sizes_in_file(shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """The sizes of an official file, read off its weights' shapes. Raises UserError."""
    width, channels = (_length(shapes, "encoder.conv1.weight", axis) for axis in (0, 1))
    latents = _length(shapes, "conv2.weight", 0)
    if not any(".downsamples.0.downsamples." in name for name in shapes):
        return WAN21 | {"base_dim": width, "z_dim": latents}
    patch = math.isqrt(channels // 3)
    return WAN22 | {
        "base_dim": width,
        "decoder_base_dim": _length(shapes, "decoder.conv1.weight", 0) // _WIDEST,
        "z_dim": latents,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "scale_factor_spatial": 8 * patch,
    }


def _length(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int:
    shape = shapes.get(name)
    if shape is None or axis >= len(shape):
        raise UserError(f"it has no {name}" if shape is None else f"its {name} is {shape}")
    return shape[axis]


def name_of(sizes: Mapping[str, Any]) -> str:
    """Whose autoencoder has these sizes, as messages name it."""
    return f"Wan2.{2 if sizes.get('is_residual') else 1}'s autoencoder"
