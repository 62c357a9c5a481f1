"""Captioned clips on disk: videos with texts beside them, and .pt files of encoded clips.

Letters: latents [C, F, h, w]; pictures [3, H, W] with H = k h and W = k w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.claims import Rejected
from utils.data.prompts import read_utf8
from utils.errors import NotFoundError, UserError
from utils.files import replaced_atomically
from utils.media.video import VIDEO_SUFFIXES
from utils.weights import read_tensors

# Of the latents in .pt files of another system, where they come after the frames: Wan2.1, Wan2.2.
FOREIGN_CHANNELS = (16, 48)


@dataclass(frozen=True)
class CaptionedVideo:
    """A video and its text."""

    path: Path
    name: str  # its path from the folder of videos, without suffix
    prompt: str


@dataclass(frozen=True, eq=False)
class Clip:
    """One encoded clip with its caption."""

    prompt: str
    latents: Tensor  # [C, F, h, w]
    first_frame: Tensor | None = None  # uint8 [3, H, W]
    video: str = ""  # which video it is from, by name; "" = not known
    fps: float = 0.0  # frames per second at which the video was sampled; 0 = not known
    start_s: float = 0.0  # where in the video it begins


def pair_videos(videos: Path, texts: Path) -> tuple[list[CaptionedVideo], list[Rejected]]:
    """The videos of a folder and its sub-folders, each with <texts>/<name>.txt, sorted by name.

    Also what is left over: videos without a text, with an empty one, one that is not UTF-8, or with
    the name of another video; texts without a video. Raises FileNotFoundError if there is no video.
    """
    for folder in (videos, texts):
        if not folder.is_dir():
            raise NotFoundError(f"{folder}: no such folder")
    paths = {_name(p, videos): p for p in reversed(_files(videos, VIDEO_SUFFIXES))}
    if not paths:
        raise NotFoundError(f"{videos}: holds no video ({', '.join(VIDEO_SUFFIXES)})")
    pairs, rejected = [], []
    for path in _files(videos, VIDEO_SUFFIXES):
        name, file = _name(path, videos), path.relative_to(videos).as_posix()
        text = texts / f"{name}.txt"
        if path != paths[name]:
            rejected.append(Rejected(file, f"has the name of {paths[name].name}"))
        elif not text.is_file():
            rejected.append(Rejected(file, f"has no text: no {text}"))
        else:
            try:
                pairs.append(CaptionedVideo(path, name, _prompt(text)))
            except ValueError as error:
                rejected.append(Rejected(file, str(error)))
    alone = [text for text in _files(texts, (".txt",)) if _name(text, texts) not in paths]
    rejected += [Rejected(t.relative_to(texts).as_posix(), "has no video") for t in alone]
    return pairs, sorted(rejected)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder and its sub-folders by suffix, sorted, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _prompt(text: Path) -> str:
    prompt = read_utf8(text).strip()
    if not prompt:
        raise UserError(f"{text}: an empty prompt")
    return prompt


def save_clip(path: Path, clip: Clip) -> None:
    """Write one clip; the file appears whole or not at all, and its bytes follow its content."""
    with replaced_atomically(path) as part, part.open("wb") as file:
        torch.save(vars(clip), file)


def clip_files(folder: Path) -> list[Path]:
    """The .pt files of a folder and its sub-folders, sorted. Raises FileNotFoundError if none."""
    files = _files(folder, (".pt",))
    if not files:
        raise NotFoundError(f"{folder}: holds no .pt files of encoded clips")
    return files


def read_encoded_clips(path: Path) -> list[Clip]:
    """The clips of one file, whose tensors are read when they are used.

    A file of `save_clip` holds one. Files of another system map prompts to latents [1, F, C, h, w]
    or [F, C, h, w], where C is 16 or 48. Raises ValueError that tells what is wrong.
    """
    content = read_tensors(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"expected a clip, or latents by prompt, found a {_kind(content)}")
    if "latents" in content and "prompt" in content:
        return [_own(content)]
    return [_foreign(prompt, latents) for prompt, latents in content.items()]


def _own(content: Mapping[str, Any]) -> Clip:
    unknown = sorted(content.keys() - Clip.__dataclass_fields__.keys())
    if unknown:
        raise UserError(f"holds a clip with unknown entries {unknown}")
    clip = Clip(**content)
    _check_latents(clip.prompt, clip.latents)
    frame, (height, width) = clip.first_frame, clip.latents.shape[-2:]
    if frame is not None and not _enlarges(frame, height, width):
        raise UserError(f"first_frame must be uint8 (3, {height} k, {width} k), got {_kind(frame)}")
    return clip


def _enlarges(frame: object, height: int, width: int) -> bool:
    """Whether `frame` is a picture of whole pixels to each of height x width latents."""
    if not isinstance(frame, Tensor) or frame.dtype != torch.uint8 or frame.ndim != 3:
        return False
    stride = frame.shape[1] // height
    return stride > 0 and tuple(frame.shape) == (3, stride * height, stride * width)


def _foreign(prompt: object, latents: object) -> Clip:
    if isinstance(latents, Tensor) and latents.ndim == 5 and len(latents) == 1:
        latents = latents[0]
    _check_latents(prompt, latents)
    assert isinstance(latents, Tensor)
    assert isinstance(prompt, str)
    if latents.shape[1] not in FOREIGN_CHANNELS:
        channels = " or ".join(map(str, FOREIGN_CHANNELS))
        raise UserError(f"latents by prompt must be [1, F, {channels}, h, w], got {_kind(latents)}")
    return Clip(prompt, latents.transpose(0, 1))


def _check_latents(prompt: object, latents: object) -> None:
    if not isinstance(prompt, str):
        raise UserError(f"the prompt must be text, got a {_kind(prompt)}")
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise UserError(f"latents must be a tensor of numbers, got a {_kind(latents)}")
    if latents.ndim != 4 or not latents.numel():
        raise UserError(f"latents must have 4 dimensions, got {_kind(latents)}")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
