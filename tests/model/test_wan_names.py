"""Names of weights, official and diffusers': one to one at full size, both ways."""

from __future__ import annotations

import pytest
import torch

from model.wan.config import PRESETS, diffusers_config
from model.wan.transformer import WanTransformer
from model.wan.weights import to_diffusers, to_official

FULL_SIZE = [name for name, config in PRESETS.items() if not config.absolute_positions]


def shapes(preset: str) -> dict[str, torch.Size]:
    """The shape of each weight under its official name."""
    with torch.device("meta"):
        model = WanTransformer(PRESETS[preset])
    return {name: value.shape for name, value in model.state_dict().items()}


def diffusers_shapes(preset: str) -> dict[str, torch.Size]:
    """The shape of each weight in diffusers' own transformer of that size."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(diffusers_config(PRESETS[preset]))
    return {name: value.shape for name, value in model.state_dict().items()}


@pytest.mark.parametrize("preset", FULL_SIZE)
def test_names_correspond_one_to_one_with_equal_shapes(preset: str) -> None:
    ours, theirs = shapes(preset), diffusers_shapes(preset)
    print(f"{preset}: {len(ours)} weights under both names")
    assert len(ours) == len(theirs)
    assert {to_diffusers(name): shape for name, shape in ours.items()} == theirs
    assert {to_official(name): shape for name, shape in theirs.items()} == ours


@pytest.mark.parametrize("preset", FULL_SIZE)
def test_translating_there_and_back_changes_nothing(preset: str) -> None:
    names = set(shapes(preset))
    assert {to_official(to_diffusers(name)) for name in names} == names
    assert {to_official(name) for name in names} == names, "official names stay"
    assert {to_diffusers(to_diffusers(name)) for name in names} == set(diffusers_shapes(preset))


@pytest.mark.parametrize("name", ["", "blocks.", "blocks.0", "blocks.weight", "norm.weight", "x"])
def test_names_of_other_networks_are_left_alone(name: str) -> None:
    assert to_official(name) == to_diffusers(name) == name


def test_the_norm_that_both_number_differently_is_followed() -> None:
    assert to_diffusers("blocks.11.norm3.bias") == "blocks.11.norm2.bias"
    assert to_official("blocks.11.norm2.bias") == "blocks.11.norm3.bias"


def test_positions_of_images_are_among_the_names() -> None:
    assert to_diffusers("img_emb.emb_pos") == "condition_embedder.image_embedder.pos_embed"
