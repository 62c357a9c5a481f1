"""The Wan2.1 transformer: parity with diffusers, and whole videos at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.types import Conditioning
from model.wan.config import PRESETS, WanConfig, diffusers_config
from model.wan.transformer import WanTransformer, initial_value
from model.wan.weights import to_diffusers
from model.wan_wrapper import WanDiffusionWrapper
from utils.recompute import recompute_blocks

WanFactory = Callable[..., WanTransformer]

T2V = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_len=12, text_dim=20
)
I2V = replace(T2V, model_type="i2v", in_dim=36, text_len=512, image_dim=24)
FLF2V = replace(I2V, model_type="flf2v", image_tokens=7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffusers_twin(model: WanTransformer) -> Any:
    """diffusers' own transformer with the weights of `model`."""
    from diffusers import WanTransformer3DModel

    values = diffusers_config(model.config)
    twin = WanTransformer3DModel.from_config(values)
    twin.load_state_dict({to_diffusers(name): v for name, v in model.state_dict().items()})
    return twin.eval()


@torch.no_grad()
def largest_difference(model: WanTransformer, x: Tensor, timestep: Tensor) -> float:
    """Between `model` and diffusers' transformer, on noise levels [B] and random conditions."""
    config, batch = model.config, len(x)
    assert all(weight.abs().max() > 0.0 for weight in model.parameters())
    text = random(batch, config.text_len, config.text_dim, seed=1)
    clip, theirs = None, None
    if config.reads_clip:
        # Tokens much alike, or attention would average the images away.
        alike = 3.0 * random(batch, 1, config.image_dim, seed=2)
        clip = alike + random(batch, config.image_count * config.image_tokens, config.image_dim)
        # diffusers wants the images of a sample one behind the other in the batch.
        theirs = clip.reshape(-1, config.image_tokens, config.image_dim)
    expected = diffusers_twin(model)(x, timestep, text, theirs, return_dict=False)[0]
    return float((model(x, timestep[:, None], text, clip) - expected).abs().max())


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 4, 6), (2, 8, 2)])
def test_text_to_video_equals_diffusers(tiny_wan: WanFactory, size: tuple[int, int, int]) -> None:
    x, timestep = random(2, 16, *size), torch.tensor([999.0, 17.25])
    difference = largest_difference(tiny_wan(T2V), x, timestep)
    print(f"t2v {size}: {difference:.1e} from diffusers")
    assert difference < 2e-5


