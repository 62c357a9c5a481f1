"""What every released model answers, whatever its family: sizes, parts, and how to load them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from model.encoders.text import TextEncoder
from model.encoders.vae import VideoVAE
from model.folders.loading import Placement
from model.types import FeatureSpec, LatentSpec, Side
from utils.errors import NotFoundError, UserError
from utils.weights import Weights


@dataclass(frozen=True)
class TextSpec:
    """What a model reads of a prompt: states [length, width]."""

    length: int  # rows, padding included
    width: int


@dataclass(frozen=True)
class ImageSpec:
    """What a model reads of the images that its clips begin and end with."""

    count: int  # 1 = the first frame, 2 = first and last
    tokens: int = 257  # states of each
    width: int = 1280  # of a state
    # channels: mask and latents beside the noisy ones; frame: the first latent frame is the
    # encoded image itself, at noise level 0.
    how: Literal["channels", "frame"] = "channels"
    clip: bool = True  # whether it reads states of an image encoder too
    required: bool = True  # False = it makes clips without an image as well


@dataclass(frozen=True)
class Experts:
    """Two networks that divide the noise levels between them."""

    boundary: float  # the high one's are sigma >= boundary, in [0, 1]


@dataclass(frozen=True)
class Advice:
    """How a release is sampled in many steps, as it was published."""

    shift: float
    steps: int
    cfg_scale: float  # of two experts the high one's
    cfg_scale_low: float | None = None  # the low one's; None = there are none
    boundary: float | None = None  # between them


@dataclass(frozen=True)
class Export:
    """A new model folder's denoiser, and how the folder is written."""

    weights: Weights  # under the family's own names
    layout: str  # one of the family's
    dtype: torch.dtype | None = None  # of the denoiser; None = as stored
    max_shard_bytes: int = 5 * 10**9
    # For who samples it: the shift that it was trained with, and of two experts their boundary.
    # None = as published, or what the folder says that the new one is made of.
    shift: float | None = None
    boundary: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)  # more files at the top, by name


