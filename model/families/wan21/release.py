"""Wan2.1 as a model, and what all releases of Wan share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

import model.families.wan21.export as exports
import model.families.wan21.outline as sketches
import model.families.wan21.weights as transformers
from model.encoders.clip import WanCLIPEncoder
from model.encoders.text import TextEncoder, WanTextEncoder
from model.encoders.vae import VideoVAE, WanVAEWrapper
from model.families.base import Advice, Export, ImageSpec, Model, TextSpec
from model.families.wan21.folder import (
    CONFIGS,
    HOMES,
    MODEL_INDEX,
    VAE_FILE,
    VAE_FOLDER,
    ModelFolder,
    configs_in,
    fetch_command,
)
from model.folders.component import read_json
from model.folders.loading import Placement
from model.types import FeatureSpec, LatentSpec
from model.wan.config import WanConfig
from model.wan.weights import to_diffusers
from utils.errors import UserError
from utils.weights import Weights, WeightsError

# Of Wan2.1's autoencoder, whatever transformer lies beside it.
TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
USUAL = LatentSpec(16, TEMPORAL_STRIDE, SPATIAL_STRIDE, (2, 2))  # of all published releases
MARKS = (*CONFIGS, MODEL_INDEX, VAE_FILE, f"{VAE_FOLDER}/config.json")  # any will do


class Wan21(Model):
    """A folder in either layout; `folder` knows what lies where."""

    family = "Wan2.1"
    network = "Wan transformer"
    marks: ClassVar[tuple[str, ...]] = (
        "patch_embedding.weight",
        "blocks.0.modulation",
        "head.modulation",
    )
    layouts = exports.LAYOUTS
    namings = ("official", "diffusers", "reference")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder = self._open(path)

    @classmethod
    def _open(cls, path: Path) -> ModelFolder:
        return ModelFolder(path)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By a transformer's config.json, an index or an autoencoder; or by its released name."""
        if not may_be_wans(path):
            return False
        there = any((path / mark).is_file() for mark in MARKS)
        return there or (path.is_dir() and fetch_command(path) is not None)

    @classmethod
    def how_to_get(cls, path: Path) -> str | None:
        """The command that fetches a published release."""
        command = fetch_command(path)
        return None if command is None else f"fetch what is missing with: {command}"

    @cached_property
    def sizes(self) -> WanConfig:
        """The transformer's."""
        return self.folder.wan_config()

    @property
    def latent(self) -> LatentSpec:
        """See Model; an autoencoder without a transformer has the usual one."""
        if self.folder.config is None:
            return USUAL
        _, rows, columns = self.sizes.patch_size
        return LatentSpec(self.sizes.out_dim, TEMPORAL_STRIDE, SPATIAL_STRIDE, (rows, columns))

    @property
    def text(self) -> TextSpec:
        """See Model."""
        return TextSpec(self.sizes.text_len, self.sizes.text_dim)

    @property
    def images(self) -> ImageSpec | None:
        """See Model."""
        sizes = self.sizes
        if not sizes.given_latents:
            return None
        return ImageSpec(
            sizes.image_count, sizes.image_tokens, sizes.image_dim, clip=sizes.reads_clip
        )

    @property
    def advice(self) -> Advice | None:
        """See Model; by the kind of model. 480p image models were published with shift 3."""
        kind = "small" if self.sizes.dim <= _SMALL_DIM else self.sizes.model_type
        return _ADVICE[kind]

    @property
    def features(self) -> FeatureSpec:
        """See Model."""
        return features_of(self.sizes)

    @property
    def architecture(self) -> Hashable:
        """See Model."""
        return self.sizes

    def missing(
        self, *, weights: bool = True, encoders: bool = True, text: bool = True
    ) -> list[str]:
        """See Model."""
        return self.folder.missing(weights=weights, encoders=encoders, text=text)

    @property
    def parts(self) -> Mapping[str, Path]:
        """See Model."""
        folder = self.folder
        found = {
            "codec": folder.vae,
            "text_encoder": folder.text_encoder,
            "tokenizer": folder.tokenizer,
            "image_encoder": folder.image_encoder,
        }
        return {name: path for name, path in found.items() if path is not None}

    @classmethod
    def own_names(cls, weights: Weights, role: str) -> Weights:
        """Under the official release's names."""
        return transformers.translated(weights, role)

    @classmethod
    def renamed(cls, name: str, naming: str) -> str:
        """diffusers names weights otherwise; the reference puts official names into groups."""
        return to_diffusers(name) if naming == "diffusers" else name

    def find_weights(
        self, path: Path | None = None, *, role: str = "generator", averaged: bool | None = False
    ) -> Weights:
        """See Model; under the official release's names."""
        return transformers.find_weights(
            path or self.path, role=role, averaged=averaged, side=self.folder.side
        )

    def check_weights(self, weights: Weights, *, what: str) -> None:
        """See Model."""
        transformers.check_weights(self.sizes, weights, what=what)

    def load_network(self, weights: Weights, place: Placement, *, what: str) -> nn.Module:
        """See Model."""
        return transformers.load_network(self.sizes, weights, place, what=what)

    def random_network(self, seed: int, place: Placement) -> nn.Module:
        """See Model."""
        return transformers.random_network(self.sizes, seed, place)

    def load_text_encoder(self, dtype: torch.dtype) -> TextEncoder:
        """See Model."""
        parts, sizes = self.parts, self.sizes
        return WanTextEncoder(
            parts["text_encoder"],
            parts["tokenizer"],
            text_len=sizes.text_len,
            text_dim=sizes.text_dim,
            dtype=dtype,
        )

    def load_image_encoder(self, dtype: torch.dtype) -> nn.Module | None:
        """See Model."""
        if not self.sizes.reads_clip:
            return None
        return WanCLIPEncoder(
            self.parts["image_encoder"],
            tokens=self.sizes.image_tokens,
            width=self.sizes.image_dim,
            dtype=dtype,
        )

    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """See Model. Raises WeightsError if it is none, or not that of the transformer."""
        path = self.parts["codec"]
        vae = WanVAEWrapper.load(path, dtype)
        channels, wanted = vae.mean.shape[1], self.latent.channels
        if self.folder.config is not None and channels != wanted:
            raise WeightsError(
                f"{path}: an autoencoder of {channels} latent channels; the transformer of "
                f"{self.path} makes {wanted}"
            )
        return vae.to(device)

    @classmethod
    def sketch(cls, name: str, folder: Path) -> bool:
        """See Model; the published releases, and the presets by their names."""
        return sketches.write_sizes(name, folder)

    def shortened(self, layers: int) -> Model | None:
        """See Model."""
        if layers >= self.sizes.num_layers:
            return None
        shorter = copy.copy(self)
        shorter.__dict__["sizes"] = replace(self.sizes, num_layers=self.sizes.num_layers - layers)
        return shorter

    def outlines(self) -> Mapping[str, Callable[[torch.dtype], nn.Module]]:
        """See Model."""
        found = {
            "text_encoder": lambda dtype: sketches.text_encoder(self.folder, dtype),
            "codec": lambda dtype: sketches.codec(self.folder, dtype),
        }
        if self.sizes.reads_clip:
            found["image_encoder"] = lambda dtype: sketches.image_encoder(self.sizes, dtype)
        return found

    def check_export(self, export: Export, target: Path) -> None:
        """See Model."""
        self.check(weights=False)
        exports.check_export(self.folder, export, target)
        self.check_weights(export.weights, what=f"the transformer of {self.path}")
        if export.boundary is not None and self.experts is None:
            raise UserError(
                f"boundary {export.boundary}: {self.path} has one network for all noise levels; "
                f"leave it out"
            )
        self._release(export)  # whose numbers it checks

    def export(self, export: Export, target: Path) -> None:
        """See Model."""
        self.check_export(export, target)
        exports.write_model_folder(self.folder, export, target, self._release(export))

    def _release(self, export: Export) -> exports.Release:
        """What its folders hold beside what every folder of Wan has."""
        return exports.Release(shift=export.shift)


def features_of(sizes: WanConfig) -> FeatureSpec:
    """What a discriminator can read of a transformer of these sizes."""
    return FeatureSpec(sizes.num_layers, sizes.dim, sizes.num_heads, sizes.eps)


_SMALL_DIM = 1536  # of Wan2.1-T2V-1.3B
_ADVICE = {
    "small": Advice(shift=8.0, steps=50, cfg_scale=6.0),
    "t2v": Advice(shift=5.0, steps=50, cfg_scale=5.0),
    "i2v": Advice(shift=5.0, steps=40, cfg_scale=5.0),
    "flf2v": Advice(shift=16.0, steps=50, cfg_scale=5.0),
}


def may_be_wans(path: Path) -> bool:
    """Whether nothing in a folder says that it is of another family."""
    homes = [home for pair in HOMES.values() for home in pair]
    classes = {_class_name(path / file) for file in (*configs_in(tuple(homes)), MODEL_INDEX)}
    return all(name.startswith("Wan") for name in classes - {""})


def _class_name(path: Path) -> str:
    """What a file says that it describes; empty if it does not."""
    name = read_json(path).get("_class_name")
    return name if isinstance(name, str) else ""
