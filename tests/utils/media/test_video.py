"""Clips as mp4 files and as contact sheets, and frames from videos of every kind."""

from __future__ import annotations

import contextlib
import time
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.videos import (
    ffmpeg,
    make_long_video,
    make_sound,
    make_split_video,
    make_video,
    tear,
)
from utils.media import video as module
from utils.media.video import (
    contact_sheet,
    enlarge,
    frame_rate,
    read_frames,
    save_mp4,
    save_png,
    to_bytes,
    to_unit,
)
from utils.tiny_world.world import COLOURS, FRAMES, Caption, draw_scenes, render


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
    with pytest.raises(AssertionError, match=r"clips are \[3, P, H, W\], got \(5, 4, 32, 32\)"):
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


# ---- reading


def levels(frames: list[Tensor]) -> list[int]:
    """The number of each frame of `make_video`, from its grey level."""
    return [round((float(frame.float().mean()) / 255 * 219) / 7) for frame in frames]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "\u732b -x %d.mp4"])
def test_every_frame_of_every_container_is_read_once(tmp_path: Path, name: str) -> None:
    frames = list(read_frames(make_video(tmp_path / name, frames=9)))
    assert levels(frames) == list(range(9))
    assert {(frame.shape, frame.dtype) for frame in frames} == {((3, 32, 32), torch.uint8)}


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (8, list(range(8))),
        (4, [0, 2, 4, 6]),
        (16, [n // 2 for n in range(16)]),
    ],
)
def test_a_video_is_sampled_at_the_asked_rate(
    tmp_path: Path, rate: float, expected: list[int]
) -> None:
    frames = list(read_frames(make_video(tmp_path / "a.mp4", frames=8), fps=rate))
    assert len(frames) == len(expected)
    assert all(abs(a - b) <= 1 for a, b in zip(levels(frames), expected, strict=True))
    assert levels(frames) == sorted(levels(frames))


def test_a_video_of_varying_rate_is_sampled_evenly_in_time(tmp_path: Path) -> None:
    late = "setpts='if(lt(N,8),N,8+4*(N-8))/8/TB'"  # 8 frames a second, then 2
    path = make_video(
        tmp_path / "a.mkv", "-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1:1000",
        frames=12,
    )  # fmt: skip
    shown = levels(list(read_frames(path, fps=8)))
    assert shown[:8] == list(range(8))
    assert [shown.count(n) for n in range(8, 11)] == [4, 4, 4]


def test_no_more_frames_are_given_than_asked_for(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    assert levels(list(read_frames(path, fps=8, limit=3))) == [0, 1, 2]


def test_a_video_of_two_hours_costs_the_frames_that_are_used(tmp_path: Path) -> None:
    path = make_long_video(tmp_path / "a.mp4", minutes=120)
    begin = time.monotonic()
    with contextlib.closing(read_frames(path, fps=8)) as frames:
        assert len(list(islice(frames, 5))) == 5
    limited = len(list(read_frames(path, fps=8, limit=5)))
    seconds = time.monotonic() - begin
    print(f"5 frames of a 2-hour video, twice: {seconds:.2f} s")
    assert (limited, frame_rate(path)) == (5, 8.0)
    assert seconds < 3.0


def test_an_abandoned_reader_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    popen = module.subprocess.Popen
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with contextlib.closing(read_frames(make_long_video(tmp_path / "a.mp4", 10))) as frames:
        next(frames)
        assert started[-1].poll() is None
    assert started[-1].poll() is not None


def test_a_turned_video_is_read_upright(tmp_path: Path) -> None:
    flat = make_split_video(tmp_path / "flat.mp4")
    ffmpeg("-display_rotation", "90", "-i", flat, "-c", "copy", tmp_path / "turned.mp4")
    frame = next(read_frames(tmp_path / "turned.mp4"))
    assert frame.shape == (3, 64, 32)
    assert (int(frame[0, 10, 16]), int(frame[0, 54, 16])) == (0, 255)


def test_pixels_are_made_square(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", "-vf", "setsar=3/2")
    assert next(read_frames(path)).shape == (3, 32, 48)


@pytest.mark.parametrize("size", [(31, 45), (64, 36)])
def test_odd_and_upright_sizes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    assert next(read_frames(make_video(tmp_path / "a.mp4", size=size))).shape == (3, *size)


@pytest.mark.parametrize("kind", ["yuv420p10le", "gbrp16le", "gray16le", "gray", "yuva420p"])
def test_colours_of_any_depth_are_read_as_bytes(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", kind, frames=9)
    frames = list(read_frames(path))
    assert {(frame.shape, frame.dtype) for frame in frames} == {((3, 32, 32), torch.uint8)}
    assert levels(frames) == list(range(9))


def test_a_list_that_names_another_video_is_not_followed(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(ValueError, match=r"list\.mp4: not readable as a video: "):
        next(read_frames(tmp_path / "list.mp4"))


def test_frames_of_too_many_pixels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", size=(32, 48))
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="Picture size 48x32 exceeds specified max pixel count"):
        next(read_frames(path))


def test_a_still_is_a_video_of_one_frame(tmp_path: Path) -> None:
    assert len(list(read_frames(make_video(tmp_path / "a.mp4", frames=1), fps=8))) == 1


@pytest.mark.parametrize(("fps", "expected"), [(8, 8.0), (29.97, 29.97), (60, 60.0)])
def test_the_rate_of_a_video_is_told(tmp_path: Path, fps: float, expected: float) -> None:
    path = make_video(tmp_path / "a.mp4", fps=fps)
    assert frame_rate(path) == pytest.approx(expected, abs=0.01)


def bad_videos(folder: Path) -> dict[str, Path]:
    empty, text = folder / "empty.mp4", folder / "text.mp4"
    empty.touch()
    text.write_text("this is no video")
    return {
        "an empty file": empty,
        "not readable as a video: ": text,
        "not readable as a video: moov atom not found": tear(make_video(folder / "torn.mp4")),
        "holds no video": make_sound(folder / "sound.mp4"),
    }


def test_what_is_no_video_is_named_with_its_reason(tmp_path: Path) -> None:
    for reason, path in bad_videos(tmp_path).items():
        for read in (lambda p: list(read_frames(p, fps=8)), frame_rate):
            with pytest.raises(ValueError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: {reason}")
            assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "options"), [
    ("a.mp4", ("-movflags", "+faststart")), ("a.webm", ()), ("a.mkv", ()),
])  # fmt: skip
def test_a_torn_video_gives_what_is_left_of_it_and_then_says_so(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    path = tear(make_video(tmp_path / name, *options, frames=200, size=(64, 64)), 0.6)
    frames = []
    with pytest.raises(ValueError) as caught:
        for frame in read_frames(path):
            frames.append(frame)
    assert len(frames) < 200
    assert f"{path}: not readable as a video: " in str(caught.value)


def test_a_missing_video_is_not_found(tmp_path: Path) -> None:
    for read in (lambda p: list(read_frames(p)), frame_rate):
        with pytest.raises(FileNotFoundError, match=r"a.mp4: no such video"):
            read(tmp_path / "a.mp4")
