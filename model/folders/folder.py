"""A model folder, in the layout of an official Wan2.1 release or of diffusers: what lies where."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from model.folders.foreign import refuse_foreign
from model.wan.config import WanConfig, read_wan_config
from utils.errors import NotFoundError
from utils.tiny_world.codec import FILE_NAME as PATCH_CODEC

CONFIG = "config.json"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
_INDEX, _WHOLE = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)

# Each part's possible places, the official one first. A mixture of layouts is a folder too.
CONFIGS = (CONFIG, f"transformer/{CONFIG}")
WEIGHTS = (_INDEX, _WHOLE, f"transformer/{_INDEX}", f"transformer/{_WHOLE}")
VAE = ("Wan2.1_VAE.pth", "vae", PATCH_CODEC)  # the last is the tiny world's
TEXT_ENCODERS = (TEXT_ENCODER, "text_encoder")
TOKENIZERS = (TOKENIZER, "tokenizer")
IMAGE_ENCODERS = (IMAGE_ENCODER, "image_encoder")

MODEL_INDEX = "model_index.json"  # at the top of diffusers' layout
_PUBLISHED = {
    name.lower(): name
    for name in (
        "Wan2.1-T2V-1.3B",
        "Wan2.1-T2V-14B",
        "Wan2.1-I2V-14B-480P",
        "Wan2.1-I2V-14B-720P",
        "Wan2.1-FLF2V-14B-720P",
        "Wan2.1-T2V-1.3B-Diffusers",
        "Wan2.1-T2V-14B-Diffusers",
        "Wan2.1-I2V-14B-480P-Diffusers",
        "Wan2.1-I2V-14B-720P-Diffusers",
        "Wan2.1-FLF2V-14B-720P-diffusers",
    )
}
_TINY = ("wan2.1-t2v-tiny", "wan2.1-i2v-tiny")


@dataclass(frozen=True)
class ModelFolder:
    """One release on disk."""

    path: Path

    def wan_config(self) -> WanConfig:
        """The transformer's sizes. Raises UserError that names the file."""
        return read_wan_config(self.config or self.path / CONFIG)

    @property
    def config(self) -> Path | None:
        """The file that holds the transformer's sizes."""
        return self._first(CONFIGS)

    @property
    def weights(self) -> Path | None:
        """The transformer's weights: an index of shards, or one file."""
        return self._first(WEIGHTS)

    @property
    def vae(self) -> Path | None:
        """The video codec: a file or a sub-folder."""
        return self._first(VAE)

    @property
    def text_encoder(self) -> Path | None:
        """The UMT5 encoder: a file or a sub-folder."""
        return self._first(TEXT_ENCODERS)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's folder."""
        return self._first(TOKENIZERS)

    @property
    def image_encoder(self) -> Path | None:
        """The CLIP encoder of an image-to-video model: a file or a sub-folder."""
        return self._first(IMAGE_ENCODERS)

    def _first(self, names: tuple[str, ...]) -> Path | None:
        paths = (self.path / name for name in names)
        return next((path for path in paths if path.is_file() or _holds_files(path)), None)

    def missing(
        self, *, weights: bool = True, encoders: bool = True, text: bool = True
    ) -> list[str]:
        """What is absent, each with the alternatives that would do.

        weights: of the transformer. encoders: VAE, text encoder with tokenizer, and for a model
        that sees images its CLIP encoder. text: False = of these, text is not wanted.
        """
        wanted: list[tuple[str, ...]] = [CONFIGS]
        if weights:
            wanted.append(WEIGHTS)
        if encoders:
            wanted += [TEXT_ENCODERS, TOKENIZERS] if text else []
            wanted.append(VAE)
            if self.config is not None and self.wan_config().sees_images:
                wanted.append(IMAGE_ENCODERS)
        return [" or ".join(names) for names in wanted if self._first(names) is None]

    def fetch(self) -> str:
        """The command that completes this folder, as a sentence; known for published releases."""
        name = self.path.resolve().name.lower()
        if name in _PUBLISHED:
            command = f"hf download Wan-AI/{_PUBLISHED[name]} --local-dir {self.path}"
            return f"fetch what is missing with: {command}"
        if name in _TINY:
            return "make it with: python scripts/make_tiny_world.py"
        return "copy what is missing from the release that the folder was made of"


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def find_model(root: Path, name: str) -> ModelFolder:
    """The folder of model `name`: a path as it is, or a name below `root`.

    Raises FileNotFoundError that lists the models that are there.
    """
    for path in (Path(name), root / name):
        if path.is_dir():
            refuse_foreign(path)
            return ModelFolder(path)
        if path.is_file():
            raise NotFoundError(f"model '{name}': {path} is a file; give the folder that it is in")
    marks = (MODEL_INDEX, *CONFIGS)
    present = sorted(
        path.name
        for path in (root.iterdir() if root.is_dir() else ())
        if any((path / mark).is_file() for mark in marks)
    )
    near = difflib.get_close_matches(name, present, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    if Path(name).name.lower() in (*_PUBLISHED, *_TINY):
        hint += f"; {ModelFolder(root / name).fetch()}"
    found = f"it holds {present}" if present else "it holds no model"
    raise NotFoundError(f"model '{name}': no folder {root / name} ({found}){hint}")


def check_model(
    folder: ModelFolder, *, weights: bool = True, encoders: bool = True, text: bool = True
) -> None:
    """Raise FileNotFoundError that lists all that is missing from a model folder.

    The settings are those of `ModelFolder.missing`.
    """
    missing = folder.missing(weights=weights, encoders=encoders, text=text)
    if missing:
        found = sorted(path.name for path in folder.path.iterdir())
        raise NotFoundError(
            f"{folder.path}: not a complete model folder: missing {'; '.join(missing)} "
            f"(found {found}); {folder.fetch()}"
        )