class Model(ABC):
    """One release on disk, opened: nothing above `model/` asks for more than this.

    A family is one file or folder of `model/families/` that defines concrete subclasses. A folder
    may hold two networks (`experts`): their weights are named `high.<own name>` and
    `low.<own name>`, all that takes weights takes both at once, and `load_network` makes one
    Denoiser of them.
    """

    family: ClassVar[str]  # as messages name it
    network: ClassVar[str]  # its denoiser, as messages name it
    marks: ClassVar[tuple[str, ...]]  # weights that each of its denoisers has, by its own names
    layouts: ClassVar[tuple[str, ...]]  # of the folders that it writes
    namings: ClassVar[tuple[str, ...]] = ("official",)  # of single files; official = its own names

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the folder at `path` is of this family; cheap, and true of an incomplete one."""

    @classmethod
    def unsupported(cls, path: Path) -> str | None:
        """What lies at `path`, if it is a relative of this family that cannot be used."""
        return None

    @classmethod
    def how_to_get(cls, path: Path) -> str | None:
        """How to get or complete a released model of the folder's name; None = not one of ours."""
        return None

    @property
    @abstractmethod
    def latent(self) -> LatentSpec:
        """How its latents relate to pixels and tokens. Raises UserError for a bad folder."""

    @property
    @abstractmethod
    def text(self) -> TextSpec:
        """What it reads of prompts."""

    @property
    @abstractmethod
    def images(self) -> ImageSpec | None:
        """What it reads of images beside the noisy latents; None = it begins with none."""

    @property
    @abstractmethod
    def features(self) -> FeatureSpec:
        """What a discriminator can read of its denoiser."""

    @property
    @abstractmethod
    def architecture(self) -> Hashable:
        """Equal for models whose weights fit each other."""

    @property
    def experts(self) -> Experts | None:
        """How its two networks divide the noise levels; None = it has one for them all."""
        return None

    def only(self, side: Side) -> Model:
        """The same folder as a model of that one network; its weights have plain names.

        Raises UserError for a model that has one for all noise levels.
        """
        raise UserError(
            f"{self.path}: a model of {self.family} with one network for all noise levels, of "
            f"which none is the {side} one; experts are high and low in Wan2.2-T2V-A14B alike"
        )

    @property
    def advice(self) -> Advice | None:
        """How to sample it in many steps; None = it was not published with any."""
        return None

    @property
    def fps(self) -> float:
        """Pixel frames per second of the clips that it was trained on."""
        return 16.0

    def check(self, *, weights: bool = True, encoders: bool = True, text: bool = True) -> None:
        """Raise NotFoundError that lists what is missing; see `missing`."""
        missing = self.missing(weights=weights, encoders=encoders, text=text)
        if missing:
            found = sorted(path.name for path in self.path.iterdir())
            raise NotFoundError(
                f"{self.path}: not a complete model folder: missing {'; '.join(missing)} "
                f"(found {found}); {self.fetch()}"
            )

    @abstractmethod
    def missing(
        self, *, weights: bool = True, encoders: bool = True, text: bool = True
    ) -> list[str]:
        """What is absent, each with the alternatives that would do.

        weights: of the denoiser. encoders: codec, text encoder with tokenizer, and what reads
        images. text: False = of these, text is not wanted.
        """

    def fetch(self) -> str:
        """How to complete this folder, as a sentence."""
        general = "copy what is missing from the release that the folder was made of"
        return self.how_to_get(self.path) or general

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Path]:
        """Files and folders that are here: of codec, text_encoder, tokenizer, image_encoder.

        What is encoded with them depends on their content.
        """

    @classmethod
    def own_names(cls, weights: Weights, role: str) -> Weights:
        """`weights` under this family's names, whatever their names are; unknown ones stay."""
        return weights

    @classmethod
    def renamed(cls, name: str, naming: str) -> str:
        """A weight's name under one of `namings`."""
        return name

    @abstractmethod
    def find_weights(
        self, path: Path | None = None, *, role: str = "generator", averaged: bool | None = False
    ) -> Weights:
        """The denoiser's weights at `path`, under this family's own names; None = its own.

        path: a model folder, a weight file, a training checkpoint or a log directory. role: of a
        checkpoint with several networks. averaged: True = the average, None = if there is one.
        Raises WeightsError.
        """

    @abstractmethod
    def check_weights(self, weights: Weights, *, what: str) -> None:
        """Raise WeightsError unless `weights` fit this architecture. Cheap; `what` names it."""

    @abstractmethod
    def load_network(self, weights: Weights, place: Placement, *, what: str) -> nn.Module:
        """A Denoiser with `weights`, as a module; each rank reads only what it keeps."""

    @abstractmethod
    def random_network(self, seed: int, place: Placement) -> nn.Module:
        """A Denoiser with fresh weights, the same for any number of ranks."""

    @abstractmethod
    def load_text_encoder(self, dtype: torch.dtype) -> TextEncoder:
        """Prompts (a list of B texts) to states [B, length, width]."""

    @abstractmethod
    def load_image_encoder(self, dtype: torch.dtype) -> nn.Module | None:
        """Images [B, 3, H, W] in [-1, 1] to states; None if it reads none of them."""

    @abstractmethod
    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """What turns pixels into its latents and back."""

    @classmethod
    def sketch(cls, name: str, folder: Path) -> bool:
        """Write into `folder` what tells the sizes of the released model `name`, if it is known.

        So a run can be planned before anything is downloaded. Returns whether it is known.
        """
        del name, folder
        return False

    def shortened(self, layers: int) -> Model | None:
        """The same model with so many layers fewer; None = it cannot be told."""
        del layers
        return None

    def outlines(self) -> Mapping[str, Callable[[torch.dtype], nn.Module]]:
        """What makes the encoders without values, on the meta device, by the names of `parts`.

        Of what is not here the published sizes are taken.
        """
        return {}

    @abstractmethod
    def check_export(self, export: Export, target: Path) -> None:
        """Raise UserError unless `export` can be written to `target`. Cheap."""

    @abstractmethod
    def export(self, export: Export, target: Path) -> None:
        """Write a folder with this one's sizes and encoders; it appears whole or not at all.

        Raises what `check_export` raises, and WeightsError for parts that are not what they seem.
        """
