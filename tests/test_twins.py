"""An official release and its twin in diffusers' layout make the same videos, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.families.wan21.folder import ModelFolder
from pipeline.request import Pixels, Request
from tests.folders import make_diffusers, make_official
from trainer.config import load
from trainer.serving import check_source, load_generator

REQUESTS = [Request("a red dog runs on the beach", 3), Request("slowly the camera turns", 4)]
CONFIG = """
trainer: score_distillation
generator: {{model: {model}, lr: 1.0e-5}}
data: {{path: unused, negative_prompt: a black night}}
latent_shape: [16, 3, 4, 6]
denoising_step_list: [1000, 500]
steps: 1
batch_size: 1
"""


def made_by(folder: ModelFolder, images: list[Tensor | None], scratch: Path) -> tuple[Tensor, ...]:
    """Latents and clips of REQUESTS; images: [B, 3, H, W], the first and last ones, if any."""
    path = scratch / "config.yaml"
    path.write_text(CONFIG.format(model=folder.path), encoding="utf-8")
    config = load(path)
    source = check_source(config, folder.path, use_ema=False)
    generator = load_generator(source, torch.device("cpu"))
    first, last = ([None if x is None else Pixels(x[i][:, None]) for i in range(2)] for x in images)
    requests = [
        replace(request, first_image=first[i], last_image=last[i])
        for i, request in enumerate(REQUESTS)
    ]
    return generator.latents(requests), generator.clips(requests)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_the_twin_of_a_release_makes_the_same_latents_and_videos(kind: str, tmp_path: Path) -> None:
    official = make_official(tmp_path / "official", kind)
    twin = make_diffusers(tmp_path / "twin", official)
    assert official.config == official.path / "config.json"
    assert twin.config == twin.path / "transformer" / "config.json"
    images = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    keyframes: list[Tensor | None] = {
        "t2v": [None, None],
        "i2v": [images[0], None],
        "flf2v": [images[0], images[1]],
    }[kind]
    latents, clips = made_by(official, keyframes, tmp_path)
    assert latents.std() > 0.3
    assert clips.std() > 0.1
    assert clips.shape == (2, 3, 9, 32, 48)
    for ours, theirs in zip((latents, clips), made_by(twin, keyframes, tmp_path), strict=True):
        assert torch.equal(ours, theirs)
    print(f"{kind}: latents and clips of both layouts differ by 0.0")


def test_another_seed_of_the_release_makes_other_videos(tmp_path: Path) -> None:
    folders = [make_official(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    one, other = (made_by(folder, [None, None], tmp_path)[1] for folder in folders)
    assert (one - other).abs().mean() > 0.05
