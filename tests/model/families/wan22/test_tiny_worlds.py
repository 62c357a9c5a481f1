"""The tiny worlds of Wan2.2: folders of the script that every part of the project opens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.experts import ExpertPair
from model.families.base import Advice, Experts, Export, ImageSpec
from model.families.registry import open_model
from model.families.tiny_world import TinyExperts, TinyTI2V
from model.folders.loading import Placement
from model.types import Conditioning, LatentSpec
from scripts.make_tiny_world import (
    EXPERT_NAMES,
    NAME,
    TI2V_LATENTS,
    TI2V_NAME,
    fit_codec,
    make_folder,
)
from tests.runs import unequal
from utils.data.shards import ShardReader
from utils.media.video import to_unit
from utils.tiny_world.checker import read_attributes
from utils.tiny_world.codec import FILE_NAME, WAN22, PatchCodec
from utils.tiny_world.world import draw_captions, draw_scenes, render
from utils.weights import WeightsError

CPU = Placement(torch.device("cpu"))


def test_ti2v_has_strides_and_channels_of_its_own(tiny_root: Path) -> None:
    model = open_model(tiny_root / "wan_models" / TI2V_NAME)
    assert type(model) is TinyTI2V
    model.check()
    assert model.latent == LatentSpec(48, 4, 16, (1, 1))
    assert model.latent.tokens((48, 1, 2, 2)) == 4  # as many to a frame as of the other worlds
    assert model.images == ImageSpec(1, how="frame", clip=False, required=False)
    assert model.advice == Advice(5.0, 50, 2.0)
    codec = model.load_codec(torch.device("cpu"), torch.float32)
    assert codec.temporal_stride == 4
    latents = codec.encode_to_latent(torch.zeros(1, 3, 17, 32, 32))
    assert latents.shape == (1, 48, 5, 2, 2)


def test_experts_say_where_they_meet(experts_root: Path) -> None:
    for name, boundary in zip(EXPERT_NAMES, (0.875, 0.9), strict=True):
        model = open_model(experts_root / "wan_models" / name)
        assert type(model) is TinyExperts
        model.check()
        assert model.latent == LatentSpec(16, 4, 8, (2, 2))
        assert model.experts == Experts(boundary)
        assert model.advice == Advice(5.0, 50, 2.0, 2.0, boundary)
        assert model.images == (ImageSpec(1, clip=False) if "I2V" in name else None)
        alone = model.only("low")
        assert alone.latent == model.latent
        assert alone.load_codec(torch.device("cpu"), torch.float32).temporal_stride == 4


@torch.no_grad()
def test_a_pair_is_loaded_as_one_denoiser_that_chooses_by_noise_level(experts_root: Path) -> None:
    model = open_model(experts_root / "wan_models" / EXPERT_NAMES[0])
    weights = model.find_weights()
    network = model.load_network(weights, CPU, what="a test")
    assert isinstance(network, ExpertPair)
    assert network.boundary == 0.875
    stored = {name: weights.read(name) for name in weights.shapes()}
    assert unequal(dict(network.model.state_dict()), stored) == []
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text = Conditioning(torch.zeros(1, model.text.length, model.text.width))
    for sigma, side in ((0.875, "high"), (0.874, "low")):
        level = torch.tensor([[sigma]])
        alone = model.only(side)  # type: ignore[arg-type]
        expert = alone.load_network(alone.find_weights(), CPU, what="a test")
        assert torch.equal(network(x, level, text).x0, expert(x, level, text).x0)


def test_fresh_experts_are_two_different_networks_and_the_same_for_a_seed(
    experts_root: Path,
) -> None:
    model = open_model(experts_root / "wan_models" / EXPERT_NAMES[1])
    states = [dict(model.random_network(seed, CPU).model.state_dict()) for seed in (0, 0, 1)]
    assert unequal(states[0], states[1]) == []
    name = "blocks.0.ffn.0.weight"
    assert not torch.equal(states[0][f"high.{name}"], states[0][f"low.{name}"])
    assert not torch.equal(states[0][f"high.{name}"], states[2][f"high.{name}"])


def test_weights_of_a_pair_that_do_not_fit_name_the_expert(
    experts_root: Path, tiny_root: Path
) -> None:
    text, image = (open_model(experts_root / "wan_models" / name) for name in EXPERT_NAMES)
    with pytest.raises(WeightsError, match="does not fit a test, high: 0 weights missing"):
        text.check_weights(image.find_weights(), what="a test")
    assert image.architecture != text.architecture
    assert text.architecture != open_model(tiny_root / "wan_models" / NAME).architecture


def test_a_tiny_pair_is_copied_in_its_layout(experts_root: Path, tmp_path: Path) -> None:
    source = open_model(experts_root / "wan_models" / EXPERT_NAMES[1])
    export = Export(source.find_weights(), "official", boundary=0.7)
    source.export(export, tmp_path / "copy")
    copy = open_model(tmp_path / "copy")
    assert type(copy) is TinyExperts
    assert copy.experts == Experts(0.7)
    ours, theirs = copy.find_weights(), source.find_weights()
    assert all(torch.equal(ours.read(n), theirs.read(n)) for n in theirs.shapes())
    with pytest.raises(ValueError, match="diffusers has no transformer with absolute positions"):
        source.export(replace(export, layout="diffusers"), tmp_path / "other")


def test_the_clips_are_those_of_the_other_world_as_other_latents(tiny_root: Path) -> None:
    wide = ShardReader(tiny_root / "data" / "tiny" / TI2V_LATENTS)
    narrow = ShardReader(tiny_root / "data" / "tiny" / "latents")
    assert len(wide) == len(narrow) == 64
    assert wide.latents(5).shape == (48, 5, 2, 2)
    for i in (0, 63):
        assert wide.prompt(i) == narrow.prompt(i)
        assert torch.equal(wide.image(i), narrow.image(i))


@pytest.mark.slow
def test_the_wide_codec_keeps_all_that_the_judge_reads() -> None:
    codec = fit_codec(WAN22)
    chosen = draw_captions(96, torch.Generator().manual_seed(5))
    clips = 2.0 * render(draw_scenes(chosen, torch.Generator().manual_seed(7))) - 1.0
    latents = codec.encode_to_latent(clips)
    reading = read_attributes(to_unit(codec.decode_to_pixel(latents)))
    assert reading.matches(chosen).all()
    assert reading.valid().all()
    assert reading.psnr.min() > 24.0
    assert (latents.std(dim=(0, 2, 3, 4)) - 1.0).abs().max() < 0.1


def test_a_finished_folder_is_left_as_it_is_and_a_known_codec_is_taken(
    tiny_root: Path, tmp_path: Path
) -> None:
    path = tiny_root / "wan_models" / TI2V_NAME / FILE_NAME
    codec = PatchCodec.load(path)
    made = [make_folder(tmp_path / TI2V_NAME, TI2V_NAME, codec=codec) for _ in range(2)]
    written = (tmp_path / TI2V_NAME / FILE_NAME).read_bytes()
    make_folder(tmp_path / TI2V_NAME, TI2V_NAME)  # it is there, and stays
    assert (tmp_path / TI2V_NAME / FILE_NAME).read_bytes() == written
    assert all(unequal(dict(m.state_dict()), dict(codec.state_dict())) == [] for m in made)
    lacking = open_model(tmp_path / TI2V_NAME).missing()
    assert len(lacking) == 1
    assert lacking[0].startswith("diffusion_pytorch_model")
