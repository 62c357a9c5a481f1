"""The tiny world's judge: passes what is real, names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.media.video import to_unit
from utils.tiny_world.checker import CONTRAST_RANGE, MIN_PSNR_DB, Reading, read_attributes
from utils.tiny_world.codec import FILE_NAME, PatchCodec
from utils.tiny_world.world import (
    ATTRIBUTES,
    COLOURS,
    FRAMES,
    SIDE,
    Caption,
    Scenes,
    compose,
    draw_captions,
    draw_scenes,
    render,
)

SOME = draw_captions(96, torch.Generator().manual_seed(5))
OTHER = {
    "colour": "cyan",
    "shape": "triangle",
    "direction": "down",
    "speed": "quickly",
    "background": "light",
}
RED_BAR = Caption("red", "bar", "left", "slowly", "dark")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(SOME, torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def clips(scenes: Scenes) -> Tensor:
    return render(scenes)


@pytest.fixture(scope="module")
def reading(clips: Tensor) -> Reading:
    return read_attributes(clips)


@pytest.fixture(scope="module")
def reading_through_codec(clips: Tensor, tiny_root: Path) -> Reading:
    path = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny" / FILE_NAME
    codec = PatchCodec.load(path)
    return read_attributes(
        to_unit(codec.decode_to_pixel(codec.encode_to_latent(2.0 * clips - 1.0)))
    )


def one(caption: Caption, seed: int = 0) -> Tensor:
    return render(draw_scenes([caption], torch.Generator().manual_seed(seed)))


def test_every_attribute_of_every_real_clip_is_read_right(reading: Reading) -> None:
    assert reading.matches(SOME).all()


def test_every_real_clip_is_valid(reading: Reading) -> None:
    assert reading.valid().all()


def test_real_clips_are_re_rendered_almost_perfectly(reading: Reading) -> None:
    assert reading.psnr.min() > 30.0
    assert reading.psnr.mean() > 40.0


def test_places_and_sizes_are_read_to_a_pixel(reading: Reading, scenes: Scenes) -> None:
    for name in ("start", "travel", "half_size"):
        assert (getattr(reading, name) - getattr(scenes, name)).abs().max() < 1.5 / SIDE


def test_the_codec_keeps_every_attribute(reading_through_codec: Reading) -> None:
    assert reading_through_codec.matches(SOME).all()


def test_the_codec_keeps_clips_valid(reading_through_codec: Reading) -> None:
    assert reading_through_codec.valid().all()


def test_clips_through_the_codec_are_re_rendered_well(reading_through_codec: Reading) -> None:
    assert reading_through_codec.psnr.min() > 23.0
    assert reading_through_codec.psnr.mean() > 26.0


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_one_wrong_attribute_is_detected_and_no_other(attribute: str) -> None:
    wanted = replace(RED_BAR, **{attribute: OTHER[attribute]})
    matches = read_attributes(one(RED_BAR)).matches([wanted])[0]
    assert matches.tolist() == [name != attribute for name in ATTRIBUTES]


def test_a_grey_clip_holds_no_shape_and_is_invalid() -> None:
    reading = read_attributes(torch.full((1, 3, 17, 32, 32), 0.5))
    assert not reading.present
    assert not reading.valid()
    assert not reading.matches([RED_BAR]).any()


def test_a_floor_without_a_shape_is_invalid() -> None:
    floor = draw_scenes(SOME[:4], torch.Generator().manual_seed(0)).floor
    empty = compose(torch.zeros(4, FRAMES, SIDE, SIDE), torch.zeros(4, 3), floor)
    reading = read_attributes(empty.clamp(0.0, 1.0))
    assert reading.psnr.min() > MIN_PSNR_DB
    assert not reading.valid().any()


def test_noise_is_invalid() -> None:
    noise = torch.rand(4, 3, 17, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not read_attributes(noise).valid().any()


def with_floor(floor: Callable[[Tensor], Tensor]) -> Reading:
    """The reading of eight clips whose floors [8, G, CELLS, CELLS] were changed by `floor`."""
    scenes = draw_scenes(SOME[:8], torch.Generator().manual_seed(0))
    return read_attributes(render(replace(scenes, floor=floor(scenes.floor))))


def flattened(floor: Tensor) -> Tensor:
    return floor.mean(dim=(1, 2, 3), keepdim=True).expand_as(floor)


def blurred(floor: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(floor, (1, 1, 1, 1), mode="replicate"), 3, 1)


def exaggerated(floor: Tensor) -> Tensor:
    middle = 0.5  # so that nothing is clipped to black or white
    return middle + 1.6 * (floor - flattened(floor))


@pytest.mark.parametrize("change", [flattened, blurred])
def test_a_floor_that_lost_contrast_is_invalid(change: Callable[[Tensor], Tensor]) -> None:
    reading = with_floor(change)
    assert reading.contrast.max() < CONTRAST_RANGE[0]
    assert not reading.valid().any()


def test_a_floor_with_too_much_contrast_is_invalid() -> None:
    reading = with_floor(exaggerated)
    assert reading.contrast.min() > CONTRAST_RANGE[1]
    assert not reading.valid().any()


def test_a_floor_without_contrast_leaves_the_caption_readable() -> None:
    assert with_floor(flattened).matches(SOME[:8]).all()


def test_a_shape_that_jumps_back_is_invalid() -> None:
    clip = one(replace(RED_BAR, speed="quickly"))
    shuffled = clip[:, :, torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    assert not read_attributes(shuffled).valid()


def test_a_clip_run_backwards_moves_the_other_way() -> None:
    reading = read_attributes(one(RED_BAR).flip(2))
    assert reading.matches([replace(RED_BAR, direction="right")]).all()


def test_a_reading_does_not_depend_on_its_batch(clips: Tensor) -> None:
    together, alone = read_attributes(clips[:8]), read_attributes(clips[3:4])
    assert torch.equal(together.attributes[3], alone.attributes[0])
    assert torch.allclose(together.features()[3], alone.features()[0], atol=1e-5)


def test_the_free_start_is_the_one_across_the_motion() -> None:
    horizontal, vertical = one(RED_BAR), one(replace(RED_BAR, direction="up"))
    reading = read_attributes(torch.cat([horizontal, vertical]))
    assert reading.orthogonal_start().tolist() == [reading.start[0, 1], reading.start[1, 0]]


@pytest.mark.parametrize("colour", COLOURS)
def test_brightness_alone_does_not_change_the_colour_that_is_read(colour: str) -> None:
    caption = Caption(colour, "circle", "left", "slowly", "light")
    reading = read_attributes(0.85 * one(caption))
    assert reading.attributes[0, 0] == list(COLOURS).index(colour)


@pytest.mark.parametrize("shape", [(1, 3, 16, 32, 32), (1, 3, 17, 64, 64), (3, 17, 32, 32)])
def test_clips_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"clips must be \[B, 3, 17, 32, 32\], got"):
        read_attributes(torch.zeros(shape))


def test_a_real_clip_has_no_faults(reading: Reading) -> None:
    assert reading.faults(SOME) == [[]] * len(SOME)


def test_faults_name_the_attribute_that_is_wrong_and_what_was_asked_for() -> None:
    shown = SOME[0]
    wrong = "circle" if shown.shape != "circle" else "bar"
    reading = read_attributes(one(shown))
    assert reading.faults([replace(shown, shape=wrong)]) == [
        [f"shape: {shown.shape} instead of {wrong}"]
    ]


def test_faults_say_when_a_floor_is_flat_and_when_nothing_is_there() -> None:
    clip = one(SOME[0])
    mean = clip.mean(dim=(3, 4), keepdim=True)
    grey = read_attributes(torch.full_like(clip, 0.5))
    assert grey.faults(SOME[:1]) == [["no shape is to be seen"]]
    (faults,) = read_attributes(mean + 0.5 * (clip - mean)).faults(SOME[:1])
    assert any("of a real floor's contrast, below the limit of 85%" in fault for fault in faults)


def test_a_clip_has_faults_exactly_if_it_does_not_pass(clips: Tensor) -> None:
    some, wanted = clips[:12], SOME[:12]
    noisy = some + 0.15 * torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
    for pixels in (some, noisy.clamp(0.0, 1.0), some.flip(2), 0.3 * some + 0.3):
        reading = read_attributes(pixels)
        passes = reading.matches(wanted).all(dim=1) & reading.valid()
        assert [not faults for faults in reading.faults(wanted)] == passes.tolist()
