"""Wan2.2's autoencoder behind the same wrapper: patches, streams, names, official files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.encoders.vae import WanVAEWrapper, from_patches, meta_vae, open_vae, to_patches
from model.encoders.vae_names import to_diffusers, to_official
from model.encoders.vae_sizes import WAN22
from model.families.wan21.export import VAE
from tests.folders import vae_state
from utils.errors import UserError
from utils.weights import WeightsError, check_fits

BASE_DIM, CHANNELS = 8, 8  # of the official 160 (decoder: 12 of 256) and 48; the depth is official
FILE = "Wan2.2_VAE.pth"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under official names."""
    return vae_state(base_dim=BASE_DIM, z_dim=CHANNELS, published=WAN22)


@pytest.fixture(scope="module")
def vae(state: Mapping[str, Tensor]) -> Any:
    """diffusers' autoencoder, built by itself from the published description."""
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(
        base_dim=BASE_DIM,
        decoder_base_dim=12,
        z_dim=CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_spatial=16,
        latents_mean=WAN22["latents_mean"],
        latents_std=WAN22["latents_std"],
    ).eval()
    made.load_state_dict({to_diffusers(name): value for name, value in state.items()})
    return made


@pytest.fixture(scope="module")
def wrapper(vae: Any) -> WanVAEWrapper:
    return WanVAEWrapper(vae)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def clip(frames: int) -> Tensor:
    return random(1, 3, frames, 32, 48).clamp(-1.0, 1.0)


def test_strides_and_channels_are_those_of_the_weights(wrapper: WanVAEWrapper) -> None:
    assert (wrapper.temporal_stride, wrapper.spatial_stride) == (4, 16)
    assert (wrapper.channels, wrapper.patch) == (CHANNELS, 2)
    small = WanVAEWrapper(meta_vae())
    assert (small.temporal_stride, small.spatial_stride) == (4, 8)
    assert (small.channels, small.patch) == (16, 1)


def test_clips_become_latents_with_strides_four_and_sixteen(wrapper: WanVAEWrapper) -> None:
    assert wrapper.encode_to_latent(clip(9)).shape == (1, CHANNELS, 3, 2, 3)


def test_latents_become_clips_again(wrapper: WanVAEWrapper) -> None:
    assert wrapper.decode_to_pixel(random(1, CHANNELS, 3, 2, 3)).shape == (1, 3, 9, 32, 48)


def test_a_patch_becomes_channels_by_colour_then_column_then_row() -> None:
    pixels = torch.arange(2 * 3 * 5 * 4 * 6.0).view(2, 3, 5, 4, 6)
    patches = to_patches(pixels, 2)
    assert patches.shape == (2, 12, 5, 2, 3)
    for colour in range(3):
        for column in range(2):
            for row in range(2):
                channel = patches[:, 4 * colour + 2 * column + row]
                assert torch.equal(channel, pixels[:, colour, :, row::2, column::2])
    assert torch.equal(from_patches(patches, 2), pixels)


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [1, 2, 2], [4, 1]])
def test_a_stream_decodes_to_the_same_bits_as_the_whole(
    wrapper: WanVAEWrapper, cuts: list[int]
) -> None:
    latents, decoder = random(1, CHANNELS, 5, 2, 3), wrapper.stream_decoder()
    pieces = [decoder.decode(piece) for piece in latents.split(cuts, dim=2)]
    assert sum(piece.shape[2] for piece in pieces) == 17
    assert torch.equal(torch.cat(pieces, dim=2), wrapper.decode_to_pixel(latents))


