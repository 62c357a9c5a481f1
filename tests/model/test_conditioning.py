"""Prompts and keyframes on their way to the transformer: masks, latents, image tokens, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.conditioning import ConditioningEncoder, ImageEncoder, first_latents
from model.types import Keyframes
from tests.toy import at_home
from utils.tiny_world.codec import PatchCodec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    """The tiny world's kind of codec, fitted to noise."""
    rng = torch.Generator().manual_seed(0)
    return PatchCodec.fit(2.0 * torch.rand(8, 3, 9, 16, 16, generator=rng) - 1.0)


def clip_states(images: Tensor) -> Tensor:
    """Stands for CLIP: the mean colour of each image, once per token."""
    return images.mean(dim=(2, 3))[:, None].expand(-1, 5, -1)


def images(count: int, seed: int) -> Tensor:
    """Pixels [count, 3, 16, 24] in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    return 2.0 * torch.rand(count, 3, 16, 24, generator=rng) - 1.0


@pytest.fixture
def encoder(codec: PatchCodec) -> ImageEncoder:
    return ImageEncoder(clip_states, codec)


def test_channels_are_a_mask_of_four_and_the_latents_of_the_image_before_grey(
    encoder: ImageEncoder, codec: PatchCodec
) -> None:
    first = images(2, seed=1)
    states, channels = encoder(Keyframes(first), 4)
    video = torch.cat([first[:, :, None], torch.zeros(2, 3, 12, 16, 24)], dim=2)
    assert channels.shape == (2, 20, 4, 2, 3)
    assert channels[:, :4, 0].min() == 1.0
    assert channels[:, :4, 1:].abs().max() == 0.0
    assert torch.equal(channels[:, 4:], codec.encode_to_latent(video))
    assert torch.equal(states, clip_states(first))


def test_a_model_without_clip_is_given_the_same_channels_and_no_states(
    encoder: ImageEncoder, codec: PatchCodec
) -> None:
    keyframes = Keyframes(images(2, seed=1))
    states, channels = ImageEncoder(None, codec)(keyframes, 4)
    assert states is None
    assert torch.equal(channels, encoder(keyframes, 4)[1])


def test_the_mask_has_a_channel_for_each_pixel_frame_of_a_latent() -> None:
    with at_home():
        from model.families.toy.encoders import ToyCodec
    codec = ToyCodec(torch.tensor(2.0))  # two pixel frames to a latent, six channels
    first, last = images(1, seed=1), images(1, seed=2)
    _, channels = ImageEncoder(clip_states, codec)(Keyframes(first, last), 3)
    mask = torch.zeros(1, 2, 3, 4, 6)
    mask[:, :, 0] = 1.0
    mask[:, 1, 2] = 1.0
    video = torch.zeros(1, 3, 5, 16, 24)
    video[:, :, 0], video[:, :, -1] = first, last
    assert torch.equal(channels[:, :2], mask)
    assert torch.equal(channels[:, 2:], codec.encode_to_latent(video))


def test_a_last_frame_is_the_last_pixel_frame_of_the_last_latent_frame(
    encoder: ImageEncoder, codec: PatchCodec
) -> None:
    first, last = images(2, seed=1), images(2, seed=2)
    states, channels = encoder(Keyframes(first, last), 3)
    video = torch.zeros(2, 3, 9, 16, 24)
    video[:, :, 0], video[:, :, -1] = first, last
    mask = torch.zeros(2, 4, 3, 2, 3)
    mask[:, :, 0] = 1.0
    mask[:, 3, 2] = 1.0
    assert torch.equal(channels[:, :4], mask)
    assert torch.equal(channels[:, 4:], codec.encode_to_latent(video))
    assert torch.equal(states, torch.cat([clip_states(first), clip_states(last)], dim=1))


def test_a_single_frame_is_the_image_itself(encoder: ImageEncoder, codec: PatchCodec) -> None:
    first = images(1, seed=1)
    _, channels = encoder(Keyframes(first), 1)
    assert channels.shape == (1, 20, 1, 2, 3)
    assert torch.equal(channels[:, 4:], codec.encode_to_latent(first[:, :, None]))


def test_a_single_frame_has_no_last_one(encoder: ImageEncoder) -> None:
    with pytest.raises(ValueError, match="no last frame"):
        encoder(Keyframes(images(1, seed=1), images(1, seed=2)), 1)


def test_a_sample_never_depends_on_its_neighbours(encoder: ImageEncoder) -> None:
    first = images(3, seed=1)
    _, together = encoder(Keyframes(first), 3)
    _, alone = encoder(Keyframes(first[1:2]), 3)
    assert torch.equal(together[1:2], alone)


def test_images_become_first_latent_frames_each_by_itself(codec: PatchCodec) -> None:
    first = images(3, seed=1)
    assert torch.equal(first_latents(codec, first)[2:], codec.encode_to_latent(first[2:, :, None]))


class Words:
    """Stands for a text encoder; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> Tensor:
        self.calls.append(prompts)
        return torch.stack([torch.full((4, 2), float(len(prompt))) for prompt in prompts])


def test_a_prompt_is_encoded_once_while_it_is_remembered() -> None:
    words = Words()
    encoder = ConditioningEncoder(
        words, negative_prompt="", device=CPU, remembered_bytes=2 * 4 * 2 * 4
    )
    encoder.encode(["a", "b", "a"])
    assert words.calls == [[""], ["a"], ["b"]]
    encoder.encode(["c", "a"])  # only two fit: b goes
    encoder.encode(["b"])
    assert words.calls[3:] == [["c"], ["b"]]


def test_the_unconditional_side_keeps_the_images(codec: PatchCodec) -> None:
    encoder = ConditioningEncoder(
        Words(), negative_prompt="bad", device=CPU, images=ImageEncoder(clip_states, codec)
    )
    conditioning = encoder.encode(["ab", "c"], Keyframes(images(2, seed=1)), frames=3)
    unconditional = encoder.unconditional(conditioning)
    assert unconditional.clip is conditioning.clip
    assert unconditional.first_frame is conditioning.first_frame
    assert conditioning.text[:, 0, 0].tolist() == [2.0, 1.0]
    assert unconditional.text[:, 0, 0].tolist() == [3.0, 3.0]


def test_a_model_that_reads_images_must_be_given_some(codec: PatchCodec) -> None:
    encoder = ConditioningEncoder(
        Words(), negative_prompt="", device=CPU, images=ImageEncoder(clip_states, codec)
    )
    with pytest.raises(ValueError, match="begins with an image, but none is given"):
        encoder.encode(["a"])


def test_a_model_that_reads_no_images_must_be_given_none() -> None:
    encoder = ConditioningEncoder(Words(), negative_prompt="", device=CPU)
    with pytest.raises(ValueError, match="reads no images"):
        encoder.encode(["a"], Keyframes(images(1, seed=1)))
