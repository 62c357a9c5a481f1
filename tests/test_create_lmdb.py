"""scripts/create_lmdb_14b_shards.py: from .pt files to shards, however often it was broken off."""

from __future__ import annotations

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
from torch import Tensor

from scripts import compute_vae_latent, create_lmdb_14b_shards
from tests.commands import ROOT, main_and_stderr, own_logging
from tests.ranks import run_on_ranks
from tests.runs import rows, run, write_config
from tests.test_compute_vae_latent import Killed, captioned, words
from tests.videos import make_video, tear
from utils.data.captioned_clips import Clip, save_clip
from utils.data.shards import ShardReader, ShardWriter
from utils.media.images import fit
from utils.media.video import read_frames

__all__ = ["own_logging"]


def line(data: Path, output: Path, *more: str) -> list[str]:
    return ["--data_path", str(data), "--lmdb_path", str(output), "--num_shards", "2", *more]


def create(data: Path, output: Path, *more: str) -> int:
    return create_lmdb_14b_shards.main(line(data, output, *more))


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says about bad input: one line beside its progress bars, exit status 2."""
    capsys.readouterr()
    status = create_lmdb_14b_shards.main(words)
    captured = capsys.readouterr()
    (message,) = (row for row in captured.err.splitlines() if row.startswith("error: "))
    assert (status, captured.out, "Traceback" in captured.err) == (2, "", False)
    return message.removeprefix("error: ")


def latents(number: int, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(number)
    return torch.randn(shape or (16, 5, 4, 4), generator=rng).half()


def clip(number: int, prompt: str | None = None, *shape: int, video: str | None = None) -> Clip:
    values = latents(number, *shape)
    frame = torch.full((3, 8 * values.shape[-2], 8 * values.shape[-1]), number, dtype=torch.uint8)
    text, name = prompt or f"prompt {number}", video or f"video {number}"
    return Clip(text, values, frame, name, 8.0, 0.0)


def save_clips(folder: Path, count: int = 7) -> Path:
    """Clips 0, 1, ... of one shape; clip 3 is not finite."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        made = clip(number)
        if number == 3:
            made.latents[0, 0, 0, 0] = torch.inf
        save_clip(folder / f"{number}.pt", made)
    return folder