@pytest.mark.parametrize("cuts", [[1, 16], [5, 12], [9, 4, 4], [1, 4, 4, 4, 4]])
def test_a_stream_encodes_to_the_same_bits_as_the_whole(
    wrapper: WanVAEWrapper, cuts: list[int]
) -> None:
    encoder = wrapper.stream_encoder()
    pieces = [encoder.encode(piece) for piece in clip(17).split(cuts, dim=2)]
    assert [piece.shape[2] for piece in pieces] == [-(-cut // 4) for cut in cuts]
    assert torch.equal(torch.cat(pieces, dim=2), wrapper.encode_to_latent(clip(17)))


def statistics() -> tuple[Tensor, Tensor]:
    """The published mean and standard deviation of the first channels."""
    values = (WAN22["latents_mean"], WAN22["latents_std"])
    mean, std = (torch.tensor(v[:CHANNELS]).view(1, -1, 1, 1, 1) for v in values)
    return mean, std


@torch.no_grad()
def test_decoding_17_frames_equals_diffusers(vae: Any, wrapper: WanVAEWrapper) -> None:
    latents, (mean, std) = random(1, CHANNELS, 5, 2, 3), statistics()
    expected = vae.decode(latents * std + mean).sample
    error = (wrapper.decode_to_pixel(latents) - expected).abs().max()
    print(f"VAE 2.2 decode against diffusers, 17 frames: max abs difference {error:.1e}")
    assert expected.std() > 0.3
    assert error < 1e-5


@torch.no_grad()
def test_encoding_17_frames_equals_the_mode_of_diffusers_posterior(
    vae: Any, wrapper: WanVAEWrapper
) -> None:
    mean, std = statistics()
    expected = (vae.encode(clip(17)).latent_dist.mode() - mean) / std
    error = (wrapper.encode_to_latent(clip(17)) - expected).abs().max()
    print(f"VAE 2.2 encode against diffusers, 17 frames: max abs difference {error:.1e}")
    assert expected.std() > 0.3
    assert error < 1e-5


def test_pixels_are_clamped_after_patches_are_undone(wrapper: WanVAEWrapper) -> None:
    pixels = wrapper.decode_to_pixel(20.0 * random(1, CHANNELS, 2, 2, 3))
    assert pixels.shape == (1, 3, 5, 32, 48)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)


def test_sides_that_are_no_multiples_of_sixteen_are_refused(wrapper: WanVAEWrapper) -> None:
    with pytest.raises(UserError, match="must be multiples of 16, got 32 x 40"):
        wrapper.encode_to_latent(clip(5)[..., :40])


def test_the_published_sizes_have_the_published_counts() -> None:
    vae = meta_vae(WAN22)
    half = [sum(p.numel() for p in part.parameters()) for part in (vae, vae.encoder, vae.decoder)]
    assert half == [704_688_668, 149_627_776, 555_049_228]
    assert len(vae.state_dict()) == 196


def test_each_of_48_channels_has_the_published_mean_and_deviation() -> None:
    mean, std = WAN22["latents_mean"], WAN22["latents_std"]
    assert (len(mean), len(std)) == (48, 48)
    by_place = [sum(i * value for i, value in enumerate(v, start=1)) for v in (mean, std)]
    assert [round(value, 4) for value in (sum(mean), sum(std))] == [-0.5589, 32.536]
    assert [round(value, 4) for value in by_place] == [-7.6248, 790.8891]


def test_the_name_map_is_a_bijection_on_all_names_of_the_release() -> None:
    names = list(meta_vae(WAN22).state_dict())
    official = list(to_official(names).values())
    assert len(set(official)) == 196
    assert [to_diffusers(name) for name in official] == names


def test_the_official_release_calls_its_weights_by_these_names() -> None:
    names = {
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.0.downsamples.1.residual.6.bias": (
            "encoder.down_blocks.0.resnets.1.conv2.bias"
        ),
        "encoder.downsamples.1.downsamples.0.shortcut.weight": (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
        ),
        "encoder.downsamples.2.downsamples.2.time_conv.weight": (
            "encoder.down_blocks.2.downsampler.time_conv.weight"
        ),
        "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
        "encoder.head.0.gamma": "encoder.norm_out.gamma",
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "decoder.conv1.bias": "decoder.conv_in.bias",
        "decoder.middle.2.residual.6.weight": "decoder.mid_block.resnets.1.conv2.weight",
        "decoder.upsamples.0.upsamples.2.residual.3.gamma": (
            "decoder.up_blocks.0.resnets.2.norm2.gamma"
        ),
        "decoder.upsamples.2.upsamples.3.resample.1.weight": (
            "decoder.up_blocks.2.upsampler.resample.1.weight"
        ),
        "decoder.upsamples.3.upsamples.0.shortcut.bias": (
            "decoder.up_blocks.3.resnets.0.conv_shortcut.bias"
        ),
        "decoder.head.2.bias": "decoder.conv_out.bias",
    }
    assert {name: to_diffusers(name) for name in names} == names
    every = to_official(meta_vae(WAN22).state_dict())
    assert {every[name]: name for name in names.values()} == names


