"""Requests: one validator for JSON and command lines, which tells all that is wrong at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from model.causal import CausalLayout
from model.types import LatentSpec
from pipeline.fields import (
    Number,
    PixelSize,
    RequestError,
    Text,
    add_flags,
    asked,
    from_words,
    schema,
)
from pipeline.memory import Footprint, Memory
from pipeline.request import (
    Capabilities,
    Pixels,
    Request,
    footprint_problem,
    joint_problems,
    problems,
    read_request,
)
from pipeline.teacher import SamplingConfig

WAN = LatentSpec(channels=16, temporal_stride=4, spatial_stride=8, patch=(2, 2))
STUDENT = Capabilities(WAN, size=(480, 832), frames=81, steps=4)
TEACHER = replace(STUDENT, steps=50, sampling=SamplingConfig(steps=50, cfg_scale=5.0))
BLOCKS = CausalLayout(num_frame_per_block=3, independent_first_frame=True)
CAUSAL = replace(STUDENT, layout=BLOCKS, frames=85)
IMAGE = replace(STUDENT, images=1)
EITHER = replace(STUDENT, first_frame=True)  # with an image or without
BOTH_ENDS = replace(STUDENT, images=2)
GIB = 2**30
# Wan2.1-1.3B in bf16 on one GPU of 80 GiB.
SMALL = replace(STUDENT, footprint=Footprint(1536, 30, 2, Memory(64 * GIB, 80 * GIB)))
FRAME = Pixels(torch.zeros(3, 1, 8, 8))


def refused(body: object, model: Capabilities = STUDENT) -> list[str]:
    with pytest.raises(RequestError) as caught:
        read_request(body, model)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_a_prompt_alone_asks_for_the_models_usual_clip() -> None:
    request = read_request({"prompt": " a red dog "}, STUDENT)
    assert request == Request("a red dog", seed=0, sample=0)
    assert request.shape(STUDENT) == (16, 21, 60, 104)


def test_every_field_that_json_sets_is_in_the_request() -> None:
    body = {
        "prompt": "a", "seed": 3, "sample": 1, "negative_prompt": "b", "size": [720, 1280],
        "frames": 5, "steps": 8, "cfg_scale": 2,
    }  # fmt: skip
    request = read_request(body, TEACHER)
    assert request == Request(
        "a", 3, 1, negative_prompt="b", size=(720, 1280), frames=5, steps=8, cfg_scale=2.0
    )
    assert request.shape(TEACHER) == (16, 2, 90, 160)


def test_null_stands_for_the_default_of_any_field_but_the_prompt() -> None:
    body = {"prompt": "a", "seed": None, "frames": None, "cfg_scale": None}
    assert read_request(body, STUDENT) == Request("a")
    assert refused({"prompt": None}) == ["prompt: must be a text, got None"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prompt", 5, "prompt: must be a text, got 5"),
        ("prompt", " \n", "prompt: must be a text that is not empty"),
        ("prompt", "a" * 2001, "prompt: at most 2000 characters, this one has 2001"),
        ("prompt", "a\ud800", "prompt: has half a character at 1: 'a\\ud800'"),
        ("prompt", ["a"], "prompt: must be a text, got ['a']"),
        ("seed", True, "seed: must be a whole number from 0 to 9007199254740991, got True"),
        ("seed", 1.0, "seed: must be a whole number from 0 to 9007199254740991, got 1.0"),
        ("seed", -1, "seed: must be a whole number from 0 to 9007199254740991, got -1"),
        ("seed", "7", "seed: must be a whole number from 0 to 9007199254740991, got '7'"),
        ("seed", 2**53, f"seed: must be a whole number from 0 to {2**53 - 1}, got {2**53}"),
        ("frames", 0, "frames: must be a whole number from 1 to 1000000000, got 0"),
        ("frames", 80, "frames: must be 1 + 4 k, got 80; the nearest is 81"),
        ("frames", 2, "frames: must be 1 + 4 k, got 2; the nearest is 1"),
        ("size", [480, 830], "size: sides must be multiples of 16 and 16 pixels, got 480x830; the "
         "nearest is 480x832"),
        ("size", [3, 832], "size: sides must be multiples of 16 and 16 pixels, got 3x832; the "
         "nearest is 16x832"),
        ("size", [480], "size: must be height and width in pixels, as [480, 832] or 480x832, got "
         "[480]"),
        ("size", [480, True], "size: must be height and width in pixels, as [480, 832] or 480x832, "
         "got [480, True]"),
        ("size", "big", "size: must be height and width in pixels, as [480, 832] or 480x832, got "
         "'big'"),
        ("steps", 8, "steps: this model makes clips in the 4 steps of its training; leave it out"),
        ("cfg_scale", 5.0, "cfg_scale: this model was distilled and makes clips without guidance; "
         "leave it out"),
        ("negative_prompt", "b", "negative_prompt: this model was distilled and makes clips "
         "without guidance; leave it out"),
        ("promt", "a", "unknown field 'promt' (did you mean 'prompt'?)"),
        ("x" * 99, 1, f"unknown field '{'x' * 36}... (known are prompt, seed, sample, "
         "negative_prompt, size, frames, steps, cfg_scale)"),
    ],
)  # fmt: skip
def test_a_bad_value_is_told_with_what_is_allowed(field: str, value: object, said: str) -> None:
    assert refused({"prompt": "a", field: value}) == [said]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, 100.5, True, "5"])
def test_guidance_is_a_finite_number_within_its_limits(value: object) -> None:
    (said,) = refused({"prompt": "a", "cfg_scale": value}, TEACHER)
    assert said.startswith("cfg_scale: must be a number from 0 to 100, got ")


@pytest.mark.parametrize("value", [0, 1001, 2.0, 10**400])
def test_steps_are_a_whole_number_within_their_limits(value: object) -> None:
    (said,) = refused({"prompt": "a", "steps": value}, TEACHER)
    assert said.startswith("steps: must be a whole number from 1 to 1000, got ")


def test_what_is_no_object_is_refused() -> None:
    for body in (None, [], "a", 5):
        (said,) = refused(body)
        assert said.startswith('must be an object such as {"prompt": "a text"}, got ')


def test_all_problems_are_told_at_once() -> None:
    found = refused({"seed": -1, "frames": 80, "size": [1, 1], "stepps": 3, "steps": 3})
    assert [line.split(":")[0] for line in found] == [
        "unknown field 'stepps' (did you mean 'steps'?)",
        "prompt",
        "seed",
        "size",
        "frames",
        "steps",
    ]


# ---- what depends on the model


def test_frames_of_a_causal_model_end_where_its_blocks_end() -> None:
    assert read_request({"prompt": "a", "frames": 13}, CAUSAL).shape(CAUSAL)[1] == 4
    assert refused({"prompt": "a", "frames": 21}, CAUSAL) == [
        "frames: must be 1 + 4 k in blocks of one, then 3 latent frames, got 21; the nearest is 25"
    ]
    assert refused({"prompt": "a", "frames": 12}, CAUSAL)[0].endswith("the nearest is 13")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("frames", [1, 2, 7, 30, 81, 82, 1000])
def test_the_nearest_length_can_be_made_and_none_is_nearer(frames: int, *, first: bool) -> None:
    model = replace(CAUSAL, layout=replace(BLOCKS, independent_first_frame=first))
    near = model.nearest_frames(frames)
    made = [n for n in range(1, 1100, 4) if model.length_problem(WAN.latent_frames(n)) is None]
    assert abs(near - frames) == min(abs(n - frames) for n in made)


def test_a_negative_prompt_needs_guidance() -> None:
    body = {"prompt": "a", "negative_prompt": "b", "cfg_scale": 1}
    assert refused(body, TEACHER) == [
        "negative_prompt: has no effect without guidance; set cfg_scale to another number than 1"
    ]
    assert read_request({**body, "cfg_scale": 2}, TEACHER).cfg_scale == 2.0


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (STUDENT, {"first_image": FRAME}, "first_image: this model makes whole clips from text al"),
        (STUDENT, {"last_image": FRAME}, "last_image: this model ends with no image; use a first-"),
        (STUDENT, {"initial": FRAME}, "initial: this model makes whole clips and cannot begin wit"),
        (IMAGE, {}, "first_image: this model begins with an image, but none is given"),
        (EITHER, {"first_image": FRAME, "frames": 1},
         "first_image: a clip of one latent frame is its image, and leaves none to make"),
        (EITHER, {"first_image": FRAME, "last_image": FRAME}, "last_image: this model ends with n"),
        (EITHER, {"initial": FRAME}, "initial: this model makes whole clips, which may begin with "
         "an image, but with no more frames; give images (--i2v), or use a model with "),
        (replace(CAUSAL, first_frame=True, layout=CausalLayout(3), frames=81),
         {"first_image": FRAME}, "first_image: 1 given frames of 21 must end where a block ends"),
        (IMAGE, {"first_image": FRAME, "last_image": FRAME}, "last_image: this model ends with no"),
        (BOTH_ENDS, {"first_image": FRAME}, "last_image: this model ends with an image, but none"),
        (BOTH_ENDS, {"first_image": FRAME, "last_image": FRAME, "frames": 1},
         "last_image: a clip of one latent frame has no last image to end with"),
        (CAUSAL, {"first_image": FRAME, "initial": FRAME}, "initial: this model begins with an im"),
        (replace(CAUSAL, layout=CausalLayout(3), frames=81), {"first_image": FRAME},
         "first_image: 1 given frames of 21 must end where a block ends"),
    ],
)  # fmt: skip
def test_a_model_says_what_its_clips_begin_and_end_with(
    model: Capabilities, given: dict[str, Any], said: str
) -> None:
    (line,) = problems(Request("a", **given), model)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (IMAGE, {"first_image": FRAME}),
        (EITHER, {}),
        (EITHER, {"first_image": FRAME}),
        (replace(CAUSAL, first_frame=True), {"first_image": FRAME}),
        (replace(CAUSAL, first_frame=True), {"initial": FRAME}),
        (BOTH_ENDS, {"first_image": FRAME, "last_image": FRAME}),
        (CAUSAL, {"first_image": FRAME}),
        (CAUSAL, {"initial": FRAME}),
    ],
)
def test_what_a_model_can_begin_with_is_no_problem(
    model: Capabilities, given: dict[str, Any]
) -> None:
    assert list(problems(Request("a", **given), model)) == []


# ---- memory


def test_absurd_lengths_are_refused_with_the_memory_that_they_would_take() -> None:
    (said,) = refused({"prompt": "a", "frames": 100001}, SMALL)
    assert said == (
        "frames: a clip of 100001 frames of 480 x 832 takes at least 446.3 GiB of memory, and this "
        "machine has 64.0 GiB; 464.9 GiB of GPU memory, and this machine has 80.0 GiB; ask for a "
        "shorter or a smaller one"
    )


def test_absurd_sizes_and_batches_are_refused_alike() -> None:
    (said,) = refused({"prompt": "a", "size": [160000, 160000]}, SMALL)
    assert said.startswith("size: a clip of 81 frames of 160000 x 160000 takes at least ")
    assert list(joint_problems(Request("a"), SMALL)) == []
    crowd = footprint_problem(Request("a"), SMALL, clips=10**4)
    assert crowd is not None
    assert crowd.startswith("a batch of 10000 clips of 81 frames of 480 x 832 takes at least ")


def test_the_cache_of_a_window_does_not_grow_with_the_clip() -> None:
    def needed(frames: int, window: int | None) -> int:
        layout = replace(BLOCKS, local_attn_size=window)
        made = Footprint(1536, 30, 2, Memory(64 * GIB, 80 * GIB))
        latents = 2 * 4 * 16 * frames * 60 * 104
        return (made.needed((16, frames, 60, 104), WAN, layout).device or 0) - latents

    assert needed(301, 21) == needed(31, 21)
    assert needed(301, None) > 9 * needed(31, None)


def test_ranks_that_share_a_clip_s_tokens_share_their_memory() -> None:
    alone = Footprint(1536, 30, 2, Memory(64 * GIB, 80 * GIB))
    shape = (16, 21, 60, 104)
    latents = 2 * 4 * 16 * 21 * 60 * 104
    one, four = (made.needed(shape, WAN, None) for made in (alone, replace(alone, context=4)))
    assert one.device is not None
    assert four.device is not None
    assert one.device - latents == 4 * (four.device - latents)
    assert one.host == four.host


# ---- equality


def test_equal_requests_are_equal_with_their_footage() -> None:
    rng = torch.Generator().manual_seed(0)
    frames = torch.rand(3, 1, 8, 8, generator=rng)
    one, same = (Request("a", first_image=Pixels(x)) for x in (frames, frames.clone()))
    other = Request("a", first_image=Pixels(1.0 - frames))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other


def test_the_noise_of_a_clip_depends_on_prompt_seed_and_sample_alone() -> None:
    assert Request("a b", 3, 1).noise_key == "3/1/a b"
    assert Request("a", 3, cfg_scale=2.0, frames=5).noise_key == Request("a", 3).noise_key


def test_requests_share_a_batch_unless_their_clips_differ_in_shape_or_sampling() -> None:
    base = Request("a")
    alike = [Request("b", 3, 1), Request("a", negative_prompt="b")]
    others = [{"size": (8, 8)}, {"frames": 1}, {"steps": 3}, {"cfg_scale": 2.0}, {"initial": FRAME}]
    assert {request.batch_key for request in alike} == {base.batch_key}
    assert all(replace(base, **o).batch_key != base.batch_key for o in others)  # type: ignore[arg-type]


# ---- flags, and a new field


def flags(*words: str, cls: type = Request) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    names = [name for name in schema(cls, TEACHER)["properties"] if name != "prompt"]
    add_flags(parser, cls, names)
    return parser.parse_args(words)


def test_flags_say_what_json_says() -> None:
    words = flags("--seed", "7", "--size", "48x64", "--cfg_scale", "2.5", "--negative_prompt", "5")
    body = {"prompt": "a", **from_words(Request, words)}
    assert body == {
        "prompt": "a", "seed": 7, "size": [48, 64], "cfg_scale": 2.5, "negative_prompt": "5",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seed", "abc"), "--seed: must be a whole number from 0 to 9007199254740991, got 'abc'"),
        (("--seed", "1e3"), "--seed: must be a whole number from 0 to 9007199254740991, got '1e3'"),
        (("--cfg_scale", "nan"), "--cfg_scale: must be a number from 0 to 100, got 'nan'"),
        (("--cfg_scale", "inf"), "--cfg_scale: must be a number from 0 to 100, got 'inf'"),
        (("--size", "48"), "--size: must be height and width in pixels, as [480, 832] or 480x832,"),
        (("--frames", "-4"), "--frames: must be a whole number from 1 to 1000000000, got -4"),
    ],
)
def test_bad_words_are_told_under_the_name_of_their_flag(words: tuple[str, ...], said: str) -> None:
    body = {"prompt": "a", **from_words(Request, flags(*(f"{w}" for w in words)))}
    with pytest.raises(RequestError) as caught:
        read_request(body, TEACHER, name_of=lambda name: f"--{name}")
    (line,) = caught.value.problems
    assert line.startswith(said)


@dataclass(frozen=True)
class Sounding(Request):
    """A request with one field more: this line is all that it takes."""

    volume: float | None = asked(Number(0.0, 1.0), "loudness of the sound", default=None)


def test_a_new_field_is_one_line_and_known_to_json_flags_and_schema() -> None:
    made = read_request({"prompt": "a", "volume": 0.5}, STUDENT, Sounding)
    assert made == Sounding("a", volume=0.5)
    with pytest.raises(RequestError, match="volume: must be a number from 0 to 1, got 2"):
        read_request({"prompt": "a", "volume": 2}, STUDENT, Sounding)
    with pytest.raises(RequestError, match="unknown field 'volum' "):
        read_request({"prompt": "a", "volum": 1}, STUDENT, Sounding)
    assert from_words(Sounding, flags("--volume", "0.25", cls=Sounding)) == {"volume": 0.25}
    assert schema(Sounding, STUDENT)["properties"]["volume"] == {
        "type": "number",
        "minimum": 0.0,
        "maximum": 1.0,
        "description": "loudness of the sound",
    }
    assert refused({"prompt": "a", "volume": 0.5}) == [
        "unknown field 'volume' (known are prompt, seed, sample, negative_prompt, size, frames, "
        "steps, cfg_scale)"
    ]


def test_a_schema_lists_what_the_model_takes_with_its_defaults() -> None:
    student, teacher = schema(Request, STUDENT), schema(Request, TEACHER)
    assert list(student["properties"]) == ["prompt", "seed", "sample", "size", "frames"]
    assert set(teacher["properties"]) - set(student["properties"]) == {
        "negative_prompt", "steps", "cfg_scale",
    }  # fmt: skip
    assert student["required"] == ["prompt"]
    assert student["properties"]["size"]["default"] == [480, 832]
    assert teacher["properties"]["cfg_scale"]["default"] == 5.0


def test_kinds_describe_what_they_parse() -> None:
    assert Text(5, empty=True).schema() == {"type": "string", "minLength": 0, "maxLength": 5}
    assert Text(5, empty=True).parse(" ") == ""
    assert PixelSize().word("48 x 64") == "48 x 64"


def test_images_are_fitted_as_the_models_release_does() -> None:
    assert (STUDENT.scale, EITHER.scale) == ("bicubic", "lanczos")
    spec = replace(WAN, spatial_stride=16)
    area = 704 * 1280
    assert replace(STUDENT, latent=spec).size_of_image((1080, 1920), area) == (704, 1280)
    assert replace(EITHER, latent=spec).size_of_image((1080, 1920), area) == (704, 1248)


def test_requests_with_and_without_an_image_do_not_share_a_batch() -> None:
    assert Request("a", first_image=FRAME).batch_key != Request("a").batch_key
