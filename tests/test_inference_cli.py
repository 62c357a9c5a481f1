"""inference.py as its user meets it: which files, equal to the byte however they were made."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import Tensor

import convert_checkpoint
import inference
from model.wan.config import WanConfig
from pipeline.request import Request
from tests.commands import no_weights, own_logging, refusal
from tests.conftest import build_wan
from tests.ranks import run_on_ranks
from tests.runs import read_state, run, step_folder, write_config
from tests.videos import make_long_video
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.files import replaced_atomically
from utils.media.video import save_mp4
from utils.weights import write_weights

__all__ = ["no_weights", "own_logging"]

PROMPTS = (
    "a red circle moves right quickly on a dark floor",
    "a green bar moves up/down slowly",
    "a blue triangle moves left slowly on a light floor",
)


@dataclass(frozen=True)
class Student:
    """A trained model, prompts, and the clips of one plain call."""

    config: Path
    logdir: Path
    prompts: Path
    clips: Path  # of PROMPTS, batch size 2, one process

    def words(self, output: Path, *more: str, weights: Path | None = None) -> list[str]:
        """The command line of the plain call into another folder, with changes."""
        return [
            "--config_path", str(self.config), "--checkpoint_path", str(weights or self.logdir),
            "--data_path", str(self.prompts), "--output_folder", str(output),
            "--batch_size", "2", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Student:
    """A DMD student of two steps, whose average lags far behind, and its clips."""
    folder = tmp_path_factory.mktemp("student")
    config = write_config(folder, tiny_root, "dmd")
    settings = ("steps=2", "save_every=1", "generator.lr=0.05", "ema.start_step=0", "ema.decay=0.9")
    logdir = run(config, folder / "run", *settings)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    made = Student(config, logdir, prompts, folder / "clips")
    assert inference.main(made.words(made.clips)) == 0
    return made


def digests(folder: Path) -> dict[str, str]:
    """The content of each clip of a folder, by file name."""
    paths = sorted(folder.glob("*.mp4"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def infer(line: list[str]) -> tuple[int, list[str]]:
    """On one rank: the exit status, and the clips that this rank made."""
    made: list[str] = []
    make = inference.make

    def counted(batch: Sequence[inference.Job], *rest: Any) -> None:
        made.extend(job.request.prompt for job in batch)
        make(batch, *rest)

    with patch.object(inference, "make", counted):
        return inference.main(line), made


def planned(student: Student, output: Path, *more: str) -> list[inference.Job]:
    """The jobs of a command line, without making them."""
    args = inference.parser().parse_intermixed_args(student.words(output, *more))
    return inference.prepare(args).jobs


def test_one_playable_clip_per_prompt_is_written_under_its_words(student: Student) -> None:
    assert sorted(digests(student.clips)) == [
        "a blue triangle moves left slowly on a light floor-0.mp4",
        "a green bar moves up_down slowly-0.mp4",
        "a red circle moves right quickly on a dark floor-0.mp4",
    ]
    assert len(set(digests(student.clips).values())) == 3
    for path in student.clips.glob("*.mp4"):
        frames = iio.imread(path)
        assert frames.shape == (17, 256, 256, 3)
        assert iio.immeta(path)["fps"] == 16.0
    assert (student.clips / "contact_sheet.png").is_file()


def test_two_processes_write_what_one_writes_byte_for_byte(
    student: Student, tmp_path: Path
) -> None:
    results = run_on_ranks(2, infer, student.words(tmp_path / "two"))
    assert results == [(0, list(PROMPTS[:2])), (0, list(PROMPTS[2:]))]
    assert digests(tmp_path / "two") == digests(student.clips)


def test_a_second_call_makes_nothing(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in student.clips.glob("*.mp4")}
    monkeypatch.setattr(inference, "load_generator", lambda *_, **__: pytest.fail("loaded"))
    assert inference.main(student.words(student.clips)) == 0
    assert {path: path.stat().st_mtime_ns for path in student.clips.glob("*.mp4")} == before


def test_lost_clips_are_made_again_byte_for_byte(student: Student, tmp_path: Path) -> None:
    folder = shutil.copytree(student.clips, tmp_path / "clips")
    paths = sorted(folder.glob("*.mp4"))
    for path in paths[::2]:
        path.unlink()
    assert inference.main(student.words(folder)) == 0
    assert digests(folder) == digests(student.clips)


def test_another_seed_gives_other_clips_and_samples_of_a_prompt_differ(
    student: Student, tmp_path: Path
) -> None:
    line = student.words(tmp_path / "clips", "--seed", "1", "--num_samples", "2")
    assert inference.main(line) == 0
    made = digests(tmp_path / "clips")
    assert len(made) == len(set(made.values())) == 2 * len(PROMPTS)
    assert set(made.values()).isdisjoint(digests(student.clips).values())


def test_fewer_latent_frames_give_shorter_clips(student: Student, tmp_path: Path) -> None:
    line = student.words(tmp_path, "--num_output_frames", "2", "--fps", "8", "--save_with_index")
    assert inference.main(line) == 0
    assert iio.imread(tmp_path / "0-0_regular.mp4").shape == (5, 256, 256, 3)
    assert iio.immeta(tmp_path / "0-0_regular.mp4")["fps"] == 8.0


# ---- which weights


def test_averaged_weights_give_other_clips(student: Student, tmp_path: Path) -> None:
    assert inference.main(student.words(tmp_path, "--use_ema")) == 0
    regular, ema = digests(student.clips), digests(tmp_path)
    assert all(regular[name] != ema[name] for name in regular)


def latents(student: Student, weights: Path, *, use_ema: bool = False) -> Tensor:
    """What inference samples for one request, before decoding rounds it to bytes."""
    cpu = torch.device("cpu")
    config = load(student.config)
    model = load_generator(check_source(config, weights, use_ema=use_ema), cpu)
    return model.latents([Request(PROMPTS[0], seed=0)])


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("kind", ["step", ".safetensors", ".pt", "folder"])
def test_every_kind_of_source_gives_the_samples_of_the_log_directory_bit_for_bit(
    kind: str, use_ema: bool, student: Student, tiny_root: Path, tmp_path: Path
) -> None:
    flags = ("--use_ema",) if use_ema else ()
    if kind == "step":
        made = latents(student, step_folder(student.logdir, 2), use_ema=use_ema)
    elif kind == "folder":
        model = shutil.copytree(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny", tmp_path / "model")
        converted(student, model / "diffusion_pytorch_model.safetensors", "--overwrite", *flags)
        made = latents(student, model)
    else:
        made = latents(student, converted(student, tmp_path / f"file{kind}", *flags))
    assert torch.equal(made, latents(student, student.logdir, use_ema=use_ema))


def converted(student: Student, path: Path, *more: str) -> Path:
    words = ["--input_path", str(student.logdir), "--output_path", str(path), *more]
    assert convert_checkpoint.main(words) == 0
    return path


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_file_in_the_layout_of_self_forcing_holds_both_kinds_of_weights(
    use_ema: bool, student: Student, tmp_path: Path
) -> None:
    state = read_state(step_folder(student.logdir, 2))
    theirs = {
        key: {n.removeprefix(ours): v for n, v in state.items() if n.startswith(ours)}
        for key, ours in (("generator", "roles.generator."), ("generator_ema", "ema.generator."))
    }
    torch.save(theirs, tmp_path / "both.pt")
    made = latents(student, tmp_path / "both.pt", use_ema=use_ema)
    assert torch.equal(made, latents(student, student.logdir, use_ema=use_ema))


# ---- block by block


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Student:
    """A causal student, blocks of 1, 2 and 2 latent frames, as its model folder has it."""
    folder = tmp_path_factory.mktemp("streaming")
    config = write_config(folder, tiny_root, "self_forcing_dmd")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPTS[0]}\n", encoding="utf-8")
    weights = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    made = Student(config, weights, prompts, folder / "clips")
    assert inference.main(made.words(made.clips)) == 0
    return made


def only_clip(folder: Path) -> Tensor:
    """The one clip of a folder, [3, P, H, W] in [0, 1], its pixels as they were made."""
    (path,) = folder.glob("*.mp4")
    return torch.nn.functional.avg_pool2d(inference.read_video(path), 8)


def image_file(folder: Path, size: tuple[int, int] = (32, 32)) -> Path:
    path = folder / "first.png"
    iio.imwrite(path, np.full((*size, 3), (200, 40, 90), dtype=np.uint8))
    return path


def clip_file(folder: Path, frames: int) -> Path:
    path = folder / "first.mp4"
    rng = torch.Generator().manual_seed(0)
    save_mp4(torch.rand(3, 1, 32, 32, generator=rng).expand(-1, frames, -1, -1), path, fps=8.0)
    return path


def test_a_causal_clip_may_be_longer_than_it_was_trained(
    streaming: Student, tmp_path: Path
) -> None:
    line = streaming.words(tmp_path, "--num_output_frames", "9", "causal.local_attn_size=4")
    assert inference.main(line) == 0
    assert only_clip(tmp_path).shape == (3, 33, 32, 32)


def test_a_longer_causal_clip_begins_as_the_shorter_one(streaming: Student, tmp_path: Path) -> None:
    assert inference.main(streaming.words(tmp_path, "--num_output_frames", "9")) == 0
    short, long = only_clip(streaming.clips), only_clip(tmp_path)
    assert float((long[:, :17] - short).abs().mean()) < 0.02  # of compression


def test_a_clip_begins_with_the_image_that_it_was_given(streaming: Student, tmp_path: Path) -> None:
    image = image_file(tmp_path)
    line = streaming.words(tmp_path / "clips", "--initial_path", str(image))
    assert inference.main(line) == 0
    first = only_clip(tmp_path / "clips")[:, 0]
    color = torch.tensor([200.0, 40.0, 90.0]) / 255.0
    assert float((first.mean(dim=(1, 2)) - color).abs().max()) < 0.1
    plain = only_clip(streaming.clips)
    assert float((only_clip(tmp_path / "clips")[:, 1:] - plain[:, 1:]).abs().mean()) > 0.01


def test_a_clip_of_its_own_is_continued(streaming: Student, tmp_path: Path) -> None:
    start = streaming.words(tmp_path / "start", "--num_output_frames", "3")
    assert inference.main(start) == 0
    (path,) = (tmp_path / "start").glob("*.mp4")
    line = streaming.words(tmp_path / "clips", "--initial_path", str(path), "--seed", "1")
    assert inference.main(line) == 0
    given, made = only_clip(tmp_path / "start"), only_clip(tmp_path / "clips")
    assert (given.shape[1], made.shape[1]) == (9, 17)
    assert float((made[:, :9] - given).abs().mean()) < 0.1  # through the codec twice


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            "4",
            "--num_output_frames 4: causal.num_frame_per_block: a block of 2 frames must divide "
            "the 3 latent frames after the first",
        ),
        ("0", "--num_output_frames: must be at least 1, got 0"),
    ],
)
def test_a_length_that_no_blocks_make_is_refused(
    frames: str,
    message: str,
    streaming: Student,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = streaming.words(tmp_path / "clips", "--num_output_frames", frames)
    assert refusal(inference.main, line, capsys) == message
    assert not (tmp_path / "clips").exists()


def test_rollouts_of_training_do_not_limit_the_length_of_clips(
    streaming: Student, tmp_path: Path
) -> None:
    line = streaming.words(tmp_path, "--num_output_frames", "7", "causal.rollout_frames=5")
    assert inference.main(line) == 0
    assert only_clip(tmp_path).shape == (3, 25, 32, 32)


@pytest.mark.usefixtures("no_weights")
def test_a_bidirectional_model_refuses_frames_to_begin_with(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = student.words(tmp_path / "clips", "--initial_path", str(image_file(tmp_path)))
    assert refusal(inference.main, line, capsys) == (
        "--initial_path: this model makes whole clips and cannot begin with given frames; use one "
        "with generator_type: causal"
    )


def test_frames_to_begin_with_of_another_size_are_scaled_and_cropped_and_it_is_said(
    streaming: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.full((96, 64, 4), 255, dtype=np.uint8)
    pixels[16:80, :, 1:3] = 0  # red in the square that is kept, white above and below
    pixels[40:, :, 3] = 0  # transparent: white again
    iio.imwrite(tmp_path / "first.png", pixels)
    line = streaming.words(
        tmp_path / "clips", "--initial_path", str(tmp_path / "first.png"), "--num_output_frames=3"
    )
    assert inference.main(line) == 0
    told = "first.png: 96 x 64 scaled to 48 x 32, cropped to 32 x 32 (height x width)"
    assert capsys.readouterr().err.count(told) == 1
    red, green, blue = only_clip(tmp_path / "clips")[:, 0]
    upper, lower = green[:10].mean(), green[-16:].mean()
    assert float(red.mean()) > 0.8
    assert float(upper) < 0.25 and float(lower) > 0.8, (upper, lower)
    assert float((green - blue).abs().mean()) < 0.1


@pytest.mark.usefixtures("no_weights")
def test_a_video_to_begin_with_that_is_longer_than_a_clip_is_not_read_to_its_end(
    streaming: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_long_video(tmp_path / "first.mp4", minutes=120)
    line = streaming.words(tmp_path / "clips", "--initial_path", str(path))
    began = time.monotonic()
    message = refusal(inference.main, line, capsys)
    assert message == f"--initial_path: {path}: has more than the 17 frames of a clip"
    assert time.monotonic() - began < 5.0


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("frames", [5, 17])
def test_frames_to_begin_with_that_end_within_a_block_or_fill_the_clip_are_refused(
    frames: int, streaming: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clip_file(tmp_path, frames)
    line = streaming.words(tmp_path / "clips", "--initial_path", str(path))
    assert refusal(inference.main, line, capsys) == (
        f"--initial_path: {path}: {1 + frames // 4} given frames of 5 must end where a block ends: "
        "at one of 1, 3"
    )


@pytest.mark.usefixtures("no_weights")
def test_frames_to_begin_with_that_latent_frames_cannot_hold_are_refused(
    streaming: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clip_file(tmp_path, 4)
    line = streaming.words(tmp_path / "clips", "--initial_path", str(path))
    assert refusal(inference.main, line, capsys) == (
        f"--initial_path: {path} has 4 frames; give 1 + 4 k, as latent frames hold them"
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("first.png", None, "no such image"),
        ("first.png", b"not an image", "not readable as an image: its content is none of PNG"),
        ("first.mp4", None, "no such video"),
        ("first.mp4", b"", "an empty file (0 frames could be read)"),
        ("first.mp4", b"not a video", "not readable as a video: "),
    ],
)
def test_frames_to_begin_with_that_cannot_be_read_are_refused(
    name: str,
    content: bytes | None,
    message: str,
    streaming: Student,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    line = streaming.words(tmp_path / "clips", "--initial_path", str(path))
    said = refusal(inference.main, line, capsys)
    assert said.startswith(f"--initial_path: {path}: {message}")


# ---- file names


def test_prompts_that_share_their_first_100_characters_get_files_of_their_own(
    student: Student, tmp_path: Path
) -> None:
    words = "very " * 25
    assert len(words) > 100
    lines = [f"{words} red", f"{words} green", f"{words} blue"]
    path = prompt_file(tmp_path, lines)
    files = [job.file for job in planned(student, tmp_path, "--data_path", str(path))]
    assert len(set(files)) == 3
    assert all(file.name.startswith(words[:99]) for file in files)


def prompt_file(folder: Path, lines: list[str]) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "lines",
    [
        ["a", "a", "a"],
        ["a-2", "a", "a"],
        ["a?", "a*", "a_"],
        ["../up", "/etc/passwd", "..", "."],
        ["\N{CJK UNIFIED IDEOGRAPH-732B}" * 120, "\N{GRINNING FACE}" * 120],
    ],
    ids=["equal", "numbered", "forbidden", "paths", "wide"],
)
def test_any_prompts_get_distinct_files_inside_the_folder_that_can_be_written(
    lines: list[str], student: Student, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    path = prompt_file(tmp_path, lines)
    jobs = planned(student, folder, "--data_path", str(path), "--num_samples", "2")
    files = [job.file for job in jobs]
    assert len(set(files)) == 2 * len(lines)
    for file in files:
        with replaced_atomically(file) as part:
            part.touch()
        assert file.resolve().parent == folder.resolve()


def test_clips_of_wide_prompts_reach_the_contact_sheet(student: Student, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, ["\N{CJK UNIFIED IDEOGRAPH-732B} \N{GRINNING FACE}"])
    line = student.words(tmp_path / "clips", "--data_path", str(path))
    assert inference.main(line) == 0
    assert len(digests(tmp_path / "clips")) == 1
    assert (tmp_path / "clips" / "contact_sheet.png").is_file()


def test_extended_prompts_are_what_is_made_and_short_ones_what_is_named(
    student: Student, tmp_path: Path
) -> None:
    short = prompt_file(tmp_path, ["one", "two", "three"])
    line = student.words(tmp_path / "clips", "--data_path", str(short))
    assert inference.main([*line, "--extended_prompt_path", str(student.prompts)]) == 0
    made, plain = digests(tmp_path / "clips"), digests(student.clips)
    assert sorted(made) == ["one-0.mp4", "three-0.mp4", "two-0.mp4"]
    assert set(made.values()) == set(plain.values())


def test_a_prompt_longer_than_the_encoder_reads_is_cut_with_a_warning(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["red"] * 30)
    path = prompt_file(tmp_path, [long])
    line = student.words(tmp_path / "clips", "--data_path", str(path))
    assert inference.main(line) == 0
    warning = f"prompt of 31 tokens cut to the 12 that this model reads: '{long[:60]}...'"
    assert warning in capsys.readouterr().err
    assert len(digests(tmp_path / "clips")) == 1


# ---- bad input


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num_samples", "-1"), "--num_samples: must be at least 1, got -1"),
        (("--batch_size", "0"), "--batch_size: must be at least 1, got 0"),
        (("--num_output_frames", "0"), "--num_output_frames: must be at least 1, got 0"),
        (("--fps", "0"), "--fps: must be a number from 0.1 to 240, got 0.0"),
        (
            ("--data_path", "nowhere"),
            "nowhere: no such data; give a .txt file with one prompt per line, a folder of .txt "
            "files with one prompt each, or a folder of LMDB shards",
        ),
        (
            ("--checkpoint_path", "nowhere"),
            "nowhere: no weights here; give a model folder, a .safetensors or .pt file, a "
            "training checkpoint (checkpoints/step_N), or the log directory of a run",
        ),
        (("stepps=3",), "command line: unknown key 'stepps' (did you mean 'steps'?)"),
    ],
)
def test_a_bad_argument_gives_one_line_and_no_folder(
    more: tuple[str, ...],
    message: str,
    student: Student,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = student.words(tmp_path / "clips", *more)
    assert refusal(inference.main, line, capsys) == message
    assert not (tmp_path / "clips").exists()


@pytest.mark.usefixtures("no_weights")
def test_an_empty_prompt_file_is_refused(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompt_file(tmp_path, [" "])
    line = student.words(tmp_path / "clips", "--data_path", str(path))
    assert refusal(inference.main, line, capsys) == f"{path}: holds no prompt; write one per line"


@pytest.mark.usefixtures("no_weights")
def test_extended_prompts_of_another_length_are_refused(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompt_file(tmp_path, ["only one"])
    line = student.words(tmp_path / "clips", "--extended_prompt_path", str(path))
    assert refusal(inference.main, line, capsys) == (
        f"--extended_prompt_path: {path} has 1 prompts, {student.prompts} has 3; "
        "they must match line by line"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_folder_with_clips_of_other_settings_is_refused_and_left_alone(
    student: Student, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (student.clips / "settings.json").read_bytes()
    line = student.words(student.clips, "--seed", "3", "--fps", "8")
    assert refusal(inference.main, line, capsys) == (
        f"--output_folder {student.clips}: holds clips of other settings "
        "(seed was 0, is 3; fps was 16.0, is 8.0); use another folder"
    )
    assert (student.clips / "settings.json").read_bytes() == before


def test_a_folder_with_clips_of_another_content_of_the_same_config_file_is_refused(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shutil.copy(student.config, tmp_path / "own.yaml")
    line = student.words(tmp_path / "clips", "--config_path", str(config), "--num_output_frames=1")
    assert inference.main(line) == 0
    config.write_text(f"{config.read_text()}denoising_step_list: [1000]\n", encoding="utf-8")
    assert "holds clips of other settings" in refusal(inference.main, line, capsys)


@pytest.mark.usefixtures("no_weights")
def test_a_file_in_the_place_of_the_output_folder_is_refused(
    student: Student, capsys: pytest.CaptureFixture[str]
) -> None:
    line = student.words(student.prompts)
    assert str(student.prompts) in refusal(inference.main, line, capsys)


@pytest.mark.usefixtures("no_weights")
def test_weights_of_another_architecture_are_refused(
    student: Student, tiny_config: WanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wide.safetensors"
    write_weights(build_wan(replace(tiny_config, ffn_dim=96)).state_dict(), path, {})
    message = refusal(inference.main, student.words(tmp_path / "clips", weights=path), capsys)
    assert "0 weights missing [], 0 unexpected [], 6 of another shape" in message
    assert "blocks.0.ffn.0.weight is (96, 32), expected (64, 32)" in message


@pytest.mark.usefixtures("no_weights")
def test_a_log_directory_without_a_checkpoint_is_refused(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    line = student.words(tmp_path / "clips", weights=tmp_path / "run")
    assert refusal(inference.main, line, capsys) == (
        f"{tmp_path / 'run'}: a log directory without a whole checkpoint"
    )


@pytest.mark.usefixtures("no_weights")
def test_averaged_weights_of_a_file_that_holds_none_are_refused(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = converted(student, tmp_path / "regular.safetensors")
    line = student.words(tmp_path / "clips", "--use_ema", weights=weights)
    assert refusal(inference.main, line, capsys) == (
        f"{weights}: holds no averaged weights beside its own; ask for the regular ones"
    )