def test_the_file_of_the_release_is_recognised_at_full_size(tmp_path: Path) -> None:
    expected, path = meta_vae(WAN22).state_dict(), tmp_path / FILE
    names = to_official(expected)
    torch.save({names[name]: value for name, value in expected.items()}, path)
    vae, weights = open_vae(path)
    check_fits(vae, weights, what="Wan2.2's autoencoder")
    assert {key: vae.config[key] for key in WAN22} == WAN22


def bits(wrapper: WanVAEWrapper) -> tuple[Tensor, Tensor]:
    """What an autoencoder makes of one clip, and of one latent."""
    return wrapper.encode_to_latent(clip(5)), wrapper.decode_to_pixel(random(1, CHANNELS, 2, 2, 3))


def same(left: WanVAEWrapper, right: WanVAEWrapper) -> bool:
    return all(torch.equal(*pair) for pair in zip(bits(left), bits(right), strict=True))


def test_an_official_file_is_loaded(
    state: Mapping[str, Tensor], wrapper: WanVAEWrapper, tmp_path: Path
) -> None:
    torch.save(dict(state), tmp_path / FILE)
    loaded = WanVAEWrapper.load(tmp_path / FILE, torch.float32)
    assert same(loaded, wrapper)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_diffusers_folder_is_loaded(vae: Any, wrapper: WanVAEWrapper, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    assert same(WanVAEWrapper.load(tmp_path / "vae", torch.float32), wrapper)


def test_files_keep_their_bits_on_the_way_to_diffusers_and_back(
    state: Mapping[str, Tensor], wrapper: WanVAEWrapper, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKLWan

    torch.save(dict(state), tmp_path / FILE)
    network, theirs = VAE.read(tmp_path / FILE)
    folder = tmp_path / "vae"
    network.save_config(folder)
    save_file(theirs, folder / "diffusion_pytorch_model.safetensors")
    _, again = VAE.read(folder)
    back = VAE.to_official(again)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    loaded, told = AutoencoderKLWan.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert same(WanVAEWrapper(loaded), wrapper)


def test_an_autoencoder_in_bf16_takes_and_gives_fp32(
    state: Mapping[str, Tensor], wrapper: WanVAEWrapper, tmp_path: Path
) -> None:
    torch.save(dict(state), tmp_path / FILE)
    loaded = WanVAEWrapper.load(tmp_path / FILE, torch.bfloat16)
    for half, whole in zip(bits(loaded), bits(wrapper), strict=True):
        assert half.dtype == torch.float32
        assert (half - whole).abs().mean() < 0.05


def test_missing_weights_are_told_with_the_release_that_they_are_of(
    state: Mapping[str, Tensor], tmp_path: Path
) -> None:
    kept = {k: v for k, v in state.items() if k != "decoder.upsamples.1.upsamples.3.time_conv.bias"}
    torch.save(kept, tmp_path / FILE)
    with pytest.raises(WeightsError) as caught:
        WanVAEWrapper.load(tmp_path / FILE, torch.float32)
    told = str(caught.value)
    assert f"{tmp_path}/{FILE} does not fit Wan2.2's autoencoder: 1 weights missing" in told
    assert "decoder.up_blocks.1.upsampler.time_conv.bias" in told


def test_a_folder_with_the_statistics_of_wan21_is_refused(tmp_path: Path) -> None:
    sizes = {key: value for key, value in WAN22.items() if not key.startswith("latents_")}
    written = {"_class_name": "AutoencoderKLWan", **sizes, "base_dim": 8, "decoder_base_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    save_file({}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError) as caught:
        WanVAEWrapper.load(tmp_path, torch.float32)
    assert str(caught.value) == (
        f"{tmp_path}: config.json gives 16 latents_mean and 16 latents_std for 48 channels; copy "
        f"config.json from the release, which has them all"
    )
