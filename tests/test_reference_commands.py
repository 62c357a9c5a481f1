"""Command lines that users of Self-Forcing-style systems know work as they are, at toy size."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import convert_checkpoint
import demo
import inference
import train
from model.families.wan21.weights import find_weights
from scripts import compute_vae_latent, create_lmdb_14b_shards
from tests.conftest import build_wan
from tests.test_documented_commands import serve
from tests.videos import make_video
from utils.data.shards import ShardReader

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train.py": train.main,
    "inference.py": inference.main,
    "convert_checkpoint.py": convert_checkpoint.main,
    "scripts/compute_vae_latent.py": compute_vae_latent.main,
    "scripts/create_lmdb_14b_shards.py": create_lmdb_14b_shards.main,
}
TOY = ("latent_shape=[16,5,4,4]", "mixed_precision=false")
TOY_RUN = (*TOY, "steps=2", "batch_size=2", "log_every=1", "save_every=2")
TOY_DATA = ("--height", "32", "--width", "32", "--num_frames", "17", "--fps", "8")


@pytest.fixture
def folder(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with toy models under the names of the releases, and the user's own files."""
    for name in ("configs", "prompts"):
        (tmp_path / name).symlink_to(ROOT / name)
    models = tiny_root / "wan_models"
    (tmp_path / "wan_models").mkdir()
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B").symlink_to(models / "Wan2.1-T2V-Tiny")
    (tmp_path / "wan_models" / "Wan2.1-T2V-14B").symlink_to(models / "Wan2.1-T2V-Tiny")
    (tmp_path / "wan_models" / "Wan2.1-I2V-14B-480P").symlink_to(models / "Wan2.1-I2V-Tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, *more: str) -> None:
    """Run a documented line with `more` words behind it; torchrun's own words are left out."""
    words = shlex.split(line)
    script = next(word for word in words if word in COMMANDS)
    assert COMMANDS[script]([*words[words.index(script) + 1 :], *more]) == 0


def write_foreign_checkpoint(path: Path, seed: int = 3) -> None:
    """{"generator", "generator_ema", "critic"} with the prefixes of wrappers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = "model._fsdp_wrapped_module."
    groups = {
        group: {f"{prefix}{name}": v for name, v in build_wan(seed=seed + i).state_dict().items()}
        for i, group in enumerate(("generator", "critic", "generator_ema"))
    }
    torch.save(groups, path)


def test_videos_become_shards_in_two_steps(folder: Path) -> None:
    for i, size in enumerate(((64, 48), (48, 64))):
        make_video(folder / "videos" / f"clip_{i}.mp4", size=size, frames=24)
        (folder / "captions").mkdir(exist_ok=True)
        (folder / "captions" / f"clip_{i}.txt").write_text(f"a red bar number {i}")
    run(
        "torchrun --nproc_per_node=8 scripts/compute_vae_latent.py --input_video_folder videos "
        "--output_latent_folder latents --model_name Wan2.1-T2V-14B --prompt_folder captions",
        *TOY_DATA,
    )
    run(
        "python scripts/create_lmdb_14b_shards.py --data_path latents --prompt_path captions "
        "--video_path videos --lmdb_path shards --num_shards 2"
    )
    reader = ShardReader(folder / "shards")
    assert sorted(reader.prompt(i) for i in range(2)) == [
        "a red bar number 0",
        "a red bar number 1",
    ]
    assert [reader.image_shape(i) for i in range(2)] == [(32, 32)] * 2


def test_image_to_video_trains_converts_and_samples(folder: Path, tiny_root: Path) -> None:
    run(
        "torchrun --nnodes=8 --nproc_per_node=8 --rdzv_id=5235 --rdzv_backend=c10d "
        "--rdzv_endpoint $MASTER_ADDR train.py --config_path configs/self_forcing_14b_i2v_dmd.yaml "
        "--logdir logs/self_forcing_14b_i2v_dmd --no_visualize --disable-wandb",
        *TOY_RUN,
        f"data.path={tiny_root}/data/tiny/latents",
    )
    run(
        "python convert_checkpoint.py --input_path logs/self_forcing_14b_i2v_dmd "
        "--output_path checkpoints/i2v.safetensors --use_ema"
    )
    for line in ("checkpoints/i2v.safetensors", "logs/self_forcing_14b_i2v_dmd --use_ema"):
        output = f"videos/{line[:4]}"
        run(
            "python inference.py --config_path configs/self_forcing_14b_i2v_dmd.yaml "
            f"--output_folder {output} --checkpoint_path {line} --data_path prompts/i2v --i2v",
            *TOY,
        )
        pairs = len(list((folder / "prompts" / "i2v").glob("*.txt")))
        assert len(list((folder / output).glob("*.mp4"))) == pairs


def test_a_foreign_checkpoint_samples_text_to_video(folder: Path) -> None:
    write_foreign_checkpoint(folder / "checkpoints" / "self_forcing_dmd.pt")
    (folder / "prompts.txt").write_text("a red bar\na blue circle\n")
    (folder / "prompts_extended.txt").write_text("a red bar moving\na blue circle moving\n")
    run(
        "python inference.py --config_path configs/self_forcing_dmd.yaml "
        "--output_folder videos/self_forcing_dmd --checkpoint_path checkpoints/self_forcing_dmd.pt "
        "--data_path prompts.txt --extended_prompt_path prompts_extended.txt --use_ema "
        "--save_with_index --num_output_frames 6 --seed 1",
        "latent_shape=[16,3,4,4]",
    )
    names = sorted(path.name for path in (folder / "videos" / "self_forcing_dmd").glob("*.mp4"))
    assert names == ["0-0_ema.mp4", "1-0_ema.mp4"]


def test_a_foreign_checkpoint_is_where_training_begins(folder: Path, tiny_root: Path) -> None:
    write_foreign_checkpoint(folder / "checkpoints" / "ode_init.pt")
    run(
        "torchrun --nproc_per_node=8 train.py --config_path configs/self_forcing_dmd.yaml "
        "--logdir logs/self_forcing_dmd --no_visualize --disable-wandb",
        *TOY_RUN,
        "latent_shape=[16,6,4,4]",
        "critic.model=Wan2.1-T2V-1.3B",
        "teacher.model=Wan2.1-T2V-14B",
        "generator.weights=checkpoints/ode_init.pt",
        f"data.path={tiny_root}/data/tiny/prompts.txt",
    )
    assert (folder / "logs" / "self_forcing_dmd" / "checkpoints" / "step_000002").is_dir()


@pytest.mark.parametrize(("flag", "seed"), [("", 3), ("--ema", 5)])
def test_a_foreign_checkpoint_is_converted(folder: Path, flag: str, seed: int) -> None:
    write_foreign_checkpoint(folder / "model.pt")
    run(
        "python convert_checkpoint.py --input-checkpoint model.pt "
        f"--output-checkpoint out/generator.safetensors --to-bf16 {flag}"
    )
    weights = find_weights(folder / "out" / "generator.safetensors")
    name = "blocks.0.self_attn.q.weight"
    expected = build_wan(seed=seed).state_dict()[name].to(torch.bfloat16)
    assert torch.equal(weights.read(name), expected)


def test_the_demo_needs_no_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folder / "checkpoints" / "self_forcing_dmd.pt"
    write_foreign_checkpoint(checkpoint)
    taken: list[Path] = []

    def read(*given: Any, **_: Any) -> None:
        taken.append(given[0].weights.path.resolve())
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_generator", read)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main(["--port", "0", "latent_shape=[16,6,4,4]"]) == 130
    assert taken == [checkpoint.resolve()]


@pytest.mark.slow
def test_the_demo_starts_without_a_word(folder: Path) -> None:
    write_foreign_checkpoint(folder / "checkpoints" / "self_forcing_dmd.pt")
    words = ["python", str(ROOT / "demo.py"), "--port", "5001", "latent_shape=[16,6,4,4]"]
    serve(words, folder)
