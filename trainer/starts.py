"""What clips may begin with: images or frames that fit the model, checked before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.families.base import Model
from model.types import LatentSpec
from trainer.config import Config, causal_config
from utils.config import ConfigError
from utils.data.prompts import PromptItem, some
from utils.media.given_frames import Given, Size, read_given


def pixel_size(config: Config, latent: LatentSpec) -> Size:
    """Height and width of the configured clips."""
    _, _, rows, columns = config.latent_shape
    return latent.pixel_size(rows, columns)


def pixel_frames(config: Config, latent: LatentSpec) -> int:
    """How many frames the configured clips have."""
    return latent.pixel_frames(config.latent_shape[1])


def check_images(config: Config, folder: Model, items: Sequence[PromptItem] | None) -> None:
    """Raise ConfigError unless the model begins with as many images as each item has.

    items: those of --i2v; None = there are no images.
    """
    count = 0 if folder.images is None else folder.images.count
    causal = causal_config(config)
    if items is None:
        if count:
            raise ConfigError(
                f"--i2v: {folder.path} makes clips from images; add --i2v, and give a folder of "
                f"images and texts as --data_path"
            )
        return
    if not count and causal is None:
        raise ConfigError(
            f"--i2v: {folder.path} makes whole clips from text alone; use an image-to-video model, "
            f"or one with generator_type: causal"
        )
    if not count and causal is not None:
        try:
            causal.split(config.latent_shape[1], 1)
        except ValueError as error:
            raise ConfigError(f"--i2v: {error}") from error
    if count > 1 and config.latent_shape[1] == 1:
        raise ConfigError("--i2v: a clip of one latent frame has no last image to end with")
    wanted = max(1, count)
    wrong = sorted({item.name for item in items if len(item.pictures) != wanted})
    if wrong:
        takes = "one image for each clip" if wanted == 1 else "a first and a <stem>_last image"
        has = "a first and a last one" if wanted == 1 else "no last one"
        raise ConfigError(f"--i2v: {folder.path} takes {takes}; there is {has} for {some(wrong)}")


def read_start(
    config: Config, latent: LatentSpec, path: Path | None, *, images: bool
) -> Given | None:
    """The frames that all clips begin with. Raises ConfigError unless blocks hold as many.

    images: whether each clip begins with an image of its own.
    """
    causal = causal_config(config)
    if path is None:
        if causal is not None and causal.given_first_frame and not images:
            raise ConfigError(
                "--initial_path: this model was trained to continue a first frame; give one, or "
                "images with --i2v, or set causal.given_first_frame=false"
            )
        return None
    if causal is None:
        raise ConfigError(
            "--initial_path: this model makes whole clips and cannot begin with given frames; "
            "use one with generator_type: causal"
        )
    try:
        start = read_given(path, pixel_size(config, latent), pixel_frames(config, latent))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--initial_path: {error}") from error
    pixels = start.frames.shape[2]
    if (pixels - 1) % latent.temporal_stride:
        raise ConfigError(
            f"--initial_path: {path} has {pixels} frames; give 1 + {latent.temporal_stride} k, as "
            f"latent frames hold them"
        )
    try:
        causal.split(config.latent_shape[1], latent.latent_frames(pixels))
    except ValueError as error:
        raise ConfigError(f"--initial_path: {path}: {error}") from error
    return start
