"""Wan2.2 before it is downloaded: its sizes and parts by name, and what is planned with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.families.base import Model
from model.families.registry import sketch_model
from model.families.tiny_world import TinyExperts, TinyTI2V
from model.families.wan22 import Wan22Experts, Wan22TI2V
from model.folders.loading import Placement
from model.types import LatentSpec
from model.wan.config import PRESETS

PARTS = {"text_encoder": 5_680_910_336, "codec": 126_892_531}  # parameters, as of Wan2.1


def sketched(name: str, folder: Path) -> Model:
    model = sketch_model(name, folder)
    assert model is not None
    return model


@pytest.mark.parametrize("suffix", ["", "-Diffusers"])
@pytest.mark.parametrize(
    ("name", "family", "latent", "codec"),
    [
        ("Wan2.2-TI2V-5B", Wan22TI2V, LatentSpec(48, 4, 16, (2, 2)), 704_688_668),
        ("Wan2.2-T2V-A14B", Wan22Experts, LatentSpec(16, 4, 8, (2, 2)), PARTS["codec"]),
        ("Wan2.2-I2V-A14B", Wan22Experts, LatentSpec(16, 4, 8, (2, 2)), PARTS["codec"]),
    ],
)
def test_a_published_name_is_known_before_anything_is_downloaded(
    name: str, suffix: str, family: type[Model], latent: LatentSpec, codec: int, tmp_path: Path
) -> None:
    model = sketched(f"{name}{suffix}", tmp_path)
    assert isinstance(model, family)
    assert model.latent == latent
    assert model.sizes == PRESETS[name]
    found = {
        part: sum(p.numel() for p in make(torch.bfloat16).parameters())
        for part, make in model.outlines().items()
    }
    assert found == {"text_encoder": PARTS["text_encoder"], "codec": codec}


def test_a_tiny_name_is_known_too(tmp_path: Path) -> None:
    ti2v = sketched("Wan2.2-TI2V-Tiny", tmp_path)
    assert isinstance(ti2v, TinyTI2V)
    assert ti2v.latent == LatentSpec(48, 4, 16, (1, 1))
    codec = ti2v.outlines()["codec"](torch.float32)
    assert {buffer.device.type for buffer in codec.buffers()} == {"meta"}
    pair = sketched("Wan2.2-I2V-A14B-Tiny", tmp_path)
    assert isinstance(pair, TinyExperts)
    assert pair.experts is not None
    assert pair.experts.boundary == 0.9


def test_two_experts_are_shortened_together(tmp_path: Path) -> None:
    pair = sketched("Wan2.2-T2V-A14B-Tiny", tmp_path)
    shorter = pair.shortened(3)
    assert shorter is not None
    assert pair.shortened(4) is None
    network = shorter.random_network(0, Placement(torch.device("cpu")))
    names = list(network.model.state_dict())
    for side in ("high", "low"):
        layers = {name.split(".")[2] for name in names if name.startswith(f"{side}.blocks.")}
        assert layers == {"0"}
    assert pair.features.layers == 4
