"""inference.py on model folders with a damaged or foreign part: one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import inference
from model.families.wan21.folder import CONFIG, IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER
from tests.folders import VAE, clip_state, make_diffusers, make_official, umt5_state, vae_state

Damage = Callable[[Path], object]

TEXT = """
trainer: score_distillation
generator: {{model: {model}, lr: 1.0e-5}}
data: {{path: unused}}
latent_shape: [16, 3, 4, 6]
denoising_step_list: [1000, 500]
steps: 1
batch_size: 1
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image-to-video release in both layouts, and a pair to make a clip of."""
    root = tmp_path_factory.mktemp("models")
    official = make_official(root / "official", "i2v")
    make_diffusers(root / "diffusers", official)
    (root / "pairs").mkdir()
    iio.imwrite(root / "pairs" / "a.png", np.zeros((32, 48, 3), dtype=np.uint8))
    (root / "pairs" / "a.txt").write_text("a dog runs", encoding="utf-8")
    return {name: root / name for name in ("official", "diffusers", "pairs")}


def torn(name: str) -> Damage:
    """Cut a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def missing(name: str) -> Damage:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


def saved(name: str, state: Callable[[], dict[str, torch.Tensor]]) -> Damage:
    """Put other weights in a part's place."""
    return lambda folder: torch.save(state(), folder / name)


def set_to(name: str, **values: object) -> Damage:
    """Change a config.json."""

    def change(folder: Path) -> None:
        there = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**there, **values}), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("layout", "damage", "part", "message"),
    [
        ("official", torn(VAE), VAE, "not a file of plain tensors"),
        ("official", torn(TEXT_ENCODER), TEXT_ENCODER, "not a file of plain tensors"),
        ("official", torn(IMAGE_ENCODER), IMAGE_ENCODER, "not a file of plain tensors"),
        ("official", torn(f"{TOKENIZER}/tokenizer.json"), TOKENIZER, "not a readable tokenizer"),
        ("official", missing(f"{TOKENIZER}/tokenizer.json"), TOKENIZER, "not a readable tokenizer"),
        ("official", saved(VAE, lambda: vae_state(z_dim=8)), VAE, "of 8 latent channels"),
        ("official", saved(TEXT_ENCODER, lambda: umt5_state(200, 32)), TEXT_ENCODER, "width 32"),
        ("official", saved(TEXT_ENCODER, lambda: umt5_state(5, 64)), TEXT_ENCODER, "of 5 tokens"),
        ("official", saved(IMAGE_ENCODER, lambda: clip_state(80)), IMAGE_ENCODER, "width 80"),
        ("official", saved(IMAGE_ENCODER, lambda: clip_state(160, 10)), IMAGE_ENCODER, "10 states"),
        ("official", set_to(CONFIG, eps="small"), CONFIG, "eps must be a number"),
        ("official", set_to(CONFIG, absolute_positions="no"), CONFIG, "must be true or false"),
        ("diffusers", missing("vae/diffusion_pytorch_model.safetensors"), "vae", "expected one of"),
        ("diffusers", torn("text_encoder/model.safetensors"), "text_encoder", "was it cut off?"),
        ("diffusers", set_to("vae/config.json", base_dim="x"), "vae", "describes no network"),
        ("diffusers", set_to("text_encoder/config.json", d_model="x"), "text_encoder", "'d_model'"),
        ("diffusers", set_to("image_encoder/config.json", hidden_size="x"), "image_encoder", "int"),
    ],
)
def test_a_damaged_or_foreign_part_is_named_in_one_line(
    layout: str, damage: Damage, part: str, message: str, folders: dict[str, Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(folders[layout], model)
    damage(model)
    (tmp_path / "config.yaml").write_text(TEXT.format(model=model), encoding="utf-8")
    status = inference.main(
        [
            "--config_path",
            str(tmp_path / "config.yaml"),
            "--checkpoint_path",
            str(model),
            "--data_path",
            str(folders["pairs"]),
            "--output_folder",
            str(tmp_path / "clips"),
            "--i2v",
        ]
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2
    (line,) = errors
    assert line.startswith(f"error: {model / part}")
    assert message in line
