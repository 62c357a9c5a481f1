"""Images and videos that clips begin with: what counts is cut out, fitted and described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.videos import make_video
from utils.data.prompts import Picture
from utils.media.given_frames import (
    describe_picture,
    picture_size,
    read_fitted,
    read_given,
    read_picture,
)
from utils.media.video import save_mp4


def draw(path: Path, height: int, width: int) -> Path:
    """An image whose red tells the row and whose green tells the column."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)
    Image.fromarray(pixels).save(path)
    return path


def test_a_box_is_cut_out(tmp_path: Path) -> None:
    path = draw(tmp_path / "x.png", 20, 30)
    for origin in (None, (20, 30)):
        picture = Picture(path, (4, 2, 14, 8), origin)
        part = read_picture(picture)
        assert tuple(part.shape) == (3, 6, 10)
        assert part[0, :, 0].tolist() == list(range(2, 8))
        assert part[1, 0].tolist() == list(range(4, 14))
        assert picture_size(picture) == (6, 10)


def test_a_file_that_is_the_cut_already_is_taken_whole(tmp_path: Path) -> None:
    picture = Picture(draw(tmp_path / "x.png", 6, 10), (4, 2, 14, 8), (20, 30))
    assert picture_size(picture) == (6, 10)


def test_a_box_that_leaves_the_image_is_refused(tmp_path: Path) -> None:
    path = draw(tmp_path / "x.png", 20, 30)
    with pytest.raises(ValueError) as caught:
        read_picture(Picture(path, (4, 2, 34, 8)))
    assert str(caught.value) == (
        f"{path}: is 20 x 30, its target_bbox [4, 2, 34, 8] (left, top, right, bottom) leaves it"
    )


def test_all_that_is_done_to_an_image_is_described(tmp_path: Path) -> None:
    path = draw(tmp_path / "x.png", 20, 30)
    assert describe_picture(Picture(path, (4, 2, 24, 12)), (5, 8)) == (
        "x.png: 20 x 30 cut to its box, 10 x 20 scaled to 5 x 10, cropped to 5 x 8 (height x width)"
    )
    assert describe_picture(Picture(path), (20, 30)) == "x.png: 20 x 30 kept (height x width)"


def test_a_fitted_image_lies_in_minus_one_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4, 3), (0, 255, 51), dtype=np.uint8)).save(tmp_path / "x.png")
    pixels = read_fitted(Picture(tmp_path / "x.png"), (8, 6))
    assert tuple(pixels.shape) == (3, 8, 6)
    assert torch.allclose(pixels.mean(dim=(1, 2)), torch.tensor([-1.0, 1.0, -0.6]), atol=1e-6)


def test_an_image_is_a_start_of_one_frame(tmp_path: Path) -> None:
    start = read_given(draw(tmp_path / "x.png", 16, 32), (16, 16), most=5)
    assert tuple(start.frames.shape) == (1, 3, 1, 16, 16)
    assert start.fit == "x.png: 16 x 32 cropped to 16 x 16 (height x width)"
    columns = (start.frames[0, 1, 0, 0] + 1.0) * 127.5
    assert torch.allclose(columns, torch.arange(8.0, 24.0))


def test_a_video_gives_all_its_frames_but_not_more_than_a_clip_has(tmp_path: Path) -> None:
    path = make_video(tmp_path / "x.mp4", frames=5, size=(32, 48))
    start = read_given(path, (16, 16), most=5)
    assert tuple(start.frames.shape) == (1, 3, 5, 16, 16)
    assert start.fit == "x.mp4: 32 x 48 scaled to 16 x 24, cropped to 16 x 16 (height x width)"
    with pytest.raises(ValueError, match=r"x.mp4: has more than the 4 frames of a clip"):
        read_given(path, (16, 16), most=4)


def test_a_small_clip_that_was_written_enlarged_is_read_as_it_was_made(tmp_path: Path) -> None:
    clip = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    grey = clip.mean(dim=0, keepdim=True).expand(3, -1, -1, -1)  # yuv420p halves colours
    save_mp4(grey, tmp_path / "x.mp4", fps=8.0)
    start = read_given(tmp_path / "x.mp4", (16, 16), most=5)
    error = float(((start.frames[0] + 1.0) / 2.0 - grey).abs().mean())
    print(f"mean error of a written and read clip: {error:.4f}")
    assert error < 0.02
