"""Clips as mp4 files and as contact sheets."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from utils.shapes_world import COLOURS, FRAMES, Caption, draw_scenes, render
from utils.video import contact_sheet, enlarge, save_mp4, save_png, to_bytes, to_unit


def flat(red: float, green: float, blue: float, frames: int = 5, side: int = 32) -> Tensor:
    colour = torch.tensor([red, green, blue]).view(3, 1, 1, 1)
    return colour.expand(3, frames, side, side)


def test_pixels_are_moved_from_minus_one_one_to_zero_one() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert torch.equal(to_unit(pixels), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_bytes_are_rounded_and_channels_last() -> None:
    frames = to_bytes(flat(0.0, 0.5, 1.0, frames=2, side=4))
    assert (frames.shape, frames.dtype) == ((2, 4, 4, 3), np.uint8)
    assert frames[0, 0, 0].tolist() == [0, 128, 255]


def test_small_clips_are_enlarged_by_a_whole_factor() -> None:
    frames = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    large = enlarge(frames, min_side=7)
    assert large.shape == (2, 9, 15, 3)
    assert np.array_equal(large[:, ::3, ::3], frames)


def test_large_clips_keep_their_size() -> None:
    assert enlarge(np.zeros((1, 480, 832, 3), np.uint8)).shape == (1, 480, 832, 3)


@pytest.mark.parametrize("frames", [1, 17])
def test_an_mp4_has_as_many_frames_as_the_clip(tmp_path: Path, frames: int) -> None:
    save_mp4(flat(0.2, 0.4, 0.6, frames=frames), tmp_path / "a.mp4", fps=8)
    assert iio.imread(tmp_path / "a.mp4").shape == (frames, 256, 256, 3)


def test_an_mp4_plays_at_its_rate(tmp_path: Path) -> None:
    save_mp4(flat(0.2, 0.4, 0.6, frames=16), tmp_path / "a.mp4", fps=8)
    assert iio.immeta(tmp_path / "a.mp4")["fps"] == 8.0


def test_an_mp4_keeps_the_colours(tmp_path: Path) -> None:
    scenes = draw_scenes(
        [Caption("green", "bar", "left", "slowly", "dark")], torch.Generator().manual_seed(0)
    )
    clip = render(scenes)[0]
    save_mp4(clip, tmp_path / "a.mp4", fps=8)
    frame = iio.imread(tmp_path / "a.mp4")[FRAMES // 2]
    x, y = ((scenes.start + scenes.travel / 2)[0] * 256).long().tolist()
    expected = np.array(COLOURS["green"]) * 255
    assert np.abs(frame[y - 4 : y + 4, x - 4 : x + 4].mean(axis=(0, 1)) - expected).max() < 8


def test_an_mp4_of_odd_size_is_written(tmp_path: Path) -> None:
    save_mp4(flat(0.2, 0.4, 0.6, side=257), tmp_path / "a.mp4", fps=8)
    assert len(iio.imread(tmp_path / "a.mp4")) == 5


def test_a_failed_mp4_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1, 2, 3 or 4 channels"):
        save_mp4(torch.zeros(5, 4, 32, 32), tmp_path / "a.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


RED = (255, 0, 0)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels of a picture have exactly this colour."""
    return int((np.asarray(sheet) == np.array(colour)).all(axis=2).sum())


def test_a_contact_sheet_shows_the_asked_number_of_frames_of_each_clip() -> None:
    sheet = contact_sheet([flat(1.0, 0.0, 0.0)] * 3, ["", "", ""], frames=4, side=96)
    assert count(sheet, RED) == 3 * 4 * 96 * 96


def test_a_contact_sheet_shows_first_and_last_frame() -> None:
    clip = torch.stack([flat(value, 0.0, 0.0, frames=1)[:, 0] for value in (0.2, 0.6, 1.0)], dim=1)
    sheet = contact_sheet([clip], [""], frames=2, side=96)
    shown = [count(sheet, (level, 0, 0)) for level in (51, 153, 255)]
    assert shown == [96 * 96, 0, 96 * 96]


def test_a_contact_sheet_shrinks_large_clips_to_its_cells() -> None:
    sheet = contact_sheet([flat(1.0, 0.0, 0.0, side=200)], [""], frames=1, side=96)
    assert count(sheet, RED) == 96 * 96


def test_columns_of_a_contact_sheet_take_width_for_height() -> None:
    clips, labels = [flat(1.0, 0.0, 0.0)] * 4, [""] * 4
    one, two = (contact_sheet(clips, labels, columns=columns) for columns in (1, 2))
    assert two.width == 2 * one.width
    assert two.height < 0.6 * one.height
    assert count(one, RED) == count(two, RED)


def test_a_contact_sheet_writes_the_labels() -> None:
    plain, labelled = (contact_sheet([flat(1.0, 0.0, 0.0)], [text]) for text in ("", "a cat"))
    assert np.any(np.asarray(plain) != np.asarray(labelled))


def test_a_contact_sheet_wants_a_label_for_each_clip() -> None:
    with pytest.raises(ValueError):
        contact_sheet([flat(1.0, 0.0, 0.0)], [])


def test_a_png_is_written_whole(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (5, 3), (1, 2, 3)), tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert (image.size, image.getpixel((0, 0))) == ((5, 3), (1, 2, 3))
