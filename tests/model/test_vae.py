"""Wan's autoencoder behind its wrapper: streams, normalisation, official files."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.vae import WanVAEWrapper
from utils.weights import WeightsError

SIZES = {"base_dim": 8, "z_dim": 16, "num_res_blocks": 2}  # the official depth, a twelfth as wide


@pytest.fixture(scope="module")
def vae() -> Any:
    """diffusers' autoencoder with random weights."""
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(**SIZES).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1.0 + 0.1 * torch.randn(p.shape, generator=rng))
            else:
                p.copy_(torch.randn(p.shape, generator=rng) / max(1, p[0].numel()) ** 0.5)
    return made


@pytest.fixture(scope="module")
def wrapper(vae: Any) -> WanVAEWrapper:
    return WanVAEWrapper(vae)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def clip(frames: int) -> Tensor:
    return random(1, 3, frames, 16, 24).clamp(-1.0, 1.0)


def test_clips_become_latents_with_strides_four_and_eight(wrapper: WanVAEWrapper) -> None:
    assert wrapper.encode_to_latent(clip(9)).shape == (1, 16, 3, 2, 3)


def test_latents_become_clips_again(wrapper: WanVAEWrapper) -> None:
    assert wrapper.decode_to_pixel(random(1, 16, 3, 2, 3)).shape == (1, 3, 9, 16, 24)


def test_a_stream_decodes_to_the_same_bits_as_the_whole(wrapper: WanVAEWrapper) -> None:
    latents = random(1, 16, 4, 2, 3)
    decoder = wrapper.stream_decoder()
    pieces = [decoder.decode(piece) for piece in latents.split([1, 2, 1], dim=2)]
    assert [piece.shape[2] for piece in pieces] == [1, 8, 4]
    assert torch.equal(torch.cat(pieces, dim=2), wrapper.decode_to_pixel(latents))


def test_two_streams_do_not_disturb_each_other(wrapper: WanVAEWrapper) -> None:
    latents = random(2, 16, 2, 2, 3)
    decoders = [wrapper.stream_decoder() for _ in range(2)]
    frames = [
        [decoders[i].decode(latents[i : i + 1, :, f : f + 1]) for i in range(2)] for f in range(2)
    ]
    second = torch.cat([frame[1] for frame in frames], dim=2)
    assert torch.equal(second, wrapper.decode_to_pixel(latents[1:]))


@torch.no_grad()
def test_decoding_equals_diffusers(vae: Any, wrapper: WanVAEWrapper) -> None:
    latents = random(1, 16, 3, 2, 3)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    expected = vae.decode(latents * std + mean).sample.clamp(-1.0, 1.0)
    torch.testing.assert_close(wrapper.decode_to_pixel(latents), expected, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_latents_are_the_normalised_mean_of_the_posterior(vae: Any, wrapper: WanVAEWrapper) -> None:
    mean = vae.encode(clip(5)).latent_dist.mean
    for channel in range(16):
        expected = mean[:, channel] - vae.config.latents_mean[channel]
        expected = expected / vae.config.latents_std[channel]
        actual = wrapper.encode_to_latent(clip(5))[:, channel]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_later_frames_do_not_change_earlier_latents(wrapper: WanVAEWrapper) -> None:
    changed = clip(9).clone()
    changed[:, :, 5:] = 0.0
    before, after = wrapper.encode_to_latent(clip(9)), wrapper.encode_to_latent(changed)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], atol=1e-5, rtol=0.0)


def test_pixels_stay_between_minus_one_and_one(wrapper: WanVAEWrapper) -> None:
    pixels = wrapper.decode_to_pixel(20.0 * random(1, 16, 1, 2, 3))
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_a_clip_of_another_length_is_refused(wrapper: WanVAEWrapper, frames: int) -> None:
    with pytest.raises(ValueError) as caught:
        wrapper.encode_to_latent(clip(frames))
    assert str(caught.value) == f"a clip must have 1 + 4 k frames, got {frames}"


def test_the_autoencoder_is_frozen(wrapper: WanVAEWrapper) -> None:
    assert not any(p.requires_grad for p in wrapper.parameters())


def test_a_diffusers_folder_is_loaded(vae: Any, wrapper: WanVAEWrapper, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    loaded = WanVAEWrapper.load(tmp_path / "vae", torch.float32)
    latents = random(1, 16, 2, 2, 3)
    assert torch.equal(loaded.decode_to_pixel(latents), wrapper.decode_to_pixel(latents))


def official_names(names: set[str]) -> dict[str, str]:
    """diffusers' name -> name in Wan2.1_VAE.pth, by diffusers' own translation of that release."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    leaves = [f"{part}.{kind}" for part in ("residual.2", "residual.6", "shortcut", "time_conv",
              "resample.1", "to_qkv", "proj", "head.2") for kind in ("weight", "bias")]  # fmt: skip
    leaves += ["residual.0.gamma", "residual.3.gamma", "norm.gamma", "head.0.gamma"]
    stages = [f"encoder.downsamples.{i}" for i in range(11)]
    stages += [f"decoder.upsamples.{i}" for i in range(15)]
    stages += [f"{half}.middle.{i}" for half in ("encoder", "decoder") for i in range(3)]
    guesses = [f"{stage}.{leaf}" for stage, leaf in itertools.product(stages, leaves)]
    for half in ("encoder.", "decoder."):
        guesses += [f"{half}{leaf}" for leaf in leaves if leaf.startswith("head")]
        guesses += [f"{half}conv1.{kind}" for kind in ("weight", "bias")]
    guesses += [f"conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    translated = {new: old for old in guesses for new in convert_wan_vae_to_diffusers({old: None})}
    assert names <= translated.keys()
    return {name: translated[name] for name in names}


def test_an_official_file_is_loaded(
    vae: Any, wrapper: WanVAEWrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    state = vae.state_dict()
    names = official_names(set(state))
    torch.save({names[name]: v for name, v in state.items()}, tmp_path / "Wan2.1_VAE.pth")
    small = functools.partial(diffusers.AutoencoderKLWan, **SIZES)
    monkeypatch.setattr(diffusers, "AutoencoderKLWan", small)
    loaded = WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.float32)
    latents = random(1, 16, 2, 2, 3)
    assert torch.equal(loaded.decode_to_pixel(latents), wrapper.decode_to_pixel(latents))


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(1)}, {}, torch.zeros(1)])
def test_a_file_of_something_else_is_refused(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    small = functools.partial(diffusers.AutoencoderKLWan, **SIZES)
    monkeypatch.setattr(diffusers, "AutoencoderKLWan", small)
    torch.save(content, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(WeightsError) as caught:
        WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.float32)
    assert str(caught.value).startswith(f"{tmp_path}/Wan2.1_VAE.pth: ")
