"""Trainings with absurd settings on the tiny world: the right alarm, and none where all is well.

The teacher is a miniature that is trained here. A run has 72 steps and a probe every 9.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import convert_checkpoint
from scripts.make_tiny_world import NAME
from tests.runs import run, write_config
from utils.health.log import read_health

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEACHER = (
    "steps=500", "batch_size=16", "generator.random_init=true", "generator.lr=3.0e-3",
    "generator.muon_lr=0.03", "generator.betas=[0.9,0.99]", "generator.warmup_updates=20",
    "generator.schedule=cosine", "loss.caption_dropout=0.1", "ema.decay=0.98", "ema.start_step=0",
    "log_every=50",
)  # fmt: skip
STUDENT = (
    "steps=72", "batch_size=8", "health.every=9", "health.count=6", "log_every=9",
    "generator.lr=5.0e-4", "generator.muon_lr=0.01", "generator.betas=[0.0,0.999]",
    "critic.lr=1.0e-3", "critic.muon_lr=0.02", "critic.betas=[0.0,0.999]",
    "generator.max_grad_norm=10", "critic.max_grad_norm=10", "generator.warmup_updates=0",
    "critic.warmup_updates=0", "generator.schedule=constant", "critic.schedule=constant",
    "loss.cfg_scale=2.0", "loss.generator_every=3", "ema.decay=0.8", "ema.start_step=0",
    "sampling.steps=20", "sampling.cfg_scale=2.0", "sampling.solver=euler", "seed=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """A copy of the tiny world whose teacher has learnt something."""
    base = tmp_path_factory.mktemp("sick")
    shutil.copytree(tiny_root, base / "world")
    config = write_config(base, base / "world", "diffusion")
    run(config, base / "teacher", *TEACHER)
    weights = base / "world" / "wan_models" / NAME / "diffusion_pytorch_model.safetensors"
    words = ["--input_path", str(base / "teacher"), "--output_path", str(weights), "--use_ema"]
    assert convert_checkpoint.main([*words, "--overwrite"]) == 0
    return base / "world"


def train(world: Path, folder: Path, *words: str) -> list[dict[str, Any]]:
    """The probes of a student's run."""
    config = write_config(folder, world, "dmd")
    return read_health(run(config, folder / "run", *STUDENT, *words) / "health.jsonl")


def risen(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The number of the probe at which each alarm rose first, from 1."""
    found: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        for name in row["rose"]:
            found.setdefault(name, number)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_raises_no_alarm(seed: int, world: Path, tmp_path: Path) -> None:
    rows = train(world, tmp_path, f"seed={seed}")
    assert len(rows) == 8
    assert risen(rows) == {}


@pytest.mark.parametrize(
    ("name", "words", "within"),
    [
        # A frozen role is told from one that moves at the second probe, and believed at the third.
        ("critic_lags", ("critic.lr=1e-12", "critic.muon_lr=1e-12"), 3),
        ("generator_stalls", ("generator.lr=1e-12", "generator.muon_lr=1e-12"), 3),
        (
            "critic_diverges",
            ("critic.lr=0.5", "critic.muon_lr=5.0", "critic.max_grad_norm=1e9"),
            2,
        ),
        (
            "saturation",
            ("loss.cfg_scale=40.0", "generator.lr=2.0e-3", "generator.muon_lr=0.04"),
            8,
        ),
        ("collapse", ("loss.cfg_scale=-20.0",), 8),
    ],
)
def test_absurd_settings_raise_their_alarm(
    name: str, words: tuple[str, ...], within: int, world: Path, tmp_path: Path
) -> None:
    found = risen(train(world, tmp_path, *words))
    assert name in found, found
    assert found[name] <= within
