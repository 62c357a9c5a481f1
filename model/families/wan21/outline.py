"""Wan's parts without values: sizes from what is in a folder, else as they were published."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from model.encoders.umt5 import open_umt5
from model.encoders.vae import WanVAEWrapper, meta_vae, open_vae
from model.encoders.vae_sizes import WAN21, Sizes
from model.experts import SIDES
from model.families.wan21.folder import CONFIG, HOMES, PUBLISHED, ModelFolder
from model.types import Side
from model.wan.config import PRESETS, WanConfig, write_wan_config

# UMT5-XXL, the text encoder of every release.
_UMT5 = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
}


def write_sizes(name: str, folder: Path) -> bool:
    """Write what tells the sizes of the release or preset `name`; False = no such name is known."""
    known = {preset.lower(): preset for preset in PRESETS}
    published = PUBLISHED.get(name.lower())
    if published is not None:  # of a preset at one of the sizes, and in one of the layouts
        begins = [preset for preset in PRESETS if published.startswith(preset)]
        known[name.lower()] = begins[0]
    preset = known.get(name.lower())
    if preset is None:
        return False
    sides: tuple[Side | None, ...] = SIDES if "A14B" in preset else (None,)
    for side in sides:
        home = folder / HOMES[side][0]
        home.mkdir(exist_ok=True)
        write_wan_config(PRESETS[preset], home / CONFIG)
    return True


def text_encoder(folder: ModelFolder, dtype: torch.dtype) -> nn.Module:
    """UMT5, on the meta device."""
    if folder.text_encoder is not None:
        network: nn.Module = open_umt5(folder.text_encoder)[0]
        return network.to(dtype)
    from transformers import UMT5Config, UMT5EncoderModel  # slow to import

    with torch.device("meta"):
        encoder: nn.Module = UMT5EncoderModel(UMT5Config(**_UMT5)).to(dtype)
    return encoder


def codec(folder: ModelFolder, dtype: torch.dtype, published: Sizes = WAN21) -> nn.Module:
    """The autoencoder, on the meta device; as published, unless one is here."""
    vae = meta_vae(published) if folder.vae is None else open_vae(folder.vae)[0]
    # diffusers' own `to` warns of modules that it would keep in fp32, of which there are none.
    return WanVAEWrapper(nn.Module.to(vae, dtype))


def image_encoder(sizes: WanConfig, dtype: torch.dtype) -> nn.Module:
    """CLIP's image encoder without its last layer, on the meta device; ViT-H at Wan's width."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # slow to import

    patches = round((sizes.image_tokens - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=sizes.image_dim,
        intermediate_size=4 * sizes.image_dim,
        num_hidden_layers=31,
        num_attention_heads=max(1, sizes.image_dim // 80),
        patch_size=14,
        image_size=14 * patches,
    )
    with torch.device("meta"):
        encoder: nn.Module = CLIPVisionModel(config).to(dtype)
    return encoder
