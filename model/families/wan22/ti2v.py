"""Wan2.2's TI2V-5B: clips with and without a first image, behind an autoencoder of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import model.families.wan21.export as exports
import model.families.wan21.outline as sketches
from model.encoders.vae_sizes import WAN22
from model.families.base import Advice, Export, ImageSpec
from model.families.wan21.folder import (
    CONFIGS,
    MODEL_INDEX,
    VAE22,
    VAE22_FILE,
    VAE_FOLDER,
    ModelFolder,
    published,
)
from model.families.wan21.release import Wan21, may_be_wans
from model.folders.component import read_json
from model.types import LatentSpec
from model.wan.config import TI2V_CHANNELS, WanConfig, claims_clip

log = logging.getLogger(__name__)

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 16
USUAL = LatentSpec(TI2V_CHANNELS, TEMPORAL_STRIDE, SPATIAL_STRIDE, (2, 2))


class Wan22TI2V(Wan21):
    """One network for text and images: an image is the first latent frame, at noise level 0."""

    family = "Wan2.2 TI2V"

    @classmethod
    def _open(cls, path: Path) -> ModelFolder:
        return ModelFolder(path, codecs=VAE22)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By its model type, its latents' channels, its autoencoder, its index or its name."""
        if not path.is_dir() or not may_be_wans(path):
            return False
        sizes = [read_json(path / config) for config in CONFIGS]
        return (
            any(_is_ti2v(values) for values in sizes)
            or (path / VAE22_FILE).is_file()
            or read_json(path / VAE_FOLDER / "config.json").get("patch_size") is not None
            or read_json(path / MODEL_INDEX).get("expand_timesteps") is True
            or published(path, "TI2V")
        )

    @cached_property
    def sizes(self) -> WanConfig:
        """The transformer's."""
        path, config = self.folder.config, self.folder.wan_config()
        if path is not None and claims_clip(read_json(path)):
            log.info("%s: speaks of a CLIP branch, which TI2V has not; it is passed over", path)
        return replace(config, model_type="ti2v")

    @property
    def latent(self) -> LatentSpec:
        """See Model; an autoencoder without a transformer has the usual one."""
        if self.folder.config is None:
            return USUAL
        _, rows, columns = self.sizes.patch_size
        return LatentSpec(self.sizes.out_dim, TEMPORAL_STRIDE, SPATIAL_STRIDE, (rows, columns))

    @property
    def images(self) -> ImageSpec | None:
        """See Model."""
        return ImageSpec(count=1, how="frame", clip=False, required=False)

    @property
    def advice(self) -> Advice | None:
        """See Model."""
        return Advice(shift=5.0, steps=50, cfg_scale=5.0)

    @property
    def fps(self) -> float:
        """See Model."""
        return 24.0

    def outlines(self) -> Mapping[str, Callable[[torch.dtype], nn.Module]]:
        """See Model."""
        own = {"codec": lambda dtype: sketches.codec(self.folder, dtype, WAN22)}
        return {**super().outlines(), **own}

    def _release(self, export: Export) -> exports.Release:
        index = {
            "transformer_2": exports.NO_PART,
            "boundary_ratio": None,
            "expand_timesteps": True,  # a noise level per token: how diffusers begins with images
        }
        advice = self.advice
        assert advice is not None
        shift = advice.shift if export.shift is None else export.shift
        return exports.Release(shift=shift, index=index)


def _is_ti2v(values: Mapping[str, Any]) -> bool:
    channels = (values.get("out_dim"), values.get("out_channels"))
    return values.get("model_type") == "ti2v" or TI2V_CHANNELS in channels
