"""A loaded model: what a request asks for is what is made, whoever asks, and progress is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.fields import RequestError
from pipeline.generator import VideoGenerator
from pipeline.protocol import Progress
from pipeline.request import Pixels, Request
from tests.folders import make_official
from tests.runs import write_config
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.media.video import to_unit

PROMPTS = ("a red circle moves right", "a green bar moves up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generators")


def loaded(folder: Path, root: Path, name: str, *overrides: str) -> VideoGenerator:
    """A miniature of random weights behind the pipeline of a method."""
    config = load(write_config(folder, root, name), overrides)
    source = check_source(config, root / "wan_models" / "Wan2.1-T2V-Tiny", use_ema=False)
    return load_generator(source, torch.device("cpu"))


@pytest.fixture(scope="module")
def student(folder: Path, tiny_root: Path) -> VideoGenerator:
    return loaded(folder, tiny_root, "dmd")


@pytest.fixture(scope="module")
def teacher(folder: Path, tiny_root: Path) -> VideoGenerator:
    return loaded(folder, tiny_root, "diffusion", "data.negative_prompt=a blue triangle")


@pytest.fixture(scope="module")
def causal(folder: Path, tiny_root: Path) -> VideoGenerator:
    return loaded(folder, tiny_root, "self_forcing_dmd")


def test_equal_requests_give_equal_latents_in_any_company_and_order(
    student: VideoGenerator,
) -> None:
    one, other = (Request(prompt, 3) for prompt in PROMPTS)
    together, reverse = student.latents([one, other]), student.latents([other, one])
    alone = student.latents([one])
    torch.testing.assert_close(together[:1], alone)
    torch.testing.assert_close(reverse.flip(0), together)
    assert torch.equal(student.latents([one]), alone)


def test_each_row_of_a_batch_has_its_own_negative_prompt(teacher: VideoGenerator) -> None:
    base = Request(PROMPTS[0], 3)
    own = replace(base, negative_prompt="a green bar")
    same = replace(base, negative_prompt="a blue triangle")
    none = replace(base, negative_prompt="")
    made = teacher.latents([base, own, same, none])
    assert torch.equal(made[0], made[2])  # the configured one, said aloud
    assert float((made[0] - made[1]).abs().mean()) > 1e-3
    assert float((made[1] - made[3]).abs().mean()) > 1e-3
    torch.testing.assert_close(made[1:2], teacher.latents([own]))


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("data.negative_prompt=a green bar", {"negative_prompt": "a green bar"}),
        ("sampling.steps=3", {"steps": 3}),
        ("sampling.cfg_scale=1.5", {"cfg_scale": 1.5}),
        ("latent_shape=[16,3,4,4]", {"frames": 9}),
        ("latent_shape=[16,5,6,8]", {"size": (48, 64)}),
    ],
)
@pytest.mark.parametrize("method", ["diffusion", "causal_diffusion"])
def test_what_a_request_asks_for_equals_what_a_configuration_says(
    method: str, setting: str, wanted: dict[str, object], folder: Path, tiny_root: Path
) -> None:
    request = Request(PROMPTS[0], 3)
    configured = loaded(folder, tiny_root, method, setting).latents([request])
    plain = loaded(folder, tiny_root, method)
    asked = plain.latents([replace(request, **wanted)])  # type: ignore[arg-type]
    assert torch.equal(asked, configured)
    usual = plain.latents([request])
    assert usual.shape != asked.shape or not torch.equal(usual, asked)


def test_guidance_off_halves_the_network_evaluations(teacher: VideoGenerator) -> None:
    assert teacher.network_evaluations(Request("a")) == 4
    assert teacher.network_evaluations(Request("a", cfg_scale=1.0, steps=3)) == 3


def test_a_student_refuses_what_it_cannot_do_in_a_line_each(student: VideoGenerator) -> None:
    with pytest.raises(RequestError) as caught:
        student.latents([Request("a", steps=3, cfg_scale=2.0), Request("b", steps=3, frames=2)])
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "steps", "cfg_scale", "frames",
    ]  # fmt: skip


def test_requests_of_several_batches_are_refused_together(student: VideoGenerator) -> None:
    with pytest.raises(AssertionError, match="must have one size, length and sampling"):
        student.latents([Request("a"), Request("b", frames=1)])


# ---- progress


def test_progress_is_told_for_each_step_and_each_decoded_frame(student: VideoGenerator) -> None:
    told: list[Progress] = []
    student.clips([Request(p) for p in PROMPTS], on_progress=told.append)
    assert told == [
        *(Progress("denoise", i, 4) for i in range(1, 5)),
        *(Progress("decode", i, 10) for i in range(1, 11)),
    ]


def test_a_stream_tells_of_each_block_before_the_next_is_begun(causal: VideoGenerator) -> None:
    told: list[Progress] = []
    pieces = list(causal.stream(Request(PROMPTS[0]), on_progress=told.append))
    assert [piece.shape[1] for piece in pieces] == [1, 8, 8]
    blocks = [(0, 1), (4, 3), (8, 5)]
    assert told == [
        news
        for before, frames in blocks
        for news in (
            *(Progress("denoise", before + i, 12) for i in range(1, 5)),
            Progress("decode", frames, 5),
        )
    ]


def test_a_stream_is_the_whole_clip(causal: VideoGenerator) -> None:
    request = Request(PROMPTS[0], 5)
    whole = causal.clips([request])[0]
    assert torch.equal(torch.cat(list(causal.stream(request)), dim=1), whole)


def test_decoding_frame_by_frame_equals_decoding_at_once_bit_for_bit(tmp_path: Path) -> None:
    release = make_official(tmp_path / "release")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
trainer: score_distillation
generator: {{model: {release.path}, lr: 1.0e-5}}
data: {{path: unused}}
latent_shape: [16, 3, 4, 6]
steps: 1
batch_size: 1
""",
        encoding="utf-8",
    )
    config = load(path)
    source = check_source(config, release.path, use_ema=False)
    model = load_generator(source, torch.device("cpu"))
    requests = [Request("a red dog", 3), Request("a blue cat", 4)]
    latents = model.latents(requests)
    at_once = torch.cat([to_unit(model.vae.decode_to_pixel(row)) for row in latents.split(1)])
    assert at_once.std() > 0.1
    assert torch.equal(model.clips(requests), at_once)


# ---- what clips begin with


def frames(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(3, count, 32, 32, generator=rng) * 2.0 - 1.0


def test_frames_that_many_clips_continue_are_encoded_once(
    causal: VideoGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = type(causal.vae).encode_to_latent, []

    def counted(vae: object, pixels: Tensor) -> Tensor:
        calls.append(pixels.shape)
        return encode(vae, pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(type(causal.vae), "encode_to_latent", counted)
    start = Pixels(frames(9))
    for prompt in PROMPTS:
        made = causal.latents([Request(prompt, initial=start), Request(prompt, 1, initial=start)])
        assert torch.equal(made[0, :, :3], made[1, :, :3])
        assert not torch.equal(made[0, :, 3:], made[1, :, 3:])
    assert calls == [(1, 3, 9, 32, 32)]


def test_clips_of_one_batch_begin_with_images_of_their_own(causal: VideoGenerator) -> None:
    requests = [Request(PROMPTS[0], first_image=Pixels(frames(1, seed))) for seed in (0, 1)]
    made = causal.latents(requests)
    expected = [causal.vae.encode_to_latent(frames(1, seed)[None])[0] for seed in (0, 1)]
    assert torch.equal(made[:, :, :1], torch.stack(expected))
