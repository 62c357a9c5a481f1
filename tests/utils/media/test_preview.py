"""Small videos and moving pictures for pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.media.preview import GAP, SIDE, save_animation, save_preview, small
from utils.media.video import frame_rate, read_video
from utils.seeding import generator


def test_clips_lie_side_by_side_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    clips = torch.zeros(2, 3, 5, 32, 32)
    clips[1] = 1.0
    save_preview(clips, tmp_path / "a" / "b.mp4", fps=8)
    found = read_video(tmp_path / "a" / "b.mp4")
    assert found.shape == (3, 5, 128, 2 * 128 + GAP)
    assert float(found[..., :120].mean()) < 0.05
    assert float(found[..., -120:].mean()) > 0.95
    assert frame_rate(tmp_path / "a" / "b.mp4") == pytest.approx(8)


def test_large_clips_become_small_and_odd_sizes_even(tmp_path: Path) -> None:
    save_preview(torch.rand(1, 3, 3, 121, 207, generator=generator(0)), tmp_path / "a.mp4", fps=16)
    height, width = read_video(tmp_path / "a.mp4").shape[2:]
    assert max(height, width) <= SIDE
    assert height % 2 == width % 2 == 0


def test_a_long_clip_is_cut(tmp_path: Path) -> None:
    save_preview(torch.zeros(1, 3, 100, 8, 8), tmp_path / "a.mp4", fps=8)
    assert read_video(tmp_path / "a.mp4").shape[1] == 48  # six seconds


def test_shrinking_keeps_brightness() -> None:
    grey = torch.full((4, 300, 200, 3), 77, dtype=torch.uint8).numpy()
    assert small(grey).shape == (4, 128, 85, 3)
    assert set(small(grey).flatten().tolist()) == {77}


def test_a_moving_picture_has_rows_of_clips_under_their_names(tmp_path: Path) -> None:
    clip = torch.rand(3, 6, 16, 16, generator=generator(1))
    save_animation([[clip, clip], [clip, clip]], ["a", "b"], tmp_path / "a.webp", fps=8)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 6  # type: ignore[attr-defined]
        assert image.size == (2 * 128 + GAP, 2 * 128 + GAP + 18)
