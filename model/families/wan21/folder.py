"""A Wan folder, in the layout of an official release or of diffusers: what lies where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model.folders.component import read_json
from model.types import Side
from model.wan.config import WanConfig, read_wan_config
from utils.weights import weight_names

CONFIG = "config.json"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
_INDEX, _WHOLE = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)

# Each part's possible places, the official one first. A mixture of layouts is a folder too.
# Of one transformer, and of each of two experts: diffusers' second one is the low one.
HOMES: dict[Side | None, tuple[str, str]] = {
    None: ("", "transformer"),
    "high": ("high_noise_model", "transformer"),
    "low": ("low_noise_model", "transformer_2"),
}


def configs_in(homes: tuple[str, ...]) -> tuple[str, ...]:
    """Where the sizes of a transformer may be whose folder is one of `homes`."""
    return tuple(str(Path(home, CONFIG)) for home in homes)


def weights_in(homes: tuple[str, ...]) -> tuple[str, ...]:
    """The same of its weights."""
    return tuple(str(Path(home, file)) for home in homes for file in (_INDEX, _WHOLE))


CONFIGS, WEIGHTS = configs_in(HOMES[None]), weights_in(HOMES[None])
VAE_FILE, VAE22_FILE, VAE_FOLDER = "Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "vae"
VAE = (VAE_FILE, VAE_FOLDER)
VAE22 = (VAE22_FILE, VAE_FOLDER)
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
        "Wan2.2-TI2V-5B",
        "Wan2.2-T2V-A14B",
        "Wan2.2-I2V-A14B",
        "Wan2.2-TI2V-5B-Diffusers",
        "Wan2.2-T2V-A14B-Diffusers",
        "Wan2.2-I2V-A14B-Diffusers",
    )
}


@dataclass(frozen=True)
class ModelFolder:
    """One release on disk, or what one of two experts needs of it."""

    path: Path
    codecs: tuple[str, ...] = VAE  # where the video codec may be, the official file first
    side: Side | None = None  # of whose transformer it speaks; None = there is one for all levels

    def wan_config(self) -> WanConfig:
        """The transformer's sizes. Raises UserError that names the file."""
        config = read_wan_config(self.config or self.path / CONFIG)
        return replace(config, clip=False) if self._lacks_clip(config) else config

    def _lacks_clip(self, config: WanConfig) -> bool:
        """Whether an image-to-video model is of Wan2.2, whose config.json is that of Wan2.1."""
        if config.model_type != "i2v" or self.config is None:
            return False
        if {"clip", "num_attention_heads"} & read_json(self.config).keys():
            return False  # it says so itself, as all of diffusers' do
        if self.config.parent.name in (HOMES["high"][0], HOMES["low"][0]):
            return True
        names = None if self.weights is None else weight_names(self.weights)
        return bool(names) and not any("img_emb." in name for name in names or ())

    @property
    def config(self) -> Path | None:
        """The file that holds the transformer's sizes."""
        return self._first(configs_in(HOMES[self.side]))

    @property
    def weights(self) -> Path | None:
        """The transformer's weights: an index of shards, or one file."""
        return self._first(weights_in(HOMES[self.side]))

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
        wanted: list[tuple[str, ...]] = [configs_in(HOMES[self.side])]
        if weights:
            wanted.append(weights_in(HOMES[self.side]))
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


def holds_experts(path: Path) -> bool:
    """Whether the folder at `path` has two transformers, or at least one of such two."""
    index = read_json(path / MODEL_INDEX)
    second = index.get(HOMES["low"][1])
    named = isinstance(second, list) and any(second)
    there = any((path / home).is_dir() for home in (HOMES["high"][0], *HOMES["low"]))
    return there or named or index.get("boundary_ratio") is not None


def published(path: Path, *kinds: str) -> bool:
    """Whether a folder has the name of a published release of one of `kinds`, as TI2V."""
    name = path.resolve().name.lower()
    return name in PUBLISHED and any(f"-{kind.lower()}" in name for kind in kinds)


def fetch_command(path: Path) -> str | None:
    """What fetches the published release of a folder's name; None = there is none."""
    name = path.resolve().name.lower()
    if name not in PUBLISHED:
        return None
    return f"hf download Wan-AI/{PUBLISHED[name]} --local-dir {path}"


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
