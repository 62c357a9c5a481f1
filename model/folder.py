"""A model folder in the layout of an official Wan2.1 release: what lies where, what is missing."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from model.patch_codec import FILE_NAME as PATCH_CODEC
from model.wan.config import WanConfig, read_wan_config

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
VAE = ("Wan2.1_VAE.pth", "vae", PATCH_CODEC)  # official, diffusers' sub-folder, the tiny world's
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"


@dataclass(frozen=True)
class ModelFolder:
    """One release on disk."""

    path: Path

    def wan_config(self) -> WanConfig:
        """The transformer's sizes."""
        return read_wan_config(self.path / CONFIG)

    @property
    def weights(self) -> Path | None:
        """The transformer's weights: an index of shards, or one file."""
        return self._first(WEIGHTS)

    @property
    def vae(self) -> Path | None:
        """The video codec: a file or a sub-folder."""
        return self._first(VAE)

    @property
    def text_encoder(self) -> Path:
        """The UMT5 encoder's weights."""
        return self.path / TEXT_ENCODER

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.path / TOKENIZER

    def _first(self, names: tuple[str, ...]) -> Path | None:
        return next((self.path / name for name in names if (self.path / name).exists()), None)

    def missing(self, *, weights: bool = True, encoders: bool = True) -> list[str]:
        """What is absent, each with the alternatives that would do."""
        wanted: list[tuple[str, ...]] = [(CONFIG,)]
        if weights:
            wanted.append(WEIGHTS)
        if encoders:
            wanted += [(TEXT_ENCODER,), (TOKENIZER,), VAE]
        return [" or ".join(names) for names in wanted if self._first(names) is None]


def find_model(root: Path, name: str) -> ModelFolder:
    """The folder of model `name`: a path as it is, or a name below `root`.

    Raises FileNotFoundError that lists the models that are there.
    """
    for path in (Path(name), root / name):
        if path.is_dir():
            return ModelFolder(path)
    present = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    near = difflib.get_close_matches(name, present, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    found = f"it holds {present}" if present else "it holds no model"
    raise FileNotFoundError(f"model '{name}': no folder {root / name} ({found}){hint}")


def check_model(folder: ModelFolder, *, weights: bool = True, encoders: bool = True) -> None:
    """Raise FileNotFoundError that lists all that is missing from a model folder."""
    missing = folder.missing(weights=weights, encoders=encoders)
    if missing:
        found = sorted(path.name for path in folder.path.iterdir())
        raise FileNotFoundError(
            f"{folder.path}: not a complete model folder: missing {'; '.join(missing)} "
            f"(found {found})"
        )
