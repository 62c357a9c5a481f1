"""scripts/generate_ode_pairs.py: what pairs hold, equal to the byte however they were made."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.flow import shift
from scripts import generate_ode_pairs
from tests.commands import no_weights, own_logging, refusal
from tests.ranks import RankFailedError, run_on_ranks
from tests.runs import rows, run, write_config
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils import claims
from utils.data.dataset import TrajectoryManifest
from utils.data.shards import ShardReader, shard_paths
from utils.records import read_manifest
from utils.seeding import sample_rng

__all__ = ["no_weights", "own_logging"]

CPU = torch.device("cpu")
PROMPTS = ("a red circle moves right slowly", "a green bar moves up slowly", "a blue ring")
PAIRS, STEPS, SHARD_PAIRS = 7, 8, 3  # more pairs than prompts, in three shards, the last one short


class World:
    """A teacher's configuration, weights and prompts, and the command line that they make."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.config = write_config(folder, root, "diffusion")
        self.weights = root / "wan_models" / "Wan2.1-T2V-Tiny"
        self.captions = folder / "captions.txt"
        self.captions.write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")

    def words(self, output: Path, *more: str) -> list[str]:
        return [
            "--config_path", str(self.config), "--checkpoint_path", str(self.weights),
            "--caption_path", str(self.captions), "--output_folder", str(output),
            "--num_pairs", str(PAIRS), "--batch_size", "2", "--steps", str(STEPS), *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    return World(tmp_path_factory.mktemp("teacher"), tiny_root)


def generate(line: list[str]) -> int:
    """The command, with small shards."""
    with patch.object(generate_ode_pairs, "SHARD_PAIRS", SHARD_PAIRS):
        return generate_ode_pairs.main(line)


@pytest.fixture(scope="module")
def pairs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, unbroken."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    assert generate(world.words(folder)) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a folder of pairs, by file."""
    files = [folder / "manifest.json", *(path / "data.mdb" for path in shard_paths(folder))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- what they hold


def test_each_pair_has_its_caption_and_captions_repeat(pairs: Path) -> None:
    reader = ShardReader(pairs)
    assert [reader.prompt(i) for i in range(len(reader))] == [*PROMPTS, *PROMPTS, PROMPTS[0]]


def test_the_first_state_is_the_noise_of_the_pair_and_no_two_pairs_share_it(pairs: Path) -> None:
    reader = ShardReader(pairs)
    first = torch.stack([reader.trajectory(i)[0] for i in range(PAIRS)])
    noise = sample_rng(0, "ode pairs", range(PAIRS), CPU).randn((16, 5, 4, 4))
    assert torch.equal(first, noise.half().float())
    assert len({float(x.sum()) for x in first}) == PAIRS


def test_states_lie_at_the_listed_noise_levels_of_a_guided_euler_path(
    world: World, pairs: Path
) -> None:
    config = load(world.config)
    source = check_source(config, world.weights, use_ema=False)
    model = load_generator(source, CPU)
    text = model.encoder.encode(PROMPTS[:1])
    negative = model.encoder.unconditional(text)
    x = sample_rng(0, "ode pairs", [0], CPU).randn((16, 5, 4, 4))
    grid = [shift(1.0 - i / STEPS, 5.0) for i in range(STEPS + 1)]
    path = {grid[0]: x}
    with torch.no_grad():
        for here, there in itertools.pairwise(grid):
            sigma = torch.full((1, 1), here)
            cond, uncond = (model.network(x, sigma, words).velocity for words in (text, negative))
            x = x + (there - here) * (uncond + config.sampling.cfg_scale * (cond - uncond))
            path[there] = x
    levels = [shift(step / 1000.0, 5.0) for step in (1000, 750, 500, 250, 0)]
    expected = torch.cat([path[level] for level in levels])
    torch.testing.assert_close(ShardReader(pairs).trajectory(0), expected, rtol=2e-3, atol=2e-3)


def test_the_manifest_tells_how_they_were_made(world: World, pairs: Path) -> None:
    manifest = read_manifest(pairs, TrajectoryManifest)
    assert manifest is not None
    assert (manifest.count, manifest.steps, manifest.cfg_scale) == (PAIRS, STEPS, 2.0)
    assert manifest.denoising_step_list == [1000, 750, 500, 250]
    assert (manifest.timestep_shift, manifest.latent_shape) == (5.0, [16, 5, 4, 4])
    assert manifest.weights.startswith(str(world.weights))
    assert manifest.negative_prompt == load(world.config).data.negative_prompt
    assert not manifest.mixed_precision


def test_a_run_learns_from_them(pairs: Path, tiny_root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_root, "ode")
    run(config, tmp_path / "run", f"data.path={pairs}", "steps=1")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


# ---- however they were made


def test_a_second_call_makes_nothing(world: World, pairs: Path) -> None:
    before = content(pairs)
    with patch.object(generate_ode_pairs, "make", lambda *_: pytest.fail("made again")):
        assert generate(world.words(pairs)) == 0
    assert content(pairs) == before


def test_two_processes_make_what_one_makes_byte_for_byte(
    world: World, pairs: Path, tmp_path: Path
) -> None:
    assert run_on_ranks(2, generate, world.words(tmp_path / "two")) == [0, 0]
    assert content(tmp_path / "two") == content(pairs)


TIMEOUT_S = 3.0


def generate_slowly_on_rank_one(line: list[str]) -> tuple[int, int]:
    """The exit status, and how many pairs there were when this rank was done."""
    make = generate_ode_pairs.make

    def slow(*arguments: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            time.sleep(1.5 * TIMEOUT_S)
        return make(*arguments)

    with patch.object(generate_ode_pairs, "make", slow):
        status = generate(line)
    return status, len(ShardReader(Path(line[line.index("--output_folder") + 1])))


@pytest.mark.slow
def test_a_process_that_is_done_waits_for_the_others_beyond_the_timeout(
    world: World, tmp_path: Path
) -> None:
    line = world.words(tmp_path / "pairs", f"timeout_s={TIMEOUT_S}")
    assert run_on_ranks(2, generate_slowly_on_rank_one, line) == [(0, PAIRS)] * 2


def generate_with_rank_zero_killed(line: list[str], seconds: float) -> int:
    """The command; the main rank dies that long after it has begun to write the manifest."""

    def killed(*_: object) -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(claims, "write_text", killed):
        return generate(line)


@pytest.mark.slow
def test_no_process_makes_a_pair_before_the_manifest_is_on_the_disk(
    world: World, pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pairs"
    with pytest.raises(RankFailedError, match="rank 0: died with exit status -9"):
        run_on_ranks(2, generate_with_rank_zero_killed, world.words(folder), 5.0)
    assert shard_paths(folder) == []
    assert generate(world.words(folder)) == 0
    assert content(folder) == content(pairs)


@pytest.mark.usefixtures("no_weights")
def test_pairs_without_a_manifest_are_not_continued(
    world: World, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    (folder / "manifest.json").unlink()
    assert refusal(generate_ode_pairs.main, world.words(folder), capsys) == (
        f"--output_folder {folder}: holds pairs of unknown origin (it has no manifest.json); use "
        "another folder"
    )


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
def test_an_interrupted_call_ends_with_130_and_goes_on_to_the_same_bytes(
    batches: int, world: World, pairs: Path, tmp_path: Path
) -> None:
    make, left = generate_ode_pairs.make, [batches]

    def interrupted(*arguments: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make(*arguments)

    with patch.object(generate_ode_pairs, "make", interrupted):
        assert generate(world.words(tmp_path)) == 130
    assert generate(world.words(tmp_path)) == 0
    assert content(tmp_path) == content(pairs)


def test_a_full_disk_is_told_in_a_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(generate_ode_pairs.ShardWriter, "append", side_effect=full):
        assert generate(world.words(tmp_path)) == 2
    assert "error: no space left on device; make room" in capsys.readouterr().err


def test_another_seed_makes_other_pairs(world: World, pairs: Path, tmp_path: Path) -> None:
    assert generate(world.words(tmp_path, "--seed", "1", "--num_pairs", "1")) == 0
    other = ShardReader(tmp_path).trajectory(0)
    assert not torch.isclose(other, ShardReader(pairs).trajectory(0)).any(dim=-1).all()


# ---- bad input


@pytest.mark.usefixtures("no_weights")
def test_a_folder_of_other_settings_is_refused_and_left_alone(
    world: World, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    line = world.words(folder, "--seed", "1", "timestep_shift=3", "sampling.cfg_scale=4")
    assert refusal(generate_ode_pairs.main, line, capsys) == (
        f"--output_folder {folder}: holds pairs of other settings (timestep_shift was 5.0, is 3.0; "
        "cfg_scale was 2.0, is 4.0; seed was 0, is 1); use another folder"
    )
    assert content(folder) == content(pairs)


@pytest.mark.usefixtures("no_weights")
def test_other_prompts_into_the_same_folder_are_refused(
    world: World, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.txt"
    path.write_text("something else\n", encoding="utf-8")
    line = world.words(pairs, "--caption_path", str(path))
    message = refusal(generate_ode_pairs.main, line, capsys)
    assert message.startswith(f"--output_folder {pairs}: holds pairs of other settings (prompts ")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--steps", "6"),
            "--steps: 6 Euler steps do not pass through [750, 250] of denoising_step_list; choose "
            "a number that times step / 1000 is whole, as 48 for 750, 500, 250",
        ),
        (
            ("denoising_step_list=[1000,333]",),
            "--steps: 8 Euler steps do not pass through [333] of denoising_step_list; choose a "
            "number that times step / 1000 is whole, as 48 for 750, 500, 250",
        ),
        (
            ("generator_type=causal", "causal.num_frame_per_block=5"),
            "generator_type: ODE pairs come from a bidirectional teacher",
        ),
        (("--num_pairs", "0"), "--num_pairs: must be at least 1, got 0"),
        (("--batch_size", "0"), "--batch_size: must be at least 1, got 0"),
        (("--steps", "0"), "--steps: must be at least 1, got 0"),
        (
            ("--checkpoint_path", "nowhere"),
            "nowhere: no weights here; give a model folder, a .safetensors or .pt file, a "
            "training checkpoint (checkpoints/step_N), or the log directory of a run",
        ),
    ],
)
def test_a_bad_argument_gives_one_line_and_no_folder(
    more: tuple[str, ...],
    message: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = world.words(tmp_path / "pairs", *more)
    assert refusal(generate_ode_pairs.main, line, capsys) == message
    assert not (tmp_path / "pairs").exists()


# ---- pairs that begin with images


def image_words(world: World, root: Path, output: Path) -> list[str]:
    """The command line of an image-to-video teacher."""
    words = world.words(output, "generator.model=Wan2.1-I2V-Tiny")
    changed = {
        str(world.weights): str(root / "wan_models" / "Wan2.1-I2V-Tiny"),
        str(world.captions): str(root / "data" / "tiny" / "latents"),
    }
    return [changed.get(word, word) for word in words]


def test_pairs_of_an_image_to_video_teacher_keep_their_images_and_train(
    world: World, tiny_root: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs"
    assert generate(image_words(world, tiny_root, pairs)) == 0
    made, data = ShardReader(pairs), ShardReader(tiny_root / "data" / "tiny" / "latents")
    for i in range(PAIRS):
        assert made.prompt(i) == data.prompt(i)
        assert torch.equal(made.image(i), data.image(i))
    del made, data  # a process may open shards only once
    config = write_config(tmp_path, tiny_root, "ode")
    words = ("generator.model=Wan2.1-I2V-Tiny", f"data.path={pairs}", "steps=2")
    assert len(rows(run(config, tmp_path / "run", *words))) == 2


def test_captions_without_images_are_refused_for_an_image_to_video_teacher(
    world: World, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = image_words(world, tiny_root, tmp_path / "pairs")
    words = [str(world.captions) if word.endswith("tiny/latents") else word for word in words]
    assert refusal(generate_ode_pairs.main, words, capsys) == (
        f"--caption_path: this model begins with images of (32, 32) (height, width), "
        f"{world.captions} holds none; make shards by scripts/create_lmdb_14b_shards.py"
    )
