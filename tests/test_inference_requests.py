"""inference.py asked for more than prompts: sizes, lengths, guidance; bad words; uneven ranks."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import imageio.v3 as iio
import pytest

import demo
import inference
from tests.commands import main_and_stderr, no_weights, own_logging
from tests.ranks import run_on_ranks
from tests.runs import write_config

__all__ = ["no_weights", "own_logging"]

PROMPTS = ("a red circle moves right", "a green bar moves up")
SEEDS = "must be a whole number from 0 to 9007199254740991, got"
FPS = "--fps: must be a number from 0.1 to 240, got"
SIZE = "--size: must be height and width in pixels, as [480, 832] or 480x832, got"


@dataclass(frozen=True)
class World:
    """A miniature of random weights, and a folder with prompts and all kinds of wrong files."""

    folder: Path
    root: Path
    weights: Path

    def words(self, output: Path, *more: str, method: str = "dmd") -> list[str]:
        return [
            "--config_path", str(self.folder / f"{method}.yaml"),
            "--checkpoint_path", str(self.weights),
            "--data_path", str(self.folder / "prompts.txt"), "--output_folder", str(output), *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    folder = tmp_path_factory.mktemp("requests")
    for method in ("dmd", "diffusion", "self_forcing_dmd"):
        write_config(folder, tiny_root, method)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x", encoding="utf-8")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    (folder / "torn.json").write_text("{", encoding="utf-8")
    return World(folder, tiny_root, tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


# ---- what is asked for is what is made, and told


def test_a_many_step_model_takes_size_length_steps_and_guidance(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        *("--size", "48x32", "--frames", "9", "--steps", "3", "--cfg_scale", "4"),
        *("--negative_prompt", "a green bar", "--seed", "7"),
    )
    assert inference.main(world.words(tmp_path, *flags, method="diffusion")) == 0
    assert "6 network evaluations per clip" in capsys.readouterr().err
    made = read(tmp_path)
    assert made["size"] == [48, 32]
    assert made["frames"] == 9
    assert made["latent_shape"] == [16, 3, 6, 4]
    assert (made["negative_prompt"], made["seed"]) == ("a green bar", 7)
    assert (made["sampling"]["steps"], made["sampling"]["cfg_scale"]) == (3, 4.0)
    assert {(clip["height"], clip["width"]) for clip in made["clips"]} == {(48, 32)}
    for path in tmp_path.glob("*.mp4"):
        assert iio.imread(path).shape == (9, 384, 256, 3)


def test_pixel_frames_and_latent_frames_say_the_same(world: World, tmp_path: Path) -> None:
    for name, flag in (("a", "--frames=9"), ("b", "--num_output_frames=3")):
        assert inference.main(world.words(tmp_path / name, flag)) == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").glob("*.mp4")} == {
        f.name: f.read_bytes() for f in (tmp_path / "b").glob("*.mp4")
    }


def test_the_bar_names_the_stages_within_a_clip(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inference.main(world.words(tmp_path)) == 0
    said = capsys.readouterr().err
    assert "denoise:" in said
    assert "decode:" in said
    assert "clips: 100%" in said


# ---- bad words


def line_of(command: Any, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says about bad words, argparse's own included."""
    capsys.readouterr()
    try:
        status = command.main(words)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), captured
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return str(line.removeprefix("error: "))


