"""Wan's autoencoder behind its wrapper: streams, normalisation, official files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.encoders.vae import WanVAEWrapper, open_vae
from model.encoders.vae_names import to_diffusers, to_official
from tests.folders import vae_state
from utils.weights import WeightsError, check_fits

BASE_DIM = 8  # of the official 96; the depth is the official one


@pytest.fixture(scope="module")
def vae() -> Any:
    """diffusers' autoencoder with random weights."""
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(base_dim=BASE_DIM).eval()
    made.load_state_dict({to_diffusers(k): v for k, v in vae_state(base_dim=BASE_DIM).items()})
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


@pytest.mark.parametrize("cuts", [[1, 16], [5, 12], [9, 4, 4], [1, 4, 4, 4, 4]])
def test_a_stream_encodes_to_the_same_bits_as_the_whole(
    wrapper: WanVAEWrapper, cuts: list[int]
) -> None:
    encoder = wrapper.stream_encoder()
    pieces = [encoder.encode(piece) for piece in clip(17).split(cuts, dim=2)]
    assert [piece.shape[2] for piece in pieces] == [-(-cut // 4) for cut in cuts]
    assert torch.equal(torch.cat(pieces, dim=2), wrapper.encode_to_latent(clip(17)))


def test_two_encoders_do_not_disturb_each_other(wrapper: WanVAEWrapper) -> None:
    clips = [clip(9), -clip(9)]
    encoders = [wrapper.stream_encoder() for _ in clips]
    pieces = [
        [encoder.encode(part) for encoder, part in zip(encoders, parts, strict=True)]
        for parts in zip(*(pixels.split([5, 4], dim=2) for pixels in clips), strict=True)
    ]
    second = torch.cat([piece[1] for piece in pieces], dim=2)
    assert torch.equal(second, wrapper.encode_to_latent(clips[1]))


def test_the_encoder_never_sees_more_than_four_frames(
    vae: Any, wrapper: WanVAEWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward = [], vae.encoder.forward

    def counted(x: Tensor, **caches: Any) -> Tensor:
        seen.append(x.shape[2])
        return forward(x, **caches)

    monkeypatch.setattr(vae.encoder, "forward", counted)
    wrapper.encode_to_latent(clip(13))
    assert seen == [1, 4, 4, 4]


def normalised(vae: Any) -> tuple[Tensor, Tensor]:
    """Wan's mean and standard deviation of the latent channels."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in values)
    return mean, std


@torch.no_grad()
def test_decoding_17_frames_equals_diffusers(vae: Any, wrapper: WanVAEWrapper) -> None:
    latents = random(1, 16, 5, 2, 3)
    mean, std = normalised(vae)
    expected = vae.decode(latents * std + mean).sample.clamp(-1.0, 1.0)
    error = (wrapper.decode_to_pixel(latents) - expected).abs().max()
    print(f"VAE decode against diffusers, 17 frames: max abs difference {error:.1e}")
    assert expected.std() > 0.3
    assert error < 1e-5


@torch.no_grad()
def test_encoding_17_frames_equals_the_mean_of_diffusers_posterior(
    vae: Any, wrapper: WanVAEWrapper
) -> None:
    mean, std = normalised(vae)
    expected = (vae.encode(clip(17)).latent_dist.mean - mean) / std
    error = (wrapper.encode_to_latent(clip(17)) - expected).abs().max()
    print(f"VAE encode against diffusers, 17 frames: max abs difference {error:.1e}")
    assert expected.std() > 0.3
    assert error < 1e-5


def test_later_frames_do_not_change_earlier_latents(wrapper: WanVAEWrapper) -> None:
    changed = clip(9).clone()
    changed[:, :, 5:] = 0.0
    before, after = wrapper.encode_to_latent(clip(9)), wrapper.encode_to_latent(changed)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], atol=1e-5, rtol=0.0)


def test_pixels_stay_between_minus_one_and_one(wrapper: WanVAEWrapper) -> None:
    pixels = wrapper.decode_to_pixel(20.0 * random(1, 16, 2, 2, 3))
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_a_clip_of_another_length_is_refused(wrapper: WanVAEWrapper, frames: int) -> None:
    with pytest.raises(ValueError) as caught:
        wrapper.encode_to_latent(clip(frames))
    assert str(caught.value) == f"a clip must have 1 + 4 k frames, got {frames}"


def test_the_autoencoder_is_frozen(wrapper: WanVAEWrapper) -> None:
    assert not any(p.requires_grad for p in wrapper.parameters())


def test_the_name_map_is_a_bijection_that_agrees_with_diffusers(vae: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = list(vae.state_dict())
    official = list(to_official(names).values())
    assert len(set(official)) == 194
    assert [to_diffusers(name) for name in official] == names
    assert [*convert_wan_vae_to_diffusers(dict.fromkeys(official))] == names


def test_the_official_release_calls_its_weights_by_these_names() -> None:
    names = {
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.3.shortcut.bias": "encoder.down_blocks.3.conv_shortcut.bias",
        "encoder.downsamples.5.time_conv.weight": "encoder.down_blocks.5.time_conv.weight",
        "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
        "encoder.head.0.gamma": "encoder.norm_out.gamma",
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "decoder.conv1.bias": "decoder.conv_in.bias",
        "decoder.middle.2.residual.6.weight": "decoder.mid_block.resnets.1.conv2.weight",
        "decoder.upsamples.0.residual.0.gamma": "decoder.up_blocks.0.resnets.0.norm1.gamma",
        "decoder.upsamples.7.resample.1.weight": (
            "decoder.up_blocks.1.upsamplers.0.resample.1.weight"
        ),
        "decoder.upsamples.14.residual.2.bias": "decoder.up_blocks.3.resnets.2.conv1.bias",
        "decoder.head.2.bias": "decoder.conv_out.bias",
    }
    assert {name: to_diffusers(name) for name in names} == names
    assert {ours: name for name, ours in to_official(names.values()).items()} == names


def test_the_file_of_the_release_is_recognised_at_full_size(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        expected = AutoencoderKLWan().state_dict()
    path = tmp_path / "Wan2.1_VAE.pth"
    names = to_official(expected)
    torch.save({names[name]: value for name, value in expected.items()}, path)
    vae, weights = open_vae(path)
    check_fits(vae, weights, what="Wan2.1's autoencoder")
    count = sum(p.numel() for p in vae.parameters())
    print(f"Wan2.1_VAE.pth: {len(expected)} tensors, {count} parameters")
    assert (len(weights.shapes()), count) == (194, 126_892_531)


def bits(wrapper: WanVAEWrapper) -> tuple[Tensor, Tensor]:
    """What an autoencoder makes of one clip, and of one latent."""
    latents = random(1, wrapper.mean.shape[1], 2, 2, 3)
    return wrapper.encode_to_latent(clip(5)), wrapper.decode_to_pixel(latents)


def same(left: WanVAEWrapper, right: WanVAEWrapper) -> bool:
    return all(torch.equal(*pair) for pair in zip(bits(left), bits(right), strict=True))


def test_a_diffusers_folder_is_loaded(vae: Any, wrapper: WanVAEWrapper, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    assert same(WanVAEWrapper.load(tmp_path / "vae", torch.float32), wrapper)


def test_an_official_file_is_loaded(wrapper: WanVAEWrapper, tmp_path: Path) -> None:
    torch.save(vae_state(base_dim=BASE_DIM), tmp_path / "Wan2.1_VAE.pth")
    loaded = WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.float32)
    assert same(loaded, wrapper)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_width_and_channels_are_read_off_an_official_file(tmp_path: Path) -> None:
    torch.save(vae_state(base_dim=4, z_dim=8), tmp_path / "Wan2.1_VAE.pth")
    loaded = WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.float32)
    assert loaded.encode_to_latent(clip(5)).shape == (1, 8, 2, 2, 3)
    assert loaded.decode_to_pixel(random(1, 8, 2, 2, 3)).shape == (1, 3, 5, 16, 24)


def test_an_autoencoder_in_bf16_takes_and_gives_fp32(
    wrapper: WanVAEWrapper, tmp_path: Path
) -> None:
    torch.save(vae_state(base_dim=BASE_DIM), tmp_path / "Wan2.1_VAE.pth")
    loaded = WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for half, whole in zip(bits(loaded), bits(wrapper), strict=True):
        assert half.dtype == torch.float32
        assert (half - whole).abs().mean() < 0.02


def test_missing_unexpected_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    state = vae_state(base_dim=BASE_DIM)
    del state["encoder.head.2.bias"]
    state["decoder.head.2.bias"] = torch.zeros(4)
    state["encoder.downsamples.11.time_conv.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(WeightsError) as caught:
        WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.float32)
    for part in (
        f"{tmp_path}/Wan2.1_VAE.pth does not fit Wan2.1's autoencoder",
        "encoder.conv_out.bias",
        "encoder.down_blocks.11.time_conv.bias",
        "decoder.conv_out.bias is (4,), expected (3,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(1)}, {}, torch.zeros(1)])
def test_a_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(WeightsError) as caught:
        WanVAEWrapper.load(tmp_path / "Wan2.1_VAE.pth", torch.float32)
    assert str(caught.value).startswith(f"{tmp_path}/Wan2.1_VAE.pth: ")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "config.json is not readable"),
        ("[]", "config.json must hold a JSON object"),
        ("{", "config.json is not readable"),
        ('{"_class_name": "AutoencoderKL"}', "config.json must describe AutoencoderKLWan"),
        ('{"_class_name": "AutoencoderKLWan"}', "expected one of"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    config: str | None, reason: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(WeightsError, match=reason) as caught:
        WanVAEWrapper.load(tmp_path, torch.float32)
    assert str(caught.value).startswith(f"{tmp_path}: ")
