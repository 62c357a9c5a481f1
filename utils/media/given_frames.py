"""Images and videos that clips begin or end with: read, cropped, fitted to the clips' size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.data.prompts import Picture
from utils.errors import UserError
from utils.media.images import IMAGE_SUFFIXES, Scale, describe_fit, fit, read_image, to_signed
from utils.media.video import read_frames

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True, eq=False)
class Given:
    """Frames that clips begin with."""

    frames: Tensor  # [1, 3, P, H, W] in [-1, 1]
    fit: str  # what was done to them, in words


def read_picture(picture: Picture) -> Tensor:
    """What counts of an image, uint8 [3, H, W]. Raises FileNotFoundError or ValueError.

    A box is cut out of the file that it was drawn on; a file of another size is taken as cut
    already, as VBench-I2V ships its crops beside their boxes.
    """
    return _cut(read_image(picture.path), picture)


def _cut(image: Tensor, picture: Picture) -> Tensor:
    """The part that counts of a file's whole content."""
    height, width = image.shape[1:]
    if picture.box is None or (picture.origin is not None and picture.origin != (height, width)):
        return image
    left, top, right, bottom = picture.box
    if right > width or bottom > height:
        raise UserError(
            f"{picture.path}: is {height} x {width}, its target_bbox {list(picture.box)} "
            f"(left, top, right, bottom) leaves it"
        )
    return image[:, top:bottom, left:right]


def picture_size(picture: Picture) -> Size:
    """Height and width of what counts of an image."""
    height, width = read_picture(picture).shape[1:]
    return height, width


def describe_picture(picture: Picture, size: Size) -> str:
    """What `read_fitted` does to an image, in words."""
    image = read_image(picture.path)
    (height, width), part = image.shape[1:], _cut(image, picture).shape[1:]
    box = "" if part == (height, width) else f"{height} x {width} cut to its box, "
    return f"{picture.path.name}: {box}{describe_fit((part[0], part[1]), size)}"


def read_fitted(picture: Picture, size: Size, scale: Scale = "bicubic") -> Tensor:
    """An image that covers `size`, cropped at the centre, [3, H, W] in [-1, 1]."""
    return to_signed(fit(read_picture(picture), size, scale))


def read_given(path: Path, size: Size, most: int) -> Given:
    """The frames of an image or a video, fitted to `size`.

    Raises FileNotFoundError, or ValueError if it is not readable or has more than `most` frames.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        frames = read_image(path)[None]
    else:
        frames = torch.stack(list(read_frames(path, limit=most + 1)))
        if len(frames) > most:
            raise UserError(f"{path}: has more than the {most} frames of a clip")
    shape = (frames.shape[2], frames.shape[3])
    enlarged = shape[0] // size[0]
    if enlarged > 1 and shape == (enlarged * size[0], enlarged * size[1]):
        # As small clips are written; scaling them back with a wider filter would blur them.
        pooled = torch.nn.functional.avg_pool2d(frames.float(), enlarged)
        frames = pooled.round().to(torch.uint8)
    else:
        frames = fit(frames, size)
    words = f"{path.name}: {describe_fit(shape, size)}"
    return Given(to_signed(frames.transpose(0, 1))[None], words)
