"""The toy as a model: what is in its folder, and how each part is loaded."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from model.families.toy.encoders import (
    CHANNELS,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    ToyCodec,
    ToyTextEncoder,
)
from model.families.toy.network import ToyDenoiser, ToyNetwork, initial_value
from torch import Tensor, nn

from model.encoders.text import TextEncoder
from model.encoders.vae import VideoVAE
from model.families.base import Export, ImageSpec, Model, TextSpec
from model.folders import loading
from model.folders.component import read_json
from model.folders.loading import Placement
from model.folders.writing import appearing, check_target, copy_part, write_shards
from model.types import FeatureSpec, LatentSpec
from utils.errors import UserError
from utils.seeding import generator
from utils.weights import WeightFile, Weights, check_fits, fill_weights, load_weights

CONFIG, WEIGHTS = "config.json", "denoiser.safetensors"
TEXT, CODEC = "text.safetensors", "codec.safetensors"


class Toy(Model):
    """A folder with `config.json` of class ToyDenoiser, and three weight files."""

    family = "the toy"
    network = "toy denoiser"
    marks = ("patch.weight", "blocks.0.level", "head.weight")
    layouts = ("official",)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By what its configuration says that it is."""
        return read_json(path / CONFIG).get("_class_name") == "ToyDenoiser"

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Width and layers of the denoiser, length and width of the text."""
        values = read_json(self.path / CONFIG)
        try:
            width, layers, length, text_width = (
                int(values[name]) for name in ("width", "layers", "text_length", "text_width")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path / CONFIG}: not sizes of a toy: {error}") from error
        return width, layers, length, text_width

    @property
    def latent(self) -> LatentSpec:
        """See Model."""
        return LatentSpec(CHANNELS, TEMPORAL_STRIDE, SPATIAL_STRIDE, (1, 1))

    @property
    def text(self) -> TextSpec:
        """See Model."""
        return TextSpec(*self.sizes[2:])

    @property
    def images(self) -> ImageSpec | None:
        """See Model; it begins with none."""
        return None

    @property
    def features(self) -> FeatureSpec:
        """See Model."""
        width, layers, _, _ = self.sizes
        return FeatureSpec(layers, width, 1, 1e-6)

    @property
    def architecture(self) -> Hashable:
        """See Model."""
        return self.sizes

    @property
    def fps(self) -> float:
        """See Model."""
        return 12.0

    def missing(
        self, *, weights: bool = True, encoders: bool = True, text: bool = True
    ) -> list[str]:
        """See Model."""
        wanted = {CONFIG: True, WEIGHTS: weights, TEXT: encoders and text, CODEC: encoders}
        return [n for n, is_wanted in wanted.items() if is_wanted and not self._has(n)]

    def _has(self, name: str) -> bool:
        return (self.path / name).is_file()

    @property
    def parts(self) -> Mapping[str, Path]:
        """See Model."""
        named = {"codec": CODEC, "text_encoder": TEXT}
        return {part: self.path / name for part, name in named.items() if self._has(name)}

    def find_weights(
        self, path: Path | None = None, *, role: str = "generator", averaged: bool | None = False
    ) -> Weights:
        """See Model."""
        path = path or self.path
        own = path / WEIGHTS
        return loading.open_weights(
            path, own if own.is_file() else None, role=role, averaged=averaged
        )

    def check_weights(self, weights: Weights, *, what: str) -> None:
        """See Model."""
        with torch.device("meta"):
            check_fits(self._build(), weights, what=what)

    def _build(self) -> ToyNetwork:
        width, layers, _, text_width = self.sizes
        return ToyNetwork(CHANNELS, width, layers, text_width)

    def load_network(self, weights: Weights, place: Placement, *, what: str) -> nn.Module:
        """See Model."""
        model = loading.empty(self._build, place)
        load_weights(model, weights, what=what)
        return ToyDenoiser(model)

    def random_network(self, seed: int, place: Placement) -> nn.Module:
        """See Model."""
        model = loading.empty(self._build, place)
        fill_weights(model, lambda name, shape: initial_value(name, shape, generator(seed, name)))
        return ToyDenoiser(model)

    def load_text_encoder(self, dtype: torch.dtype) -> TextEncoder:
        """See Model."""
        return ToyTextEncoder(self.parts["text_encoder"], *self.sizes[2:], dtype)

    def load_image_encoder(self, dtype: torch.dtype) -> nn.Module | None:
        """See Model; it reads no images."""
        return None

    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """See Model; always fp32."""
        return ToyCodec(WeightFile(self.parts["codec"]).read("scale").to(device))

    def check_export(self, export: Export, target: Path) -> None:
        """See Model."""
        check_target(target)
        self.check(weights=False)
        self.check_weights(export.weights, what=f"the denoiser of {self.path}")

    def export(self, export: Export, target: Path) -> None:
        """See Model."""
        self.check_export(export, target)
        with appearing(target) as part:
            for name in (CONFIG, TEXT, CODEC):
                copy_part(self.path / name, part / name)
            stem = WEIGHTS.removesuffix(".safetensors")
            write_shards(_tensors(export), part, stem, export.max_shard_bytes, {})


def _tensors(export: Export) -> Iterator[tuple[str, Tensor]]:
    for name in export.weights.shapes():
        value = export.weights.read(name)
        yield name, value if export.dtype is None else value.to(export.dtype)
