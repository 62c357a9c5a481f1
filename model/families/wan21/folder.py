"""A Wan2.1 folder, in the layout of an official release or of diffusers: what lies where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.wan.config import WanConfig, read_wan_config

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
VAE_FILE, VAE_FOLDER = "Wan2.1_VAE.pth", "vae"
VAE = (VAE_FILE, VAE_FOLDER)
TEXT_ENCODERS = (TEXT_ENCODER, "text_encoder")
TOKENIZERS = (TOKENIZER, "tokenizer")
IMAGE_ENCODERS = (IMAGE_ENCODER, "image_encoder")

MODEL_INDEX = "model_index.json"  # at the top of diffusers' layout
PUBLISHED = {
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


@dataclass(frozen=True)
class ModelFolder:
    """One release on disk."""

    path: Path
    codecs: tuple[str, ...] = VAE  # where the video codec may be

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
        return self._first(self.codecs)

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
            wanted.append(self.codecs)
            if self.config is not None and self.wan_config().reads_clip:
                wanted.append(IMAGE_ENCODERS)
        return [" or ".join(names) for names in wanted if self._first(names) is None]

    def fetch(self) -> str:
        """How to complete this folder, as a sentence."""
        command = fetch_command(self.path)
        if command is None:
            return "copy what is missing from the release that the folder was made of"
        return f"fetch what is missing with: {command}"


def fetch_command(path: Path) -> str | None:
    """What fetches the published release of a folder's name; None = there is none."""
    name = path.resolve().name.lower()
    if name not in PUBLISHED:
        return None
    return f"hf download Wan-AI/{PUBLISHED[name]} --local-dir {path}"


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
