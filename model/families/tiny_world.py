"""The tiny world: Wan's transformers at toy size, behind linear codecs of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from model.encoders.vae import VideoVAE
from model.families.base import Advice
from model.families.wan21 import Wan21
from model.families.wan21.folder import HOMES, ModelFolder, configs_in
from model.families.wan22 import Wan22Experts, Wan22TI2V
from model.folders.component import read_json
from model.types import LatentSpec
from utils.tiny_world.codec import FILE_NAME, WAN21, WAN22, CodecSizes, PatchCodec
from utils.weights import WeightsError


class TinyWorld(Wan21):
    """A folder as of Wan2.1, in the official layout, with the world's codec as its autoencoder."""

    family = "the tiny world"
    # As scripts/make_tiny_world.py writes them.
    names: ClassVar[tuple[str, ...]] = ("wan2.1-t2v-tiny", "wan2.1-i2v-tiny")
    usual_codec: ClassVar[CodecSizes] = WAN21  # where none is there

    @classmethod
    def _open(cls, path: Path) -> ModelFolder:
        return ModelFolder(path, codecs=(FILE_NAME,))

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By its codec, by a transformer of its kind without another codec, or by its name."""
        if (path / FILE_NAME).is_file() or cls._named(path):
            return path.is_dir()
        homes = dict.fromkeys(home for pair in HOMES.values() for home in pair)
        configs = (read_json(path / config) for config in configs_in(tuple(homes)))
        tiny = any(config.get("absolute_positions") is True for config in configs)
        return tiny and ModelFolder(path).vae is None

    @classmethod
    def _named(cls, path: Path) -> bool:
        return path.resolve().name.lower() in cls.names

    @classmethod
    def how_to_get(cls, path: Path) -> str | None:
        """The script that makes it."""
        return "make it with: python scripts/make_tiny_world.py" if cls._named(path) else None

    @property
    def codec_sizes(self) -> CodecSizes:
        """What its codec makes of pixels."""
        file = self.folder.vae
        return self.usual_codec if file is None else CodecSizes.of(file)

    @property
    def latent(self) -> LatentSpec:
        """See Model; a codec without a transformer has the usual patches."""
        _, rows, columns = (1, 2, 2) if self.folder.config is None else self.sizes.patch_size
        codec = self.codec_sizes
        strides = codec.temporal_stride, codec.spatial_stride
        return LatentSpec(codec.channels, *strides, (rows, columns))

    @property
    def advice(self) -> Advice | None:
        """See Model; as the tiny configurations sample their teachers."""
        return Advice(shift=5.0, steps=50, cfg_scale=2.0)

    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """See Model; always fp32."""
        file, channels = self.parts["codec"], self.codec_sizes.channels
        if self.folder.config is not None and self.sizes.out_dim != channels:
            raise WeightsError(
                f"{file}: a codec of {channels} latent channels; the transformer of {self.path} "
                f"makes {self.sizes.out_dim}"
            )
        return PatchCodec.load(file).to(device)

    def outlines(self) -> Mapping[str, Callable[[torch.dtype], nn.Module]]:
        """See Model."""
        return {**super().outlines(), "codec": lambda _: self._codec_outline()}

    def _codec_outline(self) -> nn.Module:
        with torch.device("meta"):
            return PatchCodec(self.codec_sizes)


class TinyTI2V(TinyWorld, Wan22TI2V):
    """The same as of TI2V-5B: one network, whose codec has its strides and channels."""

    family = "the tiny world of TI2V"
    names = ("wan2.2-ti2v-tiny",)
    usual_codec = WAN22

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """See TinyWorld and Wan22TI2V."""
        named = path.is_dir() and cls._named(path)
        return named or (TinyWorld.recognises(path) and Wan22TI2V.recognises(path))


class TinyExperts(TinyWorld, Wan22Experts):
    """The same as of A14B: two experts behind the codec of Wan2.1's tiny world."""

    family = "the tiny world of A14B"
    names = ("wan2.2-t2v-a14b-tiny", "wan2.2-i2v-a14b-tiny")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """See TinyWorld and Wan22Experts."""
        named = path.is_dir() and cls._named(path)
        return named or (TinyWorld.recognises(path) and Wan22Experts.recognises(path))

    @property
    def advice(self) -> Advice | None:
        """See TinyWorld; divided between the experts as published."""
        own, published = super().advice, super(TinyWorld, self).advice
        assert own is not None, "the tiny world says how it is sampled"
        assert published is not None, "A14B was published with its boundary"
        return replace(own, cfg_scale_low=own.cfg_scale, boundary=published.boundary)
