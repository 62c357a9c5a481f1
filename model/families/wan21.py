"""Wan2.1: official folders and diffusers', text to video and image to video."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from model.encoders.clip import WanCLIPEncoder
from model.encoders.text import WanTextEncoder
from model.encoders.vae import VideoVAE, load_vae
from model.families.base import ImageSpec, Model, TextSpec
from model.folders import loading
from model.folders.folder import CONFIGS, MODEL_INDEX, ModelFolder
from model.folders.loading import Placement
from model.types import FeatureSpec, LatentSpec
from model.wan.config import WanConfig
from utils.weights import Weights

SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 4  # of Wan2.1's autoencoder


class Wan21(Model):
    """A folder in either layout; `folder` knows what lies where."""

    family = "Wan2.1"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder = ModelFolder(path)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A transformer's config.json, or diffusers' index."""
        return any((path / mark).is_file() for mark in (*CONFIGS, MODEL_INDEX))

    @cached_property
    def sizes(self) -> WanConfig:
        """The transformer's."""
        return self.folder.wan_config()

    @property
    def latent(self) -> LatentSpec:
        """See Model."""
        _, rows, columns = self.sizes.patch_size
        return LatentSpec(self.sizes.out_dim, TEMPORAL_STRIDE, SPATIAL_STRIDE, (rows, columns))

    @property
    def text(self) -> TextSpec:
        """See Model."""
        return TextSpec(self.sizes.text_len, self.sizes.text_dim)

    @property
    def images(self) -> ImageSpec | None:
        """See Model."""
        return ImageSpec(self.sizes.image_count) if self.sizes.sees_images else None

    @property
    def features(self) -> FeatureSpec:
        """See Model."""
        sizes = self.sizes
        return FeatureSpec(sizes.num_layers, sizes.dim, sizes.num_heads, sizes.eps)

    @property
    def architecture(self) -> Hashable:
        """See Model."""
        return self.sizes

    def missing(
        self, *, weights: bool = True, encoders: bool = True, text: bool = True
    ) -> list[str]:
        """See Model."""
        return self.folder.missing(weights=weights, encoders=encoders, text=text)

    def fetch(self) -> str:
        """See Model."""
        return self.folder.fetch()

    def find_weights(
        self, path: Path | None = None, *, role: str = "generator", averaged: bool | None = False
    ) -> Weights:
        """See Model; under the official release's names."""
        return loading.find_weights(path or self.path, role=role, averaged=averaged)

    def check_weights(self, weights: Weights, *, what: str) -> None:
        """See Model."""
        loading.check_weights(self.sizes, weights, what=what)

    def load_network(self, weights: Weights, place: Placement, *, what: str) -> nn.Module:
        """See Model."""
        return loading.load_network(self.sizes, weights, place, what=what)

    def random_network(self, seed: int, place: Placement) -> nn.Module:
        """See Model."""
        return loading.random_network(self.sizes, seed, place)

    def load_text_encoder(self, dtype: torch.dtype) -> nn.Module:
        """See Model."""
        return WanTextEncoder(self.folder, self.sizes.text_len, dtype)

    def load_image_encoder(self, dtype: torch.dtype) -> nn.Module | None:
        """See Model."""
        return WanCLIPEncoder(self.folder, dtype) if self.sizes.sees_images else None

    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """See Model."""
        return load_vae(self.folder, device, dtype)
