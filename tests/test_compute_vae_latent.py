"""scripts/compute_vae_latent.py: what clips hold, however often the call was broken off."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.families.registry import open_model
from scripts import compute_vae_latent
from scripts.make_tiny_world import NAME
from tests.commands import ROOT, own_logging, refusal
from tests.folders import vae_state
from tests.ranks import run_on_ranks
from tests.videos import make_long_video, make_sound, make_split_video, make_video, tear
from utils.data import captioned_clips as clips_module
from utils.data.captioned_clips import Clip, clip_files, read_encoded_clips
from utils.media.images import fit
from utils.media.video import read_frames
from utils.tiny_world.codec import FILE_NAME, PatchCodec

__all__ = ["own_logging"]

VIDEOS = ("a", "b", "sub/c", "d", "sub/e")  # of which the last one is torn


def words(root: Path, videos: Path, output: Path, *more: str) -> list[str]:
    return [
        "--input_video_folder", str(videos), "--output_latent_folder", str(output),
        "--model_root", str(root / "wan_models"), "--model_name", NAME,
        "--height", "32", "--width", "32", "--num_frames", "17", "--fps", "8", *more,
    ]  # fmt: skip


def captioned(path: Path, prompt: str = "a grey square") -> Path:
    """A video that exists or not, with its text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(f"{prompt}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(VIDEOS):
        path = captioned(folder / f"{name}.mp4", f"prompt {number}")
        make_video(path, frames=40 + number)
    tear(folder / f"{VIDEOS[-1]}.mp4")
    return folder


@pytest.fixture(scope="module")
def made(tiny_root: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the videos, unbroken: two clips of each."""
    folder = tmp_path_factory.mktemp("made") / "latents"
    line = words(tiny_root, videos, folder, "--clips_per_video", "2")
    assert compute_vae_latent.main(line) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of every file, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_clip(folder: Path) -> Clip:
    (path,) = clip_files(folder)
    (clip,) = read_encoded_clips(path)
    return clip


def rejected(folder: Path) -> dict[str, str]:
    entries = json.loads((folder / "rejected.json").read_text(encoding="utf-8"))
    return {entry["file"]: entry["reason"] for entry in entries}


# ---- what clips hold


def test_each_clip_has_a_file_with_its_prompt_place_and_first_frame(made: Path) -> None:
    names = [path.relative_to(made).as_posix() for path in clip_files(made)]
    good = [name for name in VIDEOS if name != "sub/e"]
    assert sorted(names) == sorted(f"{name}-{n}.pt" for name in good for n in (0, 1))
    (clip,) = read_encoded_clips(made / "sub" / "c-1.pt")
    assert (clip.prompt, clip.video, clip.fps, clip.start_s) == ("prompt 2", "sub/c", 8.0, 17 / 8)
    assert (clip.latents.shape, clip.latents.dtype) == ((16, 5, 4, 4), torch.float16)
    assert clip.first_frame is not None
    assert (clip.first_frame.shape, clip.first_frame.dtype) == ((3, 32, 32), torch.uint8)


def test_files_are_plain_tensors_and_text(made: Path) -> None:
    stored = torch.load(made / "a-0.pt", weights_only=True)
    assert list(stored) == ["prompt", "latents", "first_frame", "video", "fps", "start_s"]


def test_latents_are_those_of_the_frames_one_window_after_the_other(
    tiny_root: Path, videos: Path, made: Path
) -> None:
    frames = torch.stack(list(read_frames(videos / "a.mp4")), dim=1)
    codec = PatchCodec.load(tiny_root / "wan_models" / NAME / FILE_NAME)
    for window in (0, 1):
        part = frames[:, 17 * window : 17 * (window + 1)]
        expected = codec.encode_to_latent(part[None].float() / 127.5 - 1.0)[0].half()
        (clip,) = read_encoded_clips(made / f"a-{window}.pt")
        assert torch.equal(clip.latents, expected)
        assert clip.first_frame is not None
        assert torch.equal(clip.first_frame, part[:, 0])


@pytest.mark.parametrize(
    ("more", "dtype"), [((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)]
)
def test_wans_own_autoencoder_gives_what_it_gives_for_the_whole_clip_in_fp32_unless_asked(
    more: tuple[str, ...], dtype: torch.dtype, tiny_root: Path, tmp_path: Path
) -> None:
    path = make_video(captioned(tmp_path / "v" / "a.mp4"), frames=9)
    model = tmp_path / "models" / "Wan2.1-T2V-14B"
    model.mkdir(parents=True)
    torch.save(vae_state(), model / "Wan2.1_VAE.pth")
    line = words(tiny_root, tmp_path / "v", tmp_path / "out", "--num_frames", "9")
    line += ["--model_root", str(tmp_path / "models"), "--model_name", model.name, *more]
    assert compute_vae_latent.main(line) == 0
    frames = torch.stack(list(read_frames(path)), dim=1)[None]
    vae = open_model(model).load_codec(torch.device("cpu"), dtype)
    expected = vae.encode_to_latent(frames.float() / 127.5 - 1.0)[0].half()
    assert torch.equal(one_clip(tmp_path / "out").latents, expected)


def test_frames_are_scaled_and_cropped_to_the_size(tiny_root: Path, tmp_path: Path) -> None:
    path = make_split_video(captioned(tmp_path / "v" / "a.mov"), frames=17)
    assert compute_vae_latent.main(words(tiny_root, tmp_path / "v", tmp_path / "out")) == 0
    clip = one_clip(tmp_path / "out")
    assert clip.first_frame is not None
    assert torch.equal(clip.first_frame, fit(next(read_frames(path)), (32, 32)))
    assert (int(clip.first_frame[0, 5, 5]), int(clip.first_frame[0, 5, 26])) == (255, 0)


def test_a_video_goes_to_the_bucket_of_nearest_shape(tiny_root: Path, tmp_path: Path) -> None:
    for name, size in (("wide", (48, 96)), ("tall", (90, 50)), ("square", (65, 64))):
        make_video(captioned(tmp_path / "v" / f"{name}.mp4", name), size=size)
    line = words(tiny_root, tmp_path / "v", tmp_path / "out")
    line += ["--buckets", "32x64", "64x32", "48x48"]
    assert compute_vae_latent.main(line) == 0
    found = {
        read_encoded_clips(p)[0].prompt: read_encoded_clips(p)[0]
        for p in clip_files(tmp_path / "out")
    }
    shapes = {name: tuple(clip.latents.shape[-2:]) for name, clip in found.items()}
    assert shapes == {"wide": (4, 8), "tall": (8, 4), "square": (6, 6)}


@pytest.mark.parametrize(
    ("source_fps", "frames", "latent_frames"), [(16, 34, 5), (24, 51, 5), (8, 17, 5)]
)
def test_any_rate_of_a_video_gives_clips_of_the_same_time(
    source_fps: float, frames: int, latent_frames: int, tiny_root: Path, tmp_path: Path
) -> None:
    make_video(captioned(tmp_path / "v" / "a.mp4"), frames=frames, fps=source_fps)
    assert compute_vae_latent.main(words(tiny_root, tmp_path / "v", tmp_path / "out")) == 0
    assert one_clip(tmp_path / "out").latents.shape[1] == latent_frames


@pytest.mark.parametrize(("frames", "latent_frames"), [(9, 3), (12, 3), (16, 4), (40, 5)])
def test_short_clips_are_cut_to_whole_groups_if_allowed(
    frames: int, latent_frames: int, tiny_root: Path, tmp_path: Path
) -> None:
    make_video(captioned(tmp_path / "v" / "a.mp4"), frames=frames)
    line = words(tiny_root, tmp_path / "v", tmp_path / "out", "--min_num_frames", "9")
    assert compute_vae_latent.main(line) == 0
    assert one_clip(tmp_path / "out").latents.shape[1] == latent_frames


def test_texts_may_lie_in_a_folder_of_their_own(tiny_root: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "\u732b" / "\u00fc.a b.webm")
    text = tmp_path / "texts" / "\u732b" / "\u00fc.a b.txt"
    text.parent.mkdir(parents=True)
    text.write_text(" ".join(["word"] * 3000), encoding="utf-8")
    line = words(tiny_root, tmp_path / "v", tmp_path / "out")
    assert compute_vae_latent.main([*line, "--prompt_folder", str(tmp_path / "texts")]) == 0
    clip = one_clip(tmp_path / "out")
    assert (clip.video, len(clip.prompt.split())) == ("\u732b/\u00fc.a b", 3000)
    assert rejected(tmp_path / "out") == {}


def test_a_video_of_two_hours_costs_what_is_used_of_it(tiny_root: Path, tmp_path: Path) -> None:
    make_long_video(captioned(tmp_path / "v" / "a.mp4"), minutes=120)
    begin = time.monotonic()
    assert compute_vae_latent.main(words(tiny_root, tmp_path / "v", tmp_path / "out")) == 0
    seconds = time.monotonic() - begin
    print(f"one clip of a 2-hour video: {seconds:.2f} s")
    assert one_clip(tmp_path / "out").latents.shape == (16, 5, 4, 4)
    assert seconds < 4.0


# ---- bad input


def test_what_is_of_no_use_is_listed_with_its_reason_and_the_rest_is_made(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    v = tmp_path / "v"
    make_video(captioned(v / "good.mp4"))
    make_video(captioned(v / "good.webm"))
    captioned(v / "zero.mp4").touch()
    captioned(v / "words.mkv").write_text("no video at all")
    tear(make_video(captioned(v / "torn.mp4")))
    make_sound(captioned(v / "sound.mp4"))
    make_video(captioned(v / "short.mp4"), frames=16)
    make_video(captioned(v / "slow.mp4"), fps=2)
    make_video(v / "silent.mp4")
    make_video(captioned(v / "empty.mp4", " "))
    make_video(v / "latin.mp4")
    (v / "latin.txt").write_bytes(b"a caf\xe9")
    captioned(v / "nothing.mp4")
    assert compute_vae_latent.main(words(tiny_root, v, tmp_path / "out")) == 0
    reasons = rejected(tmp_path / "out")
    assert reasons == {
        "good.webm": "has the name of good.mp4",
        "zero.mp4": "an empty file",
        "words.mkv": reasons["words.mkv"],
        "torn.mp4": "not readable as a video: moov atom not found",
        "sound.mp4": "holds no video",
        "short.mp4": "too short: 16 frames at 8 per second, expected at least 17",
        "slow.mp4": "has 2 frames per second, fewer than 4: they would repeat",
        "silent.mp4": f"has no text: no {v}/silent.txt",
        "empty.mp4": f"{v}/empty.txt: an empty prompt",
        "latin.mp4": f"{v}/latin.txt: not UTF-8 at byte 5; save it as UTF-8",
        "nothing.txt": "has no video",
    }
    assert reasons["words.mkv"].startswith("not readable as a video: ")
    assert [path.name for path in clip_files(tmp_path / "out")] == ["good.pt"]


def test_a_video_torn_in_its_second_clip_gives_none(tiny_root: Path, tmp_path: Path) -> None:
    path = make_video(captioned(tmp_path / "v" / "a.mkv"), frames=200, size=(64, 64))
    tear(path, 0.15)
    with pytest.raises(ValueError, match="frames could be read") as caught:
        list(read_frames(path))
    assert 17 < int(str(caught.value).rpartition("(")[2].partition(" ")[0]) < 100
    line = words(tiny_root, tmp_path / "v", tmp_path / "out", "--clips_per_video", "8")
    assert compute_vae_latent.main(line) == 0
    assert list(rejected(tmp_path / "out")) == ["a.mkv"]
    assert list((tmp_path / "out").glob("*.pt")) == []


def test_the_rejected_are_tried_again(tiny_root: Path, tmp_path: Path) -> None:
    path = captioned(tmp_path / "v" / "a.mp4")
    path.touch()
    line = words(tiny_root, tmp_path / "v", tmp_path / "out")
    assert compute_vae_latent.main(line) == 0
    assert rejected(tmp_path / "out") == {"a.mp4": "an empty file"}
    make_video(path)
    assert compute_vae_latent.main(line) == 0
    assert rejected(tmp_path / "out") == {}
    assert one_clip(tmp_path / "out").video == "a"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num_frames", "16"), "--num_frames: must be 1 + 4 k, as 81, got 16"),
        (("--height", "40"), "40 x 32: both sides must be multiples of 16 up to 8192"),
        (("--width", "8208"), "32 x 8208: both sides must be multiples of 16 up to 8192"),
        *(
            (
                (f"--{flag}", value),
                f"--{flag}: must lie between 0.1 and 1000 frames per second, got {value}",
            )
            for flag in ("fps", "min_source_fps")
            for value in ("inf", "nan", "1e-09", "-1", "1001")
        ),
        (
            ("--fps", "0"),
            "--fps: must lie between 0.1 and 1000 frames per second, got 0",
        ),
        (("--clips_per_video", "0"), "--clips_per_video: must be at least 1, got 0"),
        (
            ("--min_num_frames", "21"),
            "--min_num_frames: must lie between 1 and --num_frames, got 21",
        ),
        (("--input_video_folder", "nowhere"), "nowhere: no such folder"),
        (("--prompt_folder", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_a_bad_argument_gives_one_line_and_no_folder(
    more: tuple[str, ...],
    message: str,
    tiny_root: Path,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = words(tiny_root, videos, tmp_path / "out", *more)
    assert refusal(compute_vae_latent.main, line, capsys) == message
    assert not (tmp_path / "out").exists()


def test_a_folder_without_videos_is_refused(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v").mkdir()
    message = refusal(
        compute_vae_latent.main, words(tiny_root, tmp_path / "v", tmp_path / "out"), capsys
    )
    assert message == f"{tmp_path}/v: holds no video (.mp4, .webm, .mov, .mkv, .avi, .m4v)"


def test_a_model_needs_its_vae_and_nothing_else(
    tiny_root: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "models" / NAME
    model.mkdir(parents=True)
    (model / "notes.txt").touch()
    line = words(tmp_path, videos, tmp_path / "out", "--model_root", str(tmp_path / "models"))
    message = refusal(compute_vae_latent.main, line, capsys)
    assert message.startswith(f"{model}: has no VAE (found ['notes.txt']); make it ")
    (model / FILE_NAME).write_bytes((tiny_root / "wan_models" / NAME / FILE_NAME).read_bytes())
    assert compute_vae_latent.main(line) == 0


# ---- however it was made


def test_a_second_call_makes_nothing(tiny_root: Path, videos: Path, made: Path) -> None:
    before = content(made)
    line = words(tiny_root, videos, made, "--clips_per_video", "2")
    with patch.object(compute_vae_latent, "encode", lambda *_: pytest.fail("encoded again")):
        assert compute_vae_latent.main(line) == 0
    assert content(made) == before


def test_two_processes_make_what_one_makes_byte_for_byte(
    tiny_root: Path, videos: Path, made: Path, tmp_path: Path
) -> None:
    line = words(tiny_root, videos, tmp_path / "two", "--clips_per_video", "2")
    assert run_on_ranks(2, compute_vae_latent.main, line) == [0, 0]
    assert content(tmp_path / "two") == content(made)


class Killed(BaseException):
    """What no command catches."""


@pytest.mark.parametrize("writes", range(8))
def test_a_call_killed_between_any_two_files_is_continued_to_the_same_bytes(
    writes: int, tiny_root: Path, videos: Path, made: Path, tmp_path: Path
) -> None:
    save, count = torch.save, itertools.count()
    line = words(tiny_root, videos, tmp_path, "--clips_per_video", "2")

    def killed(*arguments: Any) -> None:
        if next(count) == writes:
            raise Killed
        save(*arguments)

    with patch.object(clips_module.torch, "save", killed), pytest.raises(Killed):
        compute_vae_latent.main(line)
    (tmp_path / ".a-0.pt.123.part.pt").write_bytes(b"left by a killed process")
    assert len(list(tmp_path.rglob("[!.]*.pt"))) == writes
    assert compute_vae_latent.main(line) == 0
    assert content(tmp_path) == content(made)


def test_a_killed_process_is_continued_to_the_same_bytes(
    tiny_root: Path, videos: Path, made: Path, tmp_path: Path
) -> None:
    line = words(tiny_root, videos, tmp_path, "--clips_per_video", "2")
    script = ROOT / "scripts" / "compute_vae_latent.py"
    process = subprocess.Popen(
        [sys.executable, str(script), *line],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.rglob("*-0.pt")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*-0.pt"))) < len(list(made.rglob("*-0.pt")))
    assert compute_vae_latent.main(line) == 0
    assert content(tmp_path) == content(made)


def test_a_full_disk_ends_the_call_and_rejects_no_video(
    tiny_root: Path, videos: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(tiny_root, videos, tmp_path, "--clips_per_video", "2")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(compute_vae_latent, "save_clip", side_effect=full):
        assert compute_vae_latent.main(line) == 2
    captured = capsys.readouterr().err
    assert "error: no space left on device; make room, then run the same command " in captured
    assert "rejected" not in captured
    assert compute_vae_latent.main(line) == 0
    assert content(tmp_path) == content(made)


def test_a_stopped_call_says_how_to_go_on(tiny_root: Path, videos: Path, tmp_path: Path) -> None:
    line = words(tiny_root, videos, tmp_path)
    with patch.object(compute_vae_latent, "encode", side_effect=KeyboardInterrupt):
        assert compute_vae_latent.main(line) == 130


@pytest.mark.parametrize(
    ("more", "change"),
    [
        (("--fps", "4"), "fps was 8.0, is 4.0; min_source_fps was 4.0, is 2.0"),
        (("--height", "48"), "sizes was ['32x32'], is ['48x32']"),
        (("--clips_per_video", "1"), "clips_per_video was 2, is 1"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_left_alone(
    more: tuple[str, ...],
    change: str,
    tiny_root: Path,
    videos: Path,
    made: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(made)
    line = words(tiny_root, videos, made, "--clips_per_video", "2", *more)
    assert refusal(compute_vae_latent.main, line, capsys) == (
        f"--output_latent_folder {made}: holds latents of other settings ({change}); use another "
        "folder"
    )
    assert content(made) == before


def test_a_folder_that_was_begun_in_bf16_is_told_and_continued_in_bf16(
    tiny_root: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(tiny_root, videos, tmp_path / "half", "--clips_per_video", "2")
    assert compute_vae_latent.main([*line, "--dtype", "bfloat16"]) == 0
    assert refusal(compute_vae_latent.main, line, capsys) == (
        f"--output_latent_folder {tmp_path}/half: holds latents of other settings (precision was "
        "bfloat16, is float32); use another folder"
    )
    (tmp_path / "half" / "a-0.pt").unlink()
    assert compute_vae_latent.main([*line, "--dtype", "bfloat16"]) == 0


def test_latents_of_another_vae_are_refused(
    tiny_root: Path, videos: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = PatchCodec.load(tiny_root / "wan_models" / NAME / FILE_NAME)
    other.get_buffer("first_mean").add_(0.01)
    (tmp_path / NAME).mkdir()
    other.save(tmp_path / NAME / FILE_NAME)
    line = words(tiny_root, videos, made, "--clips_per_video", "2", "--model_root", str(tmp_path))
    assert "(vae was " in refusal(compute_vae_latent.main, line, capsys)
