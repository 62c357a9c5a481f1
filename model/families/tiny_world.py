"""The tiny world: Wan2.1's transformer at toy size, behind a linear codec of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from model.encoders.vae import VideoVAE
from model.families.base import Advice
from model.families.wan21 import Wan21
from model.families.wan21.folder import CONFIGS, ModelFolder
from model.folders.component import read_json
from model.types import LatentSpec
from utils.tiny_world.codec import CHANNELS, FILE_NAME, SPATIAL_STRIDE, TEMPORAL_STRIDE, PatchCodec
from utils.weights import WeightsError

NAMES = ("wan2.1-t2v-tiny", "wan2.1-i2v-tiny")  # as scripts/make_tiny_world.py writes them


class TinyWorld(Wan21):
    """A folder as of Wan2.1, in the official layout, with the world's codec as its autoencoder."""

    family = "the tiny world"

    @classmethod
    def _open(cls, path: Path) -> ModelFolder:
        return ModelFolder(path, codecs=(FILE_NAME,))

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By its codec, by a transformer of its kind without another codec, or by its name."""
        if (path / FILE_NAME).is_file() or _named(path):
            return path.is_dir()
        configs = (read_json(path / config) for config in CONFIGS)
        tiny = any(config.get("absolute_positions") is True for config in configs)
        return tiny and ModelFolder(path).vae is None

    @classmethod
    def how_to_get(cls, path: Path) -> str | None:
        """The script that makes it."""
        return "make it with: python scripts/make_tiny_world.py" if _named(path) else None

    @property
    def latent(self) -> LatentSpec:
        """See Model; a codec without a transformer has the usual patches."""
        _, *patch = (1, 2, 2) if self.folder.config is None else self.sizes.patch_size
        return LatentSpec(CHANNELS, TEMPORAL_STRIDE, SPATIAL_STRIDE, (patch[0], patch[1]))

    @property
    def advice(self) -> Advice | None:
        """See Model; as the tiny configurations sample their teachers."""
        return Advice(shift=5.0, steps=50, cfg_scale=2.0)

    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """See Model; always fp32."""
        codec = self.parts["codec"]
        if self.folder.config is not None and self.sizes.out_dim != CHANNELS:
            raise WeightsError(
                f"{codec}: a codec of {CHANNELS} latent channels; the transformer of {self.path} "
                f"makes {self.sizes.out_dim}"
            )
        return PatchCodec.load(codec).to(device)


def _named(path: Path) -> bool:
    return path.resolve().name.lower() in NAMES