@pytest.mark.parametrize("config", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_image_to_video_equals_diffusers(tiny_wan: WanFactory, config: WanConfig) -> None:
    x, timestep = random(2, 36, 3, 4, 6), torch.tensor([500.0, 833.3])
    difference = largest_difference(tiny_wan(config), x, timestep)
    print(f"{config.model_type}: {difference:.1e} from diffusers")
    assert difference < 2e-5


def test_names_are_those_of_the_official_release(tiny_wan: WanFactory) -> None:
    names = {name.replace("blocks.1.", "blocks.0.") for name in tiny_wan(I2V).state_dict()}
    linear = [
        *(f"{part}.{i}" for part in ("text_embedding", "time_embedding") for i in (0, 2)),
        *("time_projection.1", "head.head", "patch_embedding", "blocks.0.norm3"),
        *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4)),
        *(f"blocks.0.{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"),
        *(f"blocks.0.cross_attn.{x}_img" for x in "kv"),
        *(f"blocks.0.ffn.{i}" for i in (0, 2)),
    ]
    norms = [f"blocks.0.{kind}_attn.norm_{x}" for kind in ("self", "cross") for x in "qk"]
    assert names == {
        *(f"{name}.{kind}" for name in linear for kind in ("weight", "bias")),
        *(f"{name}.weight" for name in (*norms, "blocks.0.cross_attn.norm_k_img")),
        *("blocks.0.modulation", "head.modulation"),
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Wan2.1-T2V-1.3B", 1_418_996_800),
        ("Wan2.1-T2V-14B", 14_288_491_584),
        ("Wan2.1-I2V-14B", 16_394_878_784),
        ("Wan2.1-FLF2V-14B", 16_394_878_784 + 2 * 257 * 1280),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = WanTransformer(PRESETS[name])
    found = sum(p.numel() for p in model.parameters())
    print(f"{name}: {found:,} parameters")
    assert found == count


@torch.no_grad()
def run(model: WanTransformer, x: Tensor, timestep: Tensor) -> Tensor:
    return model(x, timestep, random(len(x), model.config.text_len, model.config.text_dim, seed=1))


def test_one_noise_level_per_frame_equals_one_per_sample_if_all_are_the_same(
    tiny_wan: WanFactory,
) -> None:
    model, x = tiny_wan(), random(2, 16, 3, 4, 4)
    timestep = torch.tensor([[700.0], [20.0]])
    per_frame = run(model, x, timestep.expand(2, 3))
    torch.testing.assert_close(run(model, x, timestep), per_frame, atol=5e-6, rtol=0.0)


def test_a_frames_noise_level_matters_to_it_most(tiny_wan: WanFactory) -> None:
    model, x = tiny_wan(), random(1, 16, 3, 4, 4)
    low = run(model, x, torch.tensor([[500.0, 500.0, 500.0]]))
    high = run(model, x, torch.tensor([[500.0, 900.0, 500.0]]))
    change = (high - low).abs().mean(dim=(0, 1, 3, 4))
    assert change[1] > 3.0 * change[0]
    assert change[1] > 3.0 * change[2]


def gradients(model: WanTransformer) -> dict[str, Tensor]:
    model.zero_grad()
    model(
        random(2, 16, 2, 4, 4), torch.full((2, 1), 300.0), random(2, 12, 64)
    ).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputing_blocks_gives_the_same_gradients_bit_for_bit(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    kept = gradients(model)
    recompute_blocks(model.blocks)
    recomputed = gradients(model)
    assert kept.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_a_sample_does_not_depend_on_its_batch(tiny_wan: WanFactory) -> None:
    model, x, timestep = tiny_wan(), random(3, 16, 2, 4, 4), torch.tensor([[1.0], [500.0], [999.0]])
    text = random(3, 12, 64, seed=1)
    with torch.no_grad():
        together = model(x, timestep, text)[1]
        alone = model(x[1:2], timestep[1:2], text[1:2])[0]
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0.0)


@pytest.mark.parametrize("size", [(1, 2, 2), (1, 30, 52), (9, 2, 8)])
def test_any_even_size_keeps_its_shape(tiny_wan: WanFactory, size: tuple[int, int, int]) -> None:
    output = run(tiny_wan(), random(1, 16, *size), torch.ones(1, 1))
    assert output.shape == (1, 16, *size)
    assert output.isfinite().all()


@pytest.mark.parametrize("size", [(2, 3, 4), (2, 4, 5)])
def test_an_odd_size_is_refused(tiny_wan: WanFactory, size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError) as caught:
        run(tiny_wan(), random(1, 16, *size), torch.ones(1, 1))
    _, height, width = size
    assert str(caught.value) == (f"latents of {height} x {width} do not divide into 2 x 2 patches")


def test_an_image_model_without_its_image_is_refused(tiny_wan: WanFactory) -> None:
    with pytest.raises(ValueError, match="needs the first frame's CLIP states"):
        run(tiny_wan(I2V), random(1, 36, 1, 2, 2), torch.ones(1, 1))


@torch.no_grad()
def test_the_order_of_first_and_last_frame_matters(tiny_wan: WanFactory) -> None:
    model, x = tiny_wan(FLF2V), random(1, 36, 2, 2, 2)
    text, first, last = random(1, 512, 20), random(1, 7, 24, seed=1), random(1, 7, 24, seed=2)
    timestep = torch.ones(1, 1)
    forth = model(x, timestep, text, torch.cat([first, last], dim=1))
    back = model(x, timestep, text, torch.cat([last, first], dim=1))
    assert (forth - back).abs().max() > 1e-3


@torch.no_grad()
def test_image_tokens_are_what_the_text_leaves(tiny_wan: WanFactory) -> None:
    model = tiny_wan(replace(I2V, text_len=5, image_tokens=3))
    pairs = model.blocks[0].cross_attn.keys_and_values(random(2, 8, 48))
    assert [pair.shape[1] for pair in pairs] == [5, 5, 3, 3]


@pytest.mark.parametrize(
    ("rows", "clip", "problem"),
    [
        (512, (1, 7, 24), r"first and last frame's CLIP states \[B, 14, 24\], got \[1, 7, 24\]"),
        (512, (1, 14, 23), r"CLIP states \[B, 14, 24\], got \[1, 14, 23\]"),
        (511, (1, 14, 24), "an flf2v model needs text padded to 512 rows, got 511"),
    ],
)
def test_image_and_text_states_of_other_sizes_are_refused(
    tiny_wan: WanFactory, rows: int, clip: tuple[int, int, int], problem: str
) -> None:
    x, text = random(1, 36, 1, 2, 2), random(1, rows, 20)
    with pytest.raises(ValueError, match=problem):
        tiny_wan(FLF2V)(x, torch.ones(1, 1), text, random(*clip))


def test_image_positions_start_at_zero() -> None:
    start = initial_value("img_emb.emb_pos", torch.Size([1, 14, 24]), torch.Generator())
    assert torch.equal(start, torch.zeros(1, 14, 24))


def test_the_wrapper_predicts_x0_and_velocity_that_agree(tiny_wan: WanFactory) -> None:
    wrapper, x = WanDiffusionWrapper(tiny_wan()), random(2, 16, 2, 4, 4)
    sigma = torch.tensor([[0.25], [0.75]])
    with torch.no_grad():
        prediction = wrapper(x, sigma, Conditioning(random(2, 12, 64)))
    expected = x - sigma[:, :, None, None, None] * prediction.velocity
    torch.testing.assert_close(prediction.x0, expected)


def test_the_wrapper_feeds_a_thousand_times_the_noise_level(tiny_wan: WanFactory) -> None:
    model, x = tiny_wan(), random(2, 16, 2, 4, 4)
    text = random(2, 12, 64, seed=1)
    with torch.no_grad():
        velocity = WanDiffusionWrapper(model)(
            x, torch.tensor([[0.25], [0.75]]), Conditioning(text)
        ).velocity
        assert torch.equal(velocity, model(x, torch.tensor([[250.0], [750.0]]), text))


def test_the_wrapper_puts_the_first_frame_behind_the_latents(tiny_wan: WanFactory) -> None:
    model, x, first = tiny_wan(I2V), random(1, 16, 2, 2, 2), random(1, 20, 2, 2, 2, seed=1)
    text, clip = random(1, 512, 20, seed=2), random(1, 257, 24, seed=3)
    with torch.no_grad():
        velocity = WanDiffusionWrapper(model)(
            x, torch.tensor([[0.5]]), Conditioning(text, clip, first)
        ).velocity
        direct = model(torch.cat([x, first], dim=1), torch.tensor([[500.0]]), text, clip)
    assert torch.equal(velocity, direct)


def test_half_precision_weights_give_single_precision_predictions(tiny_wan: WanFactory) -> None:
    model, x = tiny_wan(), random(1, 16, 2, 4, 4)
    text, sigma = Conditioning(random(1, 12, 64)), torch.tensor([[0.5]])
    with torch.no_grad():
        exact = WanDiffusionWrapper(model)(x, sigma, text).velocity
        rough = WanDiffusionWrapper(model.bfloat16())(x, sigma, text).velocity
    assert rough.dtype == torch.float32
    assert 0.0 < (rough - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("sigma", [torch.ones(2), torch.ones(2, 5), torch.ones(2, 1, 1)])
def test_the_wrapper_refuses_noise_levels_of_another_shape(
    tiny_wan: WanFactory, sigma: Tensor
) -> None:
    wrapper = WanDiffusionWrapper(tiny_wan())
    with pytest.raises(ValueError, match=r"expected latents \[B, C, F, H, W\] and sigma \[B, 1\]"):
        wrapper(random(2, 16, 3, 4, 4), sigma, Conditioning(random(2, 12, 64)))
