"""What clips may begin with: images or frames that fit the model, checked before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.request import WHOLE, WHOLE_WITH_IMAGE, Capabilities, Pixels, Request
from trainer.config import Config, causal_config
from utils.config import ConfigError
from utils.data.prompts import Picture, PromptItem, some
from utils.media.given_frames import Given, Size, describe_picture, read_given

log = logging.getLogger(__name__)


def check_images(
    path: Path, model: Capabilities, request: Request, items: Sequence[PromptItem] | None
) -> None:
    """Raise ConfigError unless the model at `path` begins with as many images as each item has.

    request: what all clips share. items: those of --i2v; None = there are no images.
    """
    count, layout, frames = model.images, model.layout, request.shape(model)[1]
    if items is None:
        if count:
            raise ConfigError(
                f"--i2v: {path} makes clips from images; add --i2v, and give a folder of "
                f"images and texts as --data_path"
            )
        return
    if not count and layout is None and not model.first_frame:
        raise ConfigError(
            f"--i2v: {path} makes whole clips from text alone; use an image-to-video model, "
            f"or one with generator_type: causal"
        )
    if not count and (problem := model.image_problem(frames)):
        raise ConfigError(f"--i2v: {problem}")
    if count > 1 and frames == 1:
        raise ConfigError("--i2v: a clip of one latent frame has no last image to end with")
    wanted = max(1, count)
    wrong = sorted({item.name for item in items if len(item.pictures) != wanted})
    if wrong:
        takes = "one image for each clip" if wanted == 1 else "a first and a <stem>_last image"
        has = "a first and a last one" if wanted == 1 else "no last one"
        raise ConfigError(f"--i2v: {path} takes {takes}; there is {has} for {some(wrong)}")


def read_start(
    config: Config, model: Capabilities, request: Request, path: Path | None, *, images: bool
) -> Given | None:
    """The frames that all clips begin with. Raises ConfigError unless blocks hold as many.

    request: what all clips share. images: whether each clip begins with an image of its own.
    """
    causal = causal_config(config)
    if path is None:
        if causal is not None and causal.given_first_frame and not images:
            raise ConfigError(
                "--initial_path: this model was trained to continue a first frame; give one, or "
                "images with --i2v, or set causal.given_first_frame=false"
            )
        if config.data.image_share == 1.0 and not images:
            raise ConfigError(
                "--i2v: this model was trained to begin all its clips with an image; give images, "
                "or set data.image_share=null"
            )
        return None
    if causal is None:
        raise ConfigError(f"--initial_path: {WHOLE_WITH_IMAGE if model.first_frame else WHOLE}")
    try:
        start = read_given(path, request.size or model.size, request.frames or model.frames)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--initial_path: {error}") from error
    pixels, stride = start.frames.shape[2], model.latent.temporal_stride
    if (pixels - 1) % stride:
        raise ConfigError(
            f"--initial_path: {path} has {pixels} frames; give 1 + {stride} k, as latent frames "
            f"hold them"
        )
    try:
        causal.split(request.shape(model)[1], model.latent.latent_frames(pixels))
    except ValueError as error:
        raise ConfigError(f"--initial_path: {path}: {error}") from error
    return start


def footage(start: Given | None) -> Pixels | None:
    """The same as a request has it."""
    return None if start is None else Pixels(start.frames[0])


def tell_fits(pictures: Mapping[Picture, Size], start: Given | None) -> None:
    """Log what is done to each image, once."""
    for picture, size in pictures.items():
        log.info("%s", describe_picture(picture, size))
    if start is not None:
        log.info("%s", start.fit)