def records(folder: Path) -> list[tuple[str, str, bytes, bytes]]:
    """Everything that shards hold, in order."""
    return [
        (
            shard.name,
            shard.prompt(row),
            shard.latents(row).numpy().tobytes(),
            b"" if shard.image_shape is None else shard.image(row).numpy().tobytes(),
        )
        for shard in ShardReader(folder).shards
        for row in range(shard.rows)
    ]


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def rejected(folder: Path) -> dict[str, str]:
    return {entry["file"]: entry["reason"] for entry in report(folder)["rejected_files"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def shards(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, unbroken."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    assert create(data, folder) == 0
    return folder


# ---- what shards hold


def test_records_are_dealt_to_shards_in_turn(shards: Path) -> None:
    names = [(name, prompt) for name, prompt, *_ in records(shards)]
    even, odd = (f"shard_16x5x4x4_{n:05d}" for n in (0, 1))
    assert names == [
        *((even, f"prompt {n}") for n in (0, 2, 4, 6)),
        *((odd, f"prompt {n}") for n in (1, 5)),
    ]


def test_latents_and_first_frames_are_those_of_the_files_bit_for_bit(shards: Path) -> None:
    reader = ShardReader(shards)
    for index in range(len(reader)):
        number = int(reader.prompt(index).split()[1])
        assert torch.equal(reader.latents(index), latents(number).float())
        assert reader.image(index).unique().tolist() == [number]


def test_what_is_not_finite_is_rejected_and_reported(shards: Path) -> None:
    found = report(shards)
    assert (found["records"], found["duplicates"], found["rejected"]) == (6, 0, 1)
    assert rejected(shards) == {"3.pt": "its latents are not finite"}


def test_several_shapes_lie_in_shards_of_their_own(tmp_path: Path) -> None:
    shapes = [(16, 5, 4, 4), (16, 5, 4, 8), (16, 3, 4, 4), (8, 5, 4, 4)]
    for number, shape in enumerate(shapes * 3):
        save_clip(tmp_path / "d" / f"{number:02d}.pt", clip(number, None, *shape))
    assert create(tmp_path / "d", tmp_path / "out") == 0
    reader = ShardReader(tmp_path / "out")
    assert {(s.latent_shape, s.image_shape) for s in reader.shards} == {
        (shape, (8 * shape[2], 8 * shape[3])) for shape in shapes
    }
    assert [s.rows for s in reader.shards] == [2, 1] * 4
    assert len(reader) == 12


def test_videos_become_data_that_a_run_learns_from(tiny_root: Path, tmp_path: Path) -> None:
    for number in range(4):
        make_video(captioned(tmp_path / "v" / f"{number}.mp4", f"a red ring {number}"))
    made = words(tiny_root, tmp_path / "v", tmp_path / "latents")
    assert compute_vae_latent.main(made) == 0
    assert create(tmp_path / "latents", tmp_path / "out") == 0
    config = write_config(tmp_path, tiny_root, "diffusion")
    run(config, tmp_path / "run", f"data.path={tmp_path / 'out'}", "steps=1")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_images_may_be_left_out(data: Path, tmp_path: Path) -> None:
    assert create(data, tmp_path, "--no_images") == 0
    assert ShardReader(tmp_path).image_shape(0) is None
    assert report(tmp_path)["images"] is False


# ---- what is not taken


@pytest.mark.parametrize(
    ("more", "prompts"), [((), ["x", "x", "y", "y"]), (("--drop_duplicates",), ["x", "y"])]
)
def test_prompts_that_come_again_are_counted_and_kept_unless_they_are_to_be_dropped(
    more: tuple[str, ...], prompts: list[str], tmp_path: Path
) -> None:
    for number, prompt in enumerate(["x", "y", "x ", "y"]):
        save_clip(tmp_path / "d" / f"{number}.pt", clip(number, prompt))
    assert create(tmp_path / "d", tmp_path / "out", *more) == 0
    assert sorted(prompt for _, prompt, *_ in records(tmp_path / "out")) == prompts
    found = report(tmp_path / "out")
    assert (found["records"], found["duplicates_dropped"]) == (len(prompts), len(prompts) == 2)
    assert found["duplicate_files"] == [
        {"file": "2.pt", "reason": "has the prompt of 0.pt"},
        {"file": "3.pt", "reason": "has the prompt of 1.pt"},
    ]


def test_clips_of_one_video_share_their_prompt(tmp_path: Path) -> None:
    for number in range(3):
        save_clip(tmp_path / "d" / f"{number}.pt", clip(number, "x", video="a"))
    assert create(tmp_path / "d", tmp_path / "out") == 0
    assert (report(tmp_path / "out")["records"], report(tmp_path / "out")["duplicates"]) == (3, 0)


def bad_files(folder: Path) -> Path:
    save_clip(folder / "good.pt", clip(0, "word " * 3000))
    save_clip(folder / "empty_prompt.pt", clip(1, "  "))
    save_clip(folder / "short_prompt.pt", clip(2, "a cat"))
    save_clip(folder / "torn.pt", clip(3))
    tear(folder / "torn.pt")
    (folder / "zero.pt").touch()
    save_clip(folder / "flat.pt", clip(4, "long enough", 16, 4, 4))
    save_clip(folder / "no_frame.pt", Clip("long enough as well", latents(5)))
    wrong = Clip("long enough too", latents(6), torch.zeros(3, 32, 40, dtype=torch.uint8))
    save_clip(folder / "other_frame.pt", wrong)
    torch.save({**vars(clip(7)), "first_frame": "none"}, folder / "worded_frame.pt")
    torch.save({**vars(clip(8)), "weather": "fine"}, folder / "weather.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"a prompt of words": torch.zeros(1, 5, 8, 4, 4)}, folder / "channels.pt")
    torch.save({"a prompt of words": 3}, folder / "number.pt")
    torch.save({"a prompt of words": Path("x")}, folder / "code.pt")
    return folder


def test_each_file_that_cannot_be_taken_is_listed_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    assert create(bad_files(folder), tmp_path / "out", "--min_prompt_chars", "10") == 0
    reasons = rejected(tmp_path / "out")
    unreadable = {name: reasons.pop(name) for name in ("torn.pt", "zero.pt", "code.pt")}
    assert all(text.startswith("not a file of plain tensors: ") for text in unreadable.values())
    assert reasons == {
        "empty_prompt.pt": "an empty prompt",
        "short_prompt.pt": "a prompt of 5 characters, shorter than 10",
        "flat.pt": "latents must have 4 dimensions, got float16 (16, 4, 4)",
        "no_frame.pt": "has no first frame, and no video has its prompt; see --video_path, "
        "--no_images",
        "other_frame.pt": "first_frame must be uint8 (3, 4 k, 4 k), got uint8 (3, 32, 40)",
        "worded_frame.pt": "first_frame must be uint8 (3, 4 k, 4 k), got str",
        "weather.pt": "holds a clip with unknown entries ['weather']",
        "tensor.pt": "expected a clip, or latents by prompt, found a float32 (3,)",
        "channels.pt": "latents by prompt must be [1, F, 16 or 48, h, w], got float32 (5, 8, 4, 4)",
        "number.pt": "latents must be a tensor of numbers, got a int",
    }
    ((_, prompt, *_),) = records(tmp_path / "out")
    assert len(prompt.split()) == 3000


def test_a_folder_with_nothing_of_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.pt").touch()
    message = refused(line(tmp_path / "d", tmp_path / "out"), capsys)
    begin = f"{tmp_path}/d: holds no clip of use (a.pt: not a file of plain tensors: "
    assert message.startswith(begin)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num_shards", "0"), "--num_shards: must be at least 1, got 0"),
        (("--min_prompt_chars", "-1"), "--min_prompt_chars: must be at least 0, got -1"),
        (("--data_path", "nowhere"), "nowhere: holds no .pt files of encoded clips"),
        (("--video_path", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_a_bad_argument_gives_one_line_and_no_folder(
    more: tuple[str, ...],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert refused(line(data, output, *more), capsys) == message
    assert not output.exists()


# ---- files of another system


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Files that map prompts to latents, frames first; videos; and their texts elsewhere."""
    (tmp_path / "d").mkdir()
    for number in range(3):
        by_prompt = {f"prompt {number}": latents(number, 1, 5, 16, 4, 4).float()}
        torch.save(by_prompt, tmp_path / "d" / f"{number:08d}.pt")
        make_video(
            tmp_path / "videos" / f"v{number}.mp4", frames=3 + number, size=(32, 32 + 16 * number)
        )
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"v{number}.txt").write_text(f"prompt {number}\n")
    return tmp_path


def test_latents_of_another_system_are_turned(foreign: Path) -> None:
    assert create(foreign / "d", foreign / "out") == 0
    reader = ShardReader(foreign / "out")
    assert (len(reader), reader.image_shape(0)) == (3, None)
    for index in range(3):
        number = int(reader.prompt(index).split()[1])
        expected = latents(number, 1, 5, 16, 4, 4)[0].transpose(0, 1).float()
        assert torch.equal(reader.latents(index), expected)


def test_latents_of_another_system_may_be_wan22s(foreign: Path) -> None:
    by_prompt = {"prompt 0": latents(0, 1, 5, 48, 4, 4).float()}
    torch.save(by_prompt, foreign / "d" / "00000000.pt")
    assert create(foreign / "d", foreign / "out") == 0
    reader = ShardReader(foreign / "out")
    (own,) = (i for i in range(len(reader)) if reader.prompt(i) == "prompt 0")
    expected = latents(0, 1, 5, 48, 4, 4)[0].transpose(0, 1).float()
    assert torch.equal(reader.latents(own), expected)


def test_first_frames_come_from_the_video_with_the_same_prompt(foreign: Path) -> None:
    (foreign / "texts" / "v1.txt").write_text("another prompt")
    (foreign / "videos" / "v2.mp4").write_bytes(b"")
    more = ["--video_path", str(foreign / "videos"), "--prompt_path", str(foreign / "texts")]
    assert create(foreign / "d", foreign / "out", *more) == 0
    reader = ShardReader(foreign / "out")
    assert [reader.prompt(i) for i in range(len(reader))] == ["prompt 0"]
    expected = fit(next(read_frames(foreign / "videos" / "v0.mp4")), (32, 32))
    assert torch.equal(reader.image(0), expected)
    reasons = rejected(foreign / "out")
    assert reasons["00000001.pt"].startswith("has no first frame, and no video has its prompt")
    assert "v2.mp4: an empty file" in reasons["00000002.pt"]


def two_videos_of_one_prompt(folder: Path) -> list[str]:
    """Clips of prompt 0 without a first frame, and videos of it; the flags that name these."""
    torch.save({"prompt 0": latents(3, 1, 5, 16, 4, 4).float()}, folder / "d" / "00000003.pt")
    (folder / "texts" / "v2.txt").write_text("prompt 0\n")
    return ["--video_path", str(folder / "videos"), "--prompt_path", str(folder / "texts")]


def test_a_clip_that_may_be_from_either_of_two_videos_is_rejected(foreign: Path) -> None:
    more = two_videos_of_one_prompt(foreign)
    save_clip(foreign / "d" / "own.pt", Clip("prompt 0", latents(4), None, "v2"))
    assert create(foreign / "d", foreign / "out", *more) == 0
    fault = (
        "has no first frame, and v0 and v2 both have its prompt, so that nobody knows which it is "
        "from; see --no_images"
    )
    reasons = rejected(foreign / "out")
    assert (reasons["00000000.pt"], reasons["00000003.pt"]) == (fault, fault)
    reader = ShardReader(foreign / "out")
    (own,) = (i for i in range(len(reader)) if reader.prompt(i) == "prompt 0")
    assert torch.equal(reader.latents(own), latents(4).float())
    expected = fit(next(read_frames(foreign / "videos" / "v2.mp4")), (32, 32))
    assert torch.equal(reader.image(own), expected)


def test_without_duplicates_the_first_video_of_a_prompt_is_taken(foreign: Path) -> None:
    more = two_videos_of_one_prompt(foreign)
    assert create(foreign / "d", foreign / "out", *more, "--drop_duplicates") == 0
    reader = ShardReader(foreign / "out")
    (own,) = (i for i in range(len(reader)) if reader.prompt(i) == "prompt 0")
    expected = fit(next(read_frames(foreign / "videos" / "v0.mp4")), (32, 32))
    assert torch.equal(reader.image(own), expected)


@pytest.mark.parametrize(("channels", "more", "side"), [(48, (), 64), (6, (4,), 16)])
def test_a_first_frame_is_as_large_as_the_autoencoder_of_so_many_channels_saw_it(
    foreign: Path, channels: int, more: tuple[int, ...], side: int
) -> None:
    save_clip(foreign / "d" / "00000000.pt", Clip("prompt 0", latents(0, channels, 5, 4, 4)))
    told = [word for stride in more for word in ("--spatial_stride", str(stride))]
    videos = ["--video_path", str(foreign / "videos"), "--prompt_path", str(foreign / "texts")]
    assert create(foreign / "d", foreign / "out", *videos, *told) == 0
    reader = ShardReader(foreign / "out")
    (own,) = (i for i in range(len(reader)) if reader.prompt(i) == "prompt 0")
    assert reader.image(own).shape == (3, side, side)


def test_latents_of_an_unknown_autoencoder_get_no_guessed_first_frame(foreign: Path) -> None:
    save_clip(foreign / "d" / "00000000.pt", Clip("prompt 0", latents(0, 6, 5, 4, 4)))
    videos = ["--video_path", str(foreign / "videos"), "--prompt_path", str(foreign / "texts")]
    assert create(foreign / "d", foreign / "out", *videos) == 0
    fault = "has 6 channels, of no known autoencoder: give --spatial_stride"
    assert rejected(foreign / "out") == {"00000000.pt": fault}


# ---- however they were made


def test_a_second_call_changes_nothing(data: Path, shards: Path) -> None:
    before = [path.read_bytes() for path in sorted(shards.rglob("data.mdb"))]
    with patch.object(create_lmdb_14b_shards, "load", lambda *_: pytest.fail("read again")):
        assert create(data, shards) == 0
    assert [path.read_bytes() for path in sorted(shards.rglob("data.mdb"))] == before


def test_two_processes_make_what_one_makes(data: Path, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    assert run_on_ranks(2, create_lmdb_14b_shards.main, line(data, output)) == [0, 0]
    assert (records(output), report(output)) == (records(shards), report(shards))


@pytest.mark.parametrize("steps", range(8))
def test_a_call_killed_between_any_two_records_is_continued_to_the_same_records(
    steps: int, data: Path, shards: Path, tmp_path: Path
) -> None:
    load, count = create_lmdb_14b_shards.load, itertools.count()

    def killed(*arguments: Any) -> Any:
        if next(count) == steps:
            raise Killed
        return load(*arguments)

    with patch.object(create_lmdb_14b_shards, "load", killed):
        if steps < 7:
            with pytest.raises(Killed):
                create(data, tmp_path)
        else:
            assert create(data, tmp_path) == 0
    assert create(data, tmp_path) == 0
    assert (records(tmp_path), report(tmp_path)) == (records(shards), report(shards))


def test_a_killed_process_is_continued_to_the_same_records(tmp_path: Path) -> None:
    many = save_clips(tmp_path / "d", 200)
    assert create(many, tmp_path / "whole") == 0
    output = tmp_path / "killed"
    script = ROOT / "scripts" / "create_lmdb_14b_shards.py"
    process = subprocess.Popen(
        [sys.executable, str(script), *line(many, output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not list(output.glob("*_00000/data.mdb")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "report.json").exists()
    assert create(many, output) == 0
    assert (records(output), report(output)) == (
        records(tmp_path / "whole"), report(tmp_path / "whole"),
    )  # fmt: skip


def create_and_say(data: str, output: str) -> tuple[int, str]:
    return main_and_stderr(create_lmdb_14b_shards.main, line(Path(data), Path(output)))


def test_a_rank_says_what_it_alone_has_met_and_the_others_which_rank_it_was(
    data: Path, tmp_path: Path
) -> None:
    assert create(data, tmp_path) == 0
    tear(tmp_path / "shard_16x5x4x4_00001" / "data.mdb")
    first, second = run_on_ranks(2, create_and_say, str(data), str(tmp_path))
    assert (first[0], second[0]) == (2, 2)
    assert f"error: rank 1: {tmp_path}/shard_16x5x4x4_00001: cut off" in second[1]
    assert "error: rank 1 stopped: " in first[1]
    assert "shard_16x5x4x4_00001: cut off" in first[1]


def test_a_folder_whose_clips_changed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_clips(tmp_path / "d", 2)
    assert create(folder, tmp_path / "out") == 0
    before = records(tmp_path / "out")
    save_clip(folder / "9.pt", clip(9))
    message = refused(line(folder, tmp_path / "out"), capsys)
    begin = f"--lmdb_path {tmp_path}/out: holds shards of other settings (content of --data_path "
    assert message.startswith(f"{begin}was 2 clips (")
    assert message.endswith("); use another folder")
    assert records(tmp_path / "out") == before


def test_other_settings_are_refused(
    data: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = line(data, shards, "--min_prompt_chars", "3")
    assert "min_prompt_chars was 0, is 3" in refused(more, capsys)


def test_shards_of_unknown_origin_are_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "shard_0") as writer:
        writer.append(["x"])
    message = refused(line(data, tmp_path), capsys)
    assert message == (
        f"--lmdb_path {tmp_path}: holds shards of unknown origin (it has no settings.json); use "
        "another folder"
    )


def test_a_shard_cut_in_half_is_named_and_not_written_to(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create(data, tmp_path) == 0
    path = tear(tmp_path / "shard_16x5x4x4_00001" / "data.mdb")
    before = path.read_bytes()
    capsys.readouterr()
    assert create(data, tmp_path) == 2
    assert f"error: {path.parent}: cut off, data.mdb has " in capsys.readouterr().err
    assert path.read_bytes() == before
