"""Transformers of Wan2.2: equal to diffusers', of the published sizes, name by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.wan.config import PRESETS, WanConfig, diffusers_config
from model.wan.transformer import WanTransformer
from model.wan.weights import to_diffusers, to_official
from tests.conftest import build_wan

_SMALL = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_len=12, text_dim=20
)
SMALL = {
    "TI2V-5B": replace(_SMALL, model_type="ti2v", in_dim=48, out_dim=48),
    "T2V-A14B": _SMALL,
    "I2V-A14B": replace(_SMALL, model_type="i2v", in_dim=36, clip=False),
}
# Per network, as published: parameters and tensors; parameters of a block, and of all else.
PUBLISHED = {
    "Wan2.2-TI2V-5B": (4_999_787_712, 825, 163_656_704, 90_086_592),
    "Wan2.2-T2V-A14B": (14_288_491_584, 1_095, 351_394_304, 232_719_424),
    "Wan2.2-I2V-A14B": (14_288_901_184, 1_095, 351_394_304, 233_129_024),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffusers_twin(model: WanTransformer) -> Any:
    """diffusers' own transformer with the weights of `model`, no more and no fewer."""
    from diffusers import WanTransformer3DModel

    twin = WanTransformer3DModel.from_config(diffusers_config(model.config))
    twin.load_state_dict({to_diffusers(name): v for name, v in model.state_dict().items()})
    return twin.eval()


@torch.no_grad()
def difference(kind: str, timestep: Tensor, theirs: Tensor, *, batch: int) -> float:
    """Between ours at `timestep` [B, T] and diffusers' at `theirs`, [B] or one level per token."""
    config = SMALL[kind]
    model = build_wan(config)
    x = random(batch, config.in_dim, 4, 4, 6)
    text = random(batch, config.text_len, config.text_dim, seed=1)
    expected = diffusers_twin(model)(x, theirs, text, return_dict=False)[0]
    assert expected.std() > 0.3
    found = float((model(x, timestep, text) - expected).abs().max())
    print(f"{kind}, {tuple(theirs.shape)} levels: {found:.1e} from diffusers")
    return found


@pytest.mark.parametrize("kind", SMALL)
def test_one_noise_level_per_sample_gives_what_diffusers_gives(kind: str) -> None:
    timestep = torch.tensor([999.0, 17.25])
    assert difference(kind, timestep[:, None], timestep, batch=2) < 1e-4


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("first", [0.0, 312.5], ids=["a clean first frame", "all noisy"])
def test_noise_levels_per_frame_give_what_diffusers_gives_with_levels_per_token(
    kind: str, first: float
) -> None:
    levels = torch.tensor([[first, 937.5, 937.5, 937.5], [first, 250.0, 125.0, 800.0]])
    per_token = levels.repeat_interleave(2 * 3, dim=1)  # rows and columns of patches
    assert difference(kind, levels, per_token, batch=2) < 1e-4


def shapes(model: Any) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_the_published_tensors_one_to_one_with_diffusers(name: str) -> None:
    from diffusers import WanTransformer3DModel

    parameters, tensors, of_block, of_rest = PUBLISHED[name]
    config = PRESETS[name]
    with torch.device("meta"):
        model = WanTransformer(config)
        theirs = shapes(WanTransformer3DModel.from_config(diffusers_config(config)))
    ours = shapes(model)
    assert len(ours) == len(theirs) == tensors
    assert sum(shape.numel() for shape in ours.values()) == parameters
    assert {sum(p.numel() for p in block.parameters()) for block in model.blocks} == {of_block}
    assert parameters - len(model.blocks) * of_block == of_rest
    assert {to_diffusers(held): shape for held, shape in ours.items()} == theirs
    assert {to_official(held): shape for held, shape in theirs.items()} == ours
    assert not any("img" in held for held in ours)


def test_an_expert_of_text_has_the_tensors_of_wan21_s_largest() -> None:
    assert PRESETS["Wan2.2-T2V-A14B"] == PRESETS["Wan2.1-T2V-14B"]
    with torch.device("meta"):
        ours, theirs = (shapes(WanTransformer(PRESETS[name])) for name in (
            "Wan2.2-I2V-A14B", "Wan2.1-I2V-14B",
        ))  # fmt: skip
    clip = theirs.keys() - ours.keys()
    assert len(clip) == 1_303 - 1_095
    assert all("img" in name for name in clip)
    assert {name: theirs[name] for name in ours} == ours