BAD: list[tuple[tuple[str, ...], str]] = [
    (("--fps", "inf"), f"{FPS} inf"),
    (("--fps", "nan"), f"{FPS} nan"),
    (("--fps", "1e-9"), f"{FPS} 1e-09"),
    (("--fps", "-1"), f"{FPS} -1.0"),
    (("--fps", "1e9"), f"{FPS} 1000000000.0"),
    (("--fps", "abc"), "argument --fps: invalid float value: 'abc'"),
    (("--fps",), "argument --fps: expected one argument"),
    (("--seed", "abc"), f"--seed: {SEEDS} 'abc'"),
    (("--seed", "-1"), f"--seed: {SEEDS} -1"),
    (("--seed", "1.5"), f"--seed: {SEEDS} '1.5'"),
    (("--seed", "9" * 40), f"--seed: {SEEDS} '999"),
    (("--seed", ""), f"--seed: {SEEDS} ''"),
    (("--num_samples", "0"), "--num_samples: must be at least 1, got 0"),
    (("--num_samples", "x"), "argument --num_samples: invalid int value: 'x'"),
    (("--batch_size", "-3"), "--batch_size: must be at least 1, got -3"),
    (("--num_output_frames", "100000000"), "--num_output_frames: a clip of 399999997 frames of 32"),
    (("--num_output_frames", "2", "--frames", "5"), "--frames: with --num_output_frames there are"),
    (("--frames", "4"), "--frames: must be 1 + 4 k, got 4; the nearest is 5"),
    (("--frames", "100000001"), "--frames: a clip of 100000001 frames of 32 x 32 takes at least "),
    (("--frames", "1e3"), "--frames: must be a whole number from 1 to 1000000000, got '1e3'"),
    (("--size", "32"), f"{SIZE} '32'"),
    (("--size", "0x0"), f"{SIZE} [0, 0]"),
    (("--size", "axb"), f"{SIZE} 'axb'"),
    (("--size", "30x32"), "--size: sides must be multiples of 16 and 16 pixels, got 30x32; the ne"),
    (("--size", "160000x160000"), "--size: a clip of 17 frames of 160000 x 160000 takes at least "),
    (("--steps", "3"), "--steps: this model makes clips in the 4 steps of its training; leave it "),
    (("--cfg_scale", "2"), "--cfg_scale: this model was distilled and makes clips without guidanc"),
    (("--negative_prompt", "x"), "--negative_prompt: this model was distilled and makes clips wit"),
    (("--bogus",), "unrecognized arguments: --bogus"),
    (("bogus",), "command line: 'bogus' is neither a known flag nor key=value"),
    (("latent_shape=[16,99999997,4,4]",), "latent_shape: a clip of 399999985 frames of 32 x 32 ta"),
    (("latent_shape=[16,5,40000,40000]",), "latent_shape: a clip of 17 frames of 320000 x 320000 "),
    (("latent_shape=[8,5,4,4]",), "latent_shape: has 8 channels, "),
    (("latent_shape=[16,5,3,4]",), "latent_shape: 3 x 4 does not divide into patches of 2 x 2"),
    (("generator.model=nothing",), "model 'nothing': no folder "),
    (("model_root=/nowhere",), "model 'Wan2.1-T2V-Tiny': no folder /nowhere/Wan2.1-T2V-Tiny"),
    (("--data_path", "{}/empty"), "{}/empty: holds no prompt"),
    (("--data_path", "{}/torn.json"), "{}/torn.json: not JSON"),
    (("--data_path", "{}/bytes.txt"), "{}/bytes.txt: not UTF-8 at byte 0"),
    (("--data_path", ""), "argument --data_path: must be a path, got an empty word"),
    (("--output_folder", ""), "argument --output_folder: must be a path, got an empty word"),
    (("--checkpoint_path", "{}/empty"), "{}/empty: no weights here"),
    (("--config_path", "{}"), "{}: is a folder, not a config file"),
    (("--config_path", "{}/bytes.txt"), "{}/bytes.txt: not readable as YAML"),
    (("--image_size", "huge"), "argument --image_size: invalid choice: 'huge'"),
    (("--extended_prompt_path", "/nowhere"), "/nowhere: no such file or folder of prompts"),
    (("--initial_path", "/nowhere.png"), "--initial_path: this model makes whole clips"),
    (("--i2v",), "{}/prompts.txt: no image prompts here"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("more", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_words_give_one_line_before_weights_are_read(
    more: tuple[str, ...],
    said: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = [word.replace("{}", str(world.folder)) for word in more]
    line = line_of(inference, world.words(tmp_path / "clips", *here), capsys)
    assert line.startswith(said.replace("{}", str(world.folder)))
    assert not (tmp_path / "clips").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("diffusion", ("--steps", "0"), "--steps: must be a whole number from 1 to 1000, got 0"),
        ("diffusion", ("--cfg_scale", "nan"), "--cfg_scale: must be a number from 0 to 100, got '"),
        ("diffusion", ("--negative_prompt", "x" * 3000), "--negative_prompt: at most 2000 charact"),
        ("diffusion", ("--negative_prompt", "x", "--cfg_scale", "1"),
         "--negative_prompt: has no effect without guidance; set --cfg_scale to another number"),
        ("self_forcing_dmd", ("--frames", "13"),
         "--frames: must be 1 + 4 k in blocks of one, then 2 latent frames, got 13; the nearest"),
        ("self_forcing_dmd", ("--initial_path", "{}"), "--initial_path: {}: no such video"),
    ],
)  # fmt: skip
def test_other_models_have_limits_of_their_own(
    method: str,
    more: tuple[str, ...],
    said: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = [word.replace("{}", str(world.folder)) for word in more]
    line = line_of(inference, world.words(tmp_path / "clips", *here, method=method), capsys)
    assert line.startswith(said.replace("{}", str(world.folder)))


@pytest.mark.usefixtures("no_weights")
def test_all_that_is_wrong_with_a_request_is_told_at_once(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--seed", "x", "--size", "31x32", "--frames", "2", "--steps", "9")
    assert inference.main(world.words(tmp_path / "clips", *flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "--seed", "--size", "--frames", "--steps",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_weights")
def test_more_clips_at_a_time_than_memory_holds_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "many.txt").write_text("a red circle\n" * 4000, encoding="utf-8")
    more = ("--data_path", str(tmp_path / "many.txt"), "--batch_size", "100000000")
    line = world.words(tmp_path / "clips", *more, "latent_shape=[16,21,180,320]")
    said = line_of(inference, line, capsys)
    assert said.startswith("--batch_size: a batch of 4000 clips of 81 frames of 1440 x 2560 takes ")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--fps", "nan"), f"{FPS} nan"),
        (("--fps", "1e-9"), f"{FPS} 1e-09"),
        (("--port", "x"), "argument --port: invalid int value: 'x'"),
        (("--port", "-1"), "--host 127.0.0.1 --port -1: "),
        (("--host", ""), "--host: must be an address; 0.0.0.0 = open to the network"),
        (("--host", "256.1.1.1"), "--host 256.1.1.1 --port 0: "),
        (("--bogus",), "unrecognized arguments: --bogus"),
        (("--checkpoint_path", ""), "argument --checkpoint_path: must be a path, got an empty wor"),
        (("latent_shape=[16,99999997,4,4]",), "latent_shape: a clip of 399999985 frames of 32 x 3"),
        (("latent_shape=[16,5,40000,40000]",), "latent_shape: a clip of 17 frames of 320000 x 320"),
    ],
)
def test_bad_words_to_the_demo_give_one_line(
    more: tuple[str, ...], said: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--config_path", str(world.folder / "dmd.yaml"), "--checkpoint_path", str(world.weights),
        "--port", "0", *more,
    ]  # fmt: skip
    with patch.object(signal, "signal"):
        assert line_of(demo, words, capsys).startswith(said)


# ---- ranks that need unequal time


TIMEOUT_S = 4.0  # how long a barrier waits in these tests
make = inference.make


def infer_unevenly(line: list[str], slow: float, fault: str | None) -> tuple[int, str]:
    """On one rank; rank 1 needs `slow` seconds for each batch more, or fails."""

    def late(*arguments: Any) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(slow)
            if fault is not None:
                raise OSError(28, fault)
        make(*arguments)

    with patch.object(inference, "make", late):
        return main_and_stderr(inference.main, line)


@pytest.mark.slow
def test_a_rank_that_is_done_waits_for_a_slow_one_beyond_the_timeout(
    world: World, tmp_path: Path
) -> None:
    line = world.words(tmp_path / "clips", f"timeout_s={TIMEOUT_S}")
    results = run_on_ranks(2, infer_unevenly, line, 2.0 * TIMEOUT_S, None)
    assert [status for status, _ in results] == [0, 0], results
    assert read(tmp_path / "clips")["complete"] is True
    assert (tmp_path / "clips" / "contact_sheet.png").is_file()


@pytest.mark.slow
def test_a_rank_that_waits_learns_that_another_failed(world: World, tmp_path: Path) -> None:
    line = world.words(tmp_path / "clips", f"timeout_s={TIMEOUT_S}")
    waiting, failing = run_on_ranks(2, infer_unevenly, line, 1.0, "disk full")
    assert (waiting[0], failing[0]) == (2, 2)
    assert "disk full" in failing[1]
    assert read(tmp_path / "clips")["complete"] is False
