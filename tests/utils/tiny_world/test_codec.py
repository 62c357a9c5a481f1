"""The tiny world's linear codec: causal, streamable, and good enough for its clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.errors import UserError
from utils.tiny_world.codec import FILE_NAME, CodecSizes, PatchCodec
from utils.tiny_world.world import draw_captions, draw_scenes, render
from utils.weights import WeightsError, write_weights


@pytest.fixture(scope="module")
def codec(tiny_root: Path) -> PatchCodec:
    return PatchCodec.load(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny" / FILE_NAME)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    rng = torch.Generator().manual_seed(11)
    return 2.0 * render(draw_scenes(draw_captions(64, rng), rng)) - 1.0


def test_clips_become_latents_with_the_strides_of_wan(codec: PatchCodec, pixels: Tensor) -> None:
    assert codec.encode_to_latent(pixels).shape == (64, 16, 5, 4, 4)


def test_decoding_gives_as_many_pixels_as_were_encoded(codec: PatchCodec, pixels: Tensor) -> None:
    assert codec.decode_to_pixel(codec.encode_to_latent(pixels)).shape == pixels.shape


def test_a_single_image_is_a_clip_of_one_frame(codec: PatchCodec, pixels: Tensor) -> None:
    latents = codec.encode_to_latent(pixels[:, :, :1])
    assert torch.equal(latents, codec.encode_to_latent(pixels)[:, :, :1])


def test_any_multiple_of_eight_is_a_size(codec: PatchCodec) -> None:
    latents = codec.encode_to_latent(torch.zeros(1, 3, 5, 16, 40))
    assert latents.shape == (1, 16, 2, 2, 5)
    assert codec.decode_to_pixel(latents).shape == (1, 3, 5, 16, 40)


@pytest.mark.parametrize("frames", [2, 4, 16])
def test_a_clip_of_another_length_is_refused(codec: PatchCodec, frames: int) -> None:
    with pytest.raises(ValueError) as caught:
        codec.encode_to_latent(torch.zeros(1, 3, frames, 32, 32))
    assert str(caught.value) == f"a clip must have 1 + 4 k frames, got {frames}"


def test_a_stream_decodes_to_the_same_bits_as_the_whole(codec: PatchCodec, pixels: Tensor) -> None:
    latents = codec.encode_to_latent(pixels[:4])
    decoder = codec.stream_decoder()
    pieces = [decoder.decode(piece) for piece in latents.split([1, 2, 2], dim=2)]
    assert [piece.shape[2] for piece in pieces] == [1, 8, 8]
    assert torch.equal(torch.cat(pieces, dim=2), codec.decode_to_pixel(latents))


@pytest.mark.parametrize("cuts", [[1, 16], [5, 4, 8], [9, 8], [1, 4, 4, 4, 4]])
def test_a_stream_encodes_to_the_same_bits_as_the_whole(
    codec: PatchCodec, pixels: Tensor, cuts: list[int]
) -> None:
    encoder = codec.stream_encoder()
    pieces = [encoder.encode(piece) for piece in pixels[:4].split(cuts, dim=2)]
    assert torch.equal(torch.cat(pieces, dim=2), codec.encode_to_latent(pixels[:4]))


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_a_later_piece_of_another_length_is_refused(codec: PatchCodec, frames: int) -> None:
    encoder = codec.stream_encoder()
    encoder.encode(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(ValueError) as caught:
        encoder.encode(torch.zeros(1, 3, frames, 32, 32))
    assert str(caught.value) == f"every later piece of a clip must have 4 k frames, got {frames}"


def test_sides_that_eight_does_not_divide_are_refused(codec: PatchCodec) -> None:
    with pytest.raises(ValueError) as caught:
        codec.encode_to_latent(torch.zeros(1, 3, 5, 32, 36))
    assert str(caught.value) == "the sides of a clip must be multiples of 8, got 32 x 36"


def test_the_codec_keeps_clips_above_26_db(codec: PatchCodec, pixels: Tensor) -> None:
    error = codec.decode_to_pixel(codec.encode_to_latent(pixels)) - pixels
    psnr = 20.0 * torch.tensor(2.0).log10() - 10.0 * error.square().mean().log10()
    assert psnr > 26.0


def test_later_frames_do_not_change_earlier_latents(codec: PatchCodec, pixels: Tensor) -> None:
    changed = pixels.clone()
    changed[:, :, 9:] = 0.3
    before, after = codec.encode_to_latent(pixels), codec.encode_to_latent(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_latents_have_zero_mean_and_unit_variance(codec: PatchCodec, pixels: Tensor) -> None:
    latents = codec.encode_to_latent(pixels)
    for frames in (latents[:, :, :1], latents[:, :, 1:]):
        rows = frames.transpose(0, 1).flatten(1)
        assert rows.mean(dim=1).abs().max() < 0.25
        assert (rows.std(dim=1) - 1.0).abs().max() < 0.25


def test_encoding_a_decoded_latent_gives_it_back(codec: PatchCodec) -> None:
    latents = 0.1 * torch.randn(2, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    again = codec.encode_to_latent(codec.decode_to_pixel(latents))
    torch.testing.assert_close(again, latents, atol=1e-4, rtol=0.0)


def test_pixels_stay_between_minus_one_and_one(codec: PatchCodec) -> None:
    pixels = codec.decode_to_pixel(torch.full((1, 16, 2, 4, 4), 50.0))
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)


def test_fitting_the_same_clips_gives_the_same_codec(pixels: Tensor) -> None:
    first, second = (PatchCodec.fit(pixels[:32]).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_saved_codec_is_loaded_as_it_was(codec: PatchCodec, tmp_path: Path) -> None:
    codec.save(tmp_path / FILE_NAME)
    loaded = PatchCodec.load(tmp_path / FILE_NAME).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in codec.state_dict().items())


def test_a_file_of_another_model_is_no_codec(tmp_path: Path) -> None:
    write_weights({"blocks.0.weight": torch.zeros(1)}, tmp_path / FILE_NAME, {})
    with pytest.raises(WeightsError, match="does not fit the patch codec"):
        PatchCodec.load(tmp_path / FILE_NAME)


def test_a_codec_of_other_sizes_has_their_strides_and_channels(
    pixels: Tensor, tmp_path: Path
) -> None:
    sizes = CodecSizes(channels=48, spatial_stride=16)
    codec = PatchCodec.fit(pixels, sizes)
    codec.save(tmp_path / FILE_NAME)
    assert CodecSizes.of(tmp_path / FILE_NAME) == sizes
    loaded = PatchCodec.load(tmp_path / FILE_NAME)
    latents = loaded.encode_to_latent(pixels)
    assert latents.shape == (64, 48, 5, 2, 2)
    assert torch.equal(latents, codec.encode_to_latent(pixels))
    assert (loaded.decode_to_pixel(latents) - pixels).square().mean() < 0.02
    with pytest.raises(UserError, match="must be multiples of 16, got 24 x 32"):
        loaded.encode_to_latent(pixels[..., :24, :])
