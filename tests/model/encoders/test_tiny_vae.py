"""The tiny autoencoder against a plain loop over frames, as a stream, and from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.encoders.tiny_vae import (
    TAEW21,
    TAEW22,
    Memory,
    PreviewVAE,
    TinySizes,
    TinyVAE,
    open_tiny_vae,
)
from model.encoders.vae import VideoVAE, WanVAEWrapper, meta_vae
from model.encoders.vae_sizes import WAN21, WAN22, Sizes
from model.types import LatentSpec
from tests.conftest import random_value
from utils.errors import UserError
from utils.tiny_world.codec import PatchCodec
from utils.weights import WeightsError, write_weights

State = dict[str, Tensor]
SMALL = TinySizes(6, 1, widths=(12, 8, 6, 6), encoder_width=6)
BOTH = pytest.mark.parametrize("patch", [1, 2])
GROWTHS = {7: 1, 13: 2, 19: 2}  # of the decoder: place -> frames of one
POOLS = {2: 2, 7: 2, 12: 1}  # of the encoder: place -> frames that become one


def tiny(patch: int = 1) -> TinyVAE:
    """A small one with random weights."""
    vae = TinyVAE(replace(SMALL, patch=patch))
    vae.load_state_dict({k: random_value(k, v.shape, 0) for k, v in vae.state_dict().items()})
    return vae


def spec(patch: int = 1, channels: int = 6) -> LatentSpec:
    return LatentSpec(channels, 4, 8 * patch, (2, 2))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ---- a plain reference: one clip, one frame at a time, weights by their published names


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    padding = weight.shape[-1] // 2
    return F.conv2d(x[None], weight, bias, stride=stride, padding=padding)[0]


def remember(state: State, name: str, frames: list[Tensor]) -> list[Tensor]:
    """A memory block."""
    past, out = torch.zeros_like(frames[0]), []
    for frame in frames:
        x = torch.cat([frame, past])
        for layer in (0, 2):
            x = conv(state, f"{name}.conv.{layer}", x).relu()
        out.append((conv(state, f"{name}.conv.4", x) + frame).relu())
        past = frame
    return out


def reference_decode(state: State, latents: Tensor, patch: int) -> Tensor:
    """[C, F, h, w] to [3, P, H, W] in [0, 1]."""
    frames = [3.0 * torch.tanh(z / 3.0) for z in latents.unbind(1)]
    frames = [conv(state, "decoder.1", x).relu() for x in frames]
    for stage, (grow, count) in enumerate(GROWTHS.items()):
        for block in range(3 + 6 * stage, 6 + 6 * stage):
            frames = remember(state, f"decoder.{block}", frames)
        width = frames[0].shape[0]
        large = [x.repeat_interleave(2, 1).repeat_interleave(2, 2) for x in frames]
        grown = [conv(state, f"decoder.{grow}.conv", x) for x in large]
        frames = [x[k * width : (k + 1) * width] for x in grown for k in range(count)]
        frames = [conv(state, f"decoder.{grow + 1}", x) for x in frames]
    pixels = [F.pixel_shuffle(conv(state, "decoder.22", x.relu()), patch) for x in frames]
    return torch.stack(pixels[3:], dim=1).clamp(0.0, 1.0)


def reference_encode(state: State, pixels: Tensor, patch: int) -> Tensor:
    """[3, P, H, W] in [0, 1] to [C, F, h, w]."""
    frames = list(pixels.unbind(1))
    while len(frames) % 4:
        frames.append(frames[-1])
    frames = [conv(state, "encoder.0", F.pixel_unshuffle(x, patch)).relu() for x in frames]
    for place, count in POOLS.items():
        groups = [torch.cat(frames[i : i + count]) for i in range(0, len(frames), count)]
        frames = [conv(state, f"encoder.{place}.conv", x) for x in groups]
        frames = [conv(state, f"encoder.{place + 1}", x, stride=2) for x in frames]
        for block in range(place + 2, place + 5):
            frames = remember(state, f"encoder.{block}", frames)
    return torch.stack([conv(state, "encoder.17", x) for x in frames], dim=1)


@BOTH
def test_decoding_equals_a_loop_over_frames(patch: int) -> None:
    vae, latents = tiny(patch), random(2, 6, 5, 3, 4)
    pixels = (vae.decode_to_pixel(latents) + 1.0) / 2.0
    assert pixels.shape == (2, 3, 17, 24 * patch, 32 * patch)
    assert pixels.std() > 0.1
    for clip, expected in zip(pixels, latents, strict=True):
        error = (clip - reference_decode(vae.state_dict(), expected, patch)).abs().max()
        assert error < 1e-5


@BOTH
@pytest.mark.parametrize("frames", [1, 5, 8])
def test_encoding_equals_a_loop_over_frames(patch: int, frames: int) -> None:
    vae, pixels = tiny(patch), random(2, 3, frames, 16 * patch, 24 * patch).clamp(-1.0, 1.0)
    latents = vae.encode_to_latent(pixels)
    assert latents.shape == (2, 6, (frames + 3) // 4, 2, 3)
    assert latents.std() > 0.1
    for clip, expected in zip(latents, (pixels + 1.0) / 2.0, strict=True):
        error = (clip - reference_encode(vae.state_dict(), expected, patch)).abs().max()
        assert error < 1e-5


# ---- streams


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [1, 2, 1], [3, 1]])
def test_a_stream_decodes_to_the_same_bits_as_the_whole(cuts: list[int]) -> None:
    vae, latents = tiny(), random(1, 6, 4, 2, 3)
    decoder = vae.stream_decoder()
    pieces = [decoder.decode(piece) for piece in latents.split(cuts, dim=2)]
    assert [p.shape[2] for p in pieces] == [4 * cuts[0] - 3, *(4 * cut for cut in cuts[1:])]
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode_to_pixel(latents))


def test_two_streams_do_not_disturb_each_other() -> None:
    vae, latents = tiny(), random(2, 6, 2, 2, 3)
    decoders = [vae.stream_decoder() for _ in range(2)]
    frames = [
        [decoders[i].decode(latents[i : i + 1, :, f : f + 1]) for i in range(2)] for f in range(2)
    ]
    second = torch.cat([frame[1] for frame in frames], dim=2)
    assert torch.equal(second, vae.decode_to_pixel(latents[1:]))


def test_the_state_of_a_stream_is_the_last_input_of_each_memory_block() -> None:
    vae, memory = tiny(), Memory()
    vae.decode_frame(random(1, 6, 1, 2, 3), memory)
    assert list(memory) == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert {tuple(v.shape) for v in memory.values()} == {
        (1, 1, 12, 2, 3),
        (1, 1, 8, 4, 6),
        (1, 1, 6, 8, 12),
    }


def test_pixels_stay_between_minus_one_and_one() -> None:
    pixels = tiny().decode_to_pixel(100.0 * random(1, 6, 2, 2, 3))
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)


def test_sides_that_are_no_whole_latents_are_refused() -> None:
    with pytest.raises(UserError, match="must be multiples of 16, got 16 x 24"):
        tiny(2).encode_to_latent(random(1, 3, 5, 16, 24))


# ---- sizes and files


@pytest.mark.parametrize(
    ("sizes", "decoder", "encoder"),
    [(TAEW21, 9_844_611, 1_470_928), (TAEW22, 9_923_532, 1_494_576)],
)
def test_the_published_sizes_have_the_published_counts(
    sizes: TinySizes, decoder: int, encoder: int
) -> None:
    vae = TinyVAE.outline(LatentSpec(sizes.channels, 4, 8 * sizes.patch, (2, 2)))
    assert vae.sizes == sizes
    halves = vae.decoder, vae.encoder
    assert [sum(p.numel() for p in half.parameters()) for half in halves] == [decoder, encoder]


@pytest.mark.parametrize(
    ("sizes", "size", "full_tflop", "cheaper"),
    [(WAN21, (60, 104), 13.6, 25), (WAN22, (44, 80), 66.4, 209)],
)
def test_decoding_a_latent_frame_costs_a_small_part_of_what_the_full_one_takes(
    sizes: Sizes, size: tuple[int, int], full_tflop: float, cheaper: int
) -> None:
    with torch.device("meta"):
        full = WanVAEWrapper(meta_vae(sizes))
        vae = TinyVAE.outline(LatentSpec(full.channels, 4, full.spatial_stride, (2, 2)))
        frame, flops = torch.empty(1, full.channels, 1, *size), []
        for decoder in (full.to("meta").stream_decoder(), vae.stream_decoder()):
            decoder.decode(frame)  # the first one makes a single pixel frame
            with FlopCounterMode(display=False) as counter:
                decoder.decode(frame)
            flops.append(counter.get_total_flops())
    assert round(flops[0] / 1e12, 1) == full_tflop
    assert round(flops[0] / flops[1]) == cheaper


def test_weights_have_the_published_names() -> None:
    both = ("weight", "bias")
    expected = {f"decoder.{n}.{kind}" for n in (1, 22) for kind in both}
    expected |= {f"encoder.{n}.{kind}" for n in (0, 17) for kind in both}
    expected |= {f"decoder.{n}.weight" for n in (8, 14, 20)}
    expected |= {f"encoder.{n}.weight" for n in (3, 8, 13)}
    expected |= {f"decoder.{n}.conv.weight" for n in GROWTHS}
    expected |= {f"encoder.{n}.conv.weight" for n in POOLS}
    blocks = [f"decoder.{n}" for n in (3, 4, 5, 9, 10, 11, 15, 16, 17)]
    blocks += [f"encoder.{n}" for n in (4, 5, 6, 9, 10, 11, 14, 15, 16)]
    expected |= {f"{block}.conv.{n}.{kind}" for block in blocks for n in (0, 2, 4) for kind in both}
    assert set(tiny().state_dict()) == expected


def write(path: Path, state: State) -> Path:
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        write_weights(state, path, {})
    return path


@pytest.mark.parametrize("name", ["tae.pth", "tae.safetensors"])
@BOTH
def test_a_file_is_loaded_whatever_its_widths(name: str, patch: int, tmp_path: Path) -> None:
    vae = tiny(patch)
    path = write(tmp_path / name, vae.state_dict())
    loaded = TinyVAE.load(path, torch.float32, spec(patch))
    assert loaded.sizes == vae.sizes
    assert not any(p.requires_grad for p in loaded.parameters())
    latents, pixels = random(1, 6, 2, 2, 3), random(1, 3, 5, 16 * patch, 16 * patch)
    assert torch.equal(loaded.decode_to_pixel(latents), vae.decode_to_pixel(latents))
    assert torch.equal(loaded.encode_to_latent(pixels), vae.encode_to_latent(pixels))


def test_of_rows_for_more_frames_than_are_made_the_last_are_taken(tmp_path: Path) -> None:
    vae = tiny()
    state = vae.state_dict()
    for place in GROWTHS:
        name = f"decoder.{place}.conv.weight"
        more = torch.full_like(state[name], 7.0)
        state[name] = torch.cat([more, state[name]])
    loaded = TinyVAE.load(write(tmp_path / "tae.pth", state), torch.float32, spec())
    latents = random(1, 6, 2, 2, 3)
    assert torch.equal(loaded.decode_to_pixel(latents), vae.decode_to_pixel(latents))


def test_a_tiny_autoencoder_in_bf16_takes_and_gives_fp32(tmp_path: Path) -> None:
    vae, latents = tiny(), random(1, 6, 2, 2, 3)
    path = write(tmp_path / "tae.pth", vae.state_dict())
    loaded = TinyVAE.load(path, torch.bfloat16, spec())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    half, whole = loaded.decode_to_pixel(latents), vae.decode_to_pixel(latents)
    assert half.dtype == torch.float32
    assert (half - whole).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (spec(channels=16), "16 channels and strides of 4 frames and 8 pixels"),
        (spec(patch=2), "6 channels and strides of 4 frames and 16 pixels"),
    ],
)
def test_one_for_other_latents_is_refused(wanted: LatentSpec, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tae.pth", tiny().state_dict())
    with pytest.raises(WeightsError) as caught:
        open_tiny_vae(path, wanted)
    assert str(caught.value) == (
        f"{path}: a tiny autoencoder of 6 channels and strides of 4 frames and 8 pixels; the "
        f"model's latents have {told}; take taew2_1 for Wan2.1 and A14B, or taew2_2 for TI2V-5B"
    )


@pytest.mark.parametrize("missing", ["decoder.1.weight", "decoder.22.weight", "encoder.0.weight"])
def test_a_file_of_something_else_is_refused(missing: str, tmp_path: Path) -> None:
    state = {name: value for name, value in tiny().state_dict().items() if name != missing}
    path = write(tmp_path / "tae.pth", state)
    with pytest.raises(WeightsError) as caught:
        TinyVAE.load(path, torch.float32, spec())
    assert str(caught.value) == (
        f"{path}: not a tiny autoencoder (TAEHV): it has no {missing} of four dimensions; take "
        f"taew2_1 for 16 latent channels, or taew2_2 for 48"
    )


def test_missing_unexpected_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    state = tiny().state_dict()
    del state["decoder.9.conv.2.bias"]
    state["decoder.8.bias"] = torch.zeros(8)
    state["encoder.12.conv.weight"] = torch.zeros(6, 12, 1, 1)
    path = write(tmp_path / "tae.pth", state)
    with pytest.raises(WeightsError) as caught:
        TinyVAE.load(path, torch.float32, spec())
    for part in (
        f"{path} does not fit the tiny autoencoder: 1 weights missing ['decoder.9.conv.2.bias']",
        "1 unexpected ['decoder.8.bias']",
        "encoder.12.conv.weight is (6, 12, 1, 1), expected (6, 6, 1, 1)",
    ):
        assert part in str(caught.value)


# ---- previews


def test_a_preview_shows_tiny_pixels_and_reads_pixels_with_the_models_own_codec() -> None:
    small, full = tiny(), PatchCodec.fit(random(8, 3, 9, 16, 16))
    loaded: list[VideoVAE] = []

    def load() -> VideoVAE:
        loaded.append(full)
        return full

    preview = PreviewVAE(small, load)
    latents, pixels = random(1, 6, 2, 2, 3), random(1, 3, 5, 16, 16)
    assert torch.equal(preview.decode_to_pixel(latents), small.decode_to_pixel(latents))
    shown = preview.stream_decoder().decode(latents)
    assert torch.equal(shown, small.decode_to_pixel(latents))
    assert not loaded, "a clip of a prompt needs no encoder"
    assert torch.equal(preview.encode_to_latent(pixels), full.encode_to_latent(pixels))
    assert torch.equal(preview.stream_encoder().encode(pixels), full.encode_to_latent(pixels))
    assert (len(loaded), preview.temporal_stride) == (1, 4)
