"""Commands on a model that makes clips with and without an image (TI2V)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import demo
import inference
from model.families.registry import open_model
from pipeline.generator import VideoGenerator
from pipeline.request import Pixels, Request
from scripts import compute_vae_latent, generate_ode_pairs
from scripts.make_tiny_world import TI2V_LATENTS, TI2V_NAME
from tests.commands import no_weights, own_logging, refusal
from tests.runs import refusal as run_refusal
from tests.runs import rows, run, write_config
from tests.videos import make_video
from trainer.config import load
from trainer.serving import capabilities, check_source, load_generator
from utils.data.captioned_clips import clip_files, read_encoded_clips
from utils.data.dataset import TrajectoryManifest
from utils.data.shards import ShardReader
from utils.media.images import fit, to_signed
from utils.records import read_manifest

__all__ = ["no_weights", "own_logging"]

CPU = torch.device("cpu")
MODEL = (f"generator.model={TI2V_NAME}", "latent_shape=[48,5,2,2]")
CAPTION = "a red circle moves right quickly on a dark floor"


def folder_of(root: Path) -> Path:
    return root / "wan_models" / TI2V_NAME


def loaded(folder: Path, root: Path, method: str, *more: str) -> VideoGenerator:
    """A miniature of random weights behind the pipeline of a method."""
    config = load(write_config(folder, root, method), (*MODEL, *more))
    return load_generator(check_source(config, folder_of(root), use_ema=False), CPU)


@pytest.fixture(scope="module", params=["dmd", "diffusion", "self_forcing_dmd"])
def generator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_root: Path
) -> VideoGenerator:
    return loaded(tmp_path_factory.mktemp("generators"), tiny_root, request.param)


def image(seed: int) -> torch.Tensor:
    """[3, 1, 32, 32] in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    return 2.0 * torch.rand(3, 1, 32, 32, generator=rng) - 1.0


# ---- a loaded model


def test_frame_0_is_the_encoded_image_to_the_bit(generator: VideoGenerator) -> None:
    requests = [Request(CAPTION, first_image=Pixels(image(seed))) for seed in (0, 1)]
    made = generator.latents(requests)
    expected = [generator.vae.encode_to_latent(image(seed)[None]) for seed in (0, 1)]
    assert torch.equal(made[:, :, :1], torch.cat(expected))
    assert not torch.equal(made[:1, :, 1:], made[1:, :, 1:])


def test_without_an_image_clips_come_from_text_alone(generator: VideoGenerator) -> None:
    plain = generator.latents([Request(CAPTION)])
    begun = generator.latents([Request(CAPTION, first_image=Pixels(image(0)))])
    assert plain.shape == begun.shape
    assert not torch.equal(plain[:, :, :1], begun[:, :, :1])


def test_an_image_takes_no_network_evaluation(generator: VideoGenerator) -> None:
    assert generator.capabilities.images == 0
    assert generator.capabilities.first_frame
    assert not generator.encoder.reads_images


# ---- inference.py


def pairs(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32), (90, 40))) -> Path:
    """Images of some sizes, each with its text."""
    folder.mkdir()
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        iio.imwrite(folder / f"{i}.png", pixels)
        (folder / f"{i}.txt").write_text(f"{CAPTION} {i}\n", encoding="utf-8")
    return folder


def line(tmp_path: Path, root: Path, data: Path, *more: str, method: str = "dmd") -> list[str]:
    """A call of inference.py into `tmp_path`/clips."""
    config = write_config(tmp_path, root, method)
    return [
        "--config_path", str(config), "--checkpoint_path", str(folder_of(root)),
        "--data_path", str(data), "--output_folder", str(tmp_path / "clips"), *more, *MODEL,
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["dmd", "self_forcing_dmd"])
def test_clips_begin_with_images_or_with_none(method: str, tiny_root: Path, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs")
    for name, more in (("with", ("--i2v",)), ("without", ())):
        (tmp_path / name).mkdir()
        words = line(tmp_path / name, tiny_root, data, *more, method=method)
        assert inference.main(words) == 0
    told = {
        name: json.loads((tmp_path / name / "clips" / "manifest.json").read_text(encoding="utf-8"))
        for name in ("with", "without")
    }
    assert [len(clip["images"]) for clip in told["with"]["clips"]] == [1, 1]
    assert [len(clip["images"]) for clip in told["without"]["clips"]] == [0, 0]
    assert {told[name]["fps"] for name in told} == {24.0}
    clips = [sorted((tmp_path / name / "clips").glob("*.mp4")) for name in told]
    assert all(len(found) == 2 for found in clips)
    digests = [[hashlib.sha256(p.read_bytes()).hexdigest() for p in found] for found in clips]
    assert not set(digests[0]) & set(digests[1])
    assert iio.immeta(clips[0][0])["fps"] == 24.0


def test_clips_take_their_images_aspect_by_the_releases_rule(
    tiny_root: Path, tmp_path: Path
) -> None:
    data = pairs(tmp_path / "pairs", [(32, 32), (96, 40), (40, 96)])
    words = line(tmp_path, tiny_root, data, "--i2v", "--image_size", "aspect", "--size", "64x64")
    plan = inference.prepare(inference.parser().parse_intermixed_args(words))
    latent = plan.source.model.latent
    assert latent.pixel_step == (16, 16)
    shapes = [(32, 32), (96, 40), (40, 96)]
    assert [job.size for job in plan.jobs] == [latent.size_of_image(s, 64 * 64) for s in shapes]
    assert {job.request.first_image.scale for job in plan.jobs} == {"lanczos"}  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_weights")
def test_what_was_always_trained_with_images_is_not_begun_without(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(tmp_path, tiny_root, tiny_root / "data" / "tiny" / "prompts.txt")
    assert refusal(inference.main, [*words, "data.image_share=1"], capsys) == (
        "--i2v: this model was trained to begin all its clips with an image; give images, or set "
        "data.image_share=null"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_whole_clip_continues_no_video(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(tmp_path, tiny_root, tiny_root / "data" / "tiny" / "prompts.txt")
    assert refusal(inference.main, [*words, "--initial_path", "x.mp4"], capsys) == (
        "--initial_path: this model makes whole clips, which may begin with an image, but with no "
        "more frames; give images (--i2v), or use a model with generator_type: causal"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_clip_of_its_image_alone_is_refused(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(tmp_path, tiny_root, pairs(tmp_path / "pairs"), "--i2v", "--frames", "1")
    said = refusal(inference.main, words, capsys)
    assert said == "--i2v: a clip of one latent frame is its image, and leaves none to make"


def test_the_demo_serves_it_from_text(tiny_root: Path, tmp_path: Path) -> None:
    config = load(write_config(tmp_path, tiny_root, "dmd"), MODEL)
    source = check_source(config, folder_of(tiny_root), use_ema=False)
    demo.check_model(capabilities(source.run, CPU), source.model.path)
    assert source.model.fps == 24.0


# ---- ODE pairs


def ode_words(tmp_path: Path, root: Path, *more: str) -> list[str]:
    config = write_config(tmp_path, root, "diffusion")
    return [
        "--config_path", str(config), "--checkpoint_path", str(folder_of(root)),
        "--caption_path", str(root / "data" / "tiny" / TI2V_LATENTS),
        "--output_folder", str(tmp_path / "pairs"), "--num_pairs", "3", "--batch_size", "2",
        "--steps", "8", *more, *MODEL,
    ]  # fmt: skip


def test_pairs_begin_with_images_at_every_level_and_train(tiny_root: Path, tmp_path: Path) -> None:
    made = tmp_path / "pairs"
    assert generate_ode_pairs.main(ode_words(tmp_path, tiny_root, "--i2v")) == 0
    manifest, reader = read_manifest(made, TrajectoryManifest), ShardReader(made)
    assert manifest is not None
    assert manifest.images
    codec = open_model(folder_of(tiny_root)).load_codec(CPU, torch.float32)
    for i in range(3):
        states, frame = reader.trajectory(i), reader.image(i)
        first = codec.encode_to_latent(to_signed(frame)[None, :, None])[0]
        assert states.shape == (5, 48, 5, 2, 2)
        for state in states:  # stored in half precision
            torch.testing.assert_close(state[:, :1], first.half().float(), rtol=0.0, atol=0.0)
        assert not torch.equal(states[0, :, 1:], states[-1, :, 1:])
    del reader  # a process may open shards only once
    config = write_config(tmp_path, tiny_root, "ode")
    words = (*MODEL, f"data.path={made}", "steps=2", "batch_size=2")
    assert len(rows(run(config, tmp_path / "run", *words, "data.image_share=1"))) == 2
    assert run_refusal(config, tmp_path / "other", *words) == (
        f"data.path: the ODE pairs in {made} were made with data.image_share 1.0, here 0.0; set "
        f"the same, or make pairs of your own with scripts/generate_ode_pairs.py"
    )


def test_pairs_without_images_are_those_of_text(tiny_root: Path, tmp_path: Path) -> None:
    assert generate_ode_pairs.main(ode_words(tmp_path, tiny_root)) == 0
    text = (tmp_path / "pairs" / "manifest.json").read_text(encoding="utf-8")
    assert "images" not in json.loads(text)  # as before there were such models
    config = write_config(tmp_path, tiny_root, "ode")
    words = (*MODEL, f"data.path={tmp_path / 'pairs'}", "steps=1", "batch_size=2")
    assert len(rows(run(config, tmp_path / "run", *words))) == 1


def test_interrupted_pairs_of_an_older_version_are_gone_on_with(
    tiny_root: Path, tmp_path: Path
) -> None:
    assert generate_ode_pairs.main(ode_words(tmp_path, tiny_root)) == 0
    path = tmp_path / "pairs" / "manifest.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    known.pop("images", None)
    path.write_text(json.dumps(known), encoding="utf-8")
    assert generate_ode_pairs.main(ode_words(tmp_path, tiny_root)) == 0


@pytest.mark.usefixtures("no_weights")
def test_pairs_of_a_text_model_begin_with_no_images(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    changed = {
        str(folder_of(tiny_root)): str(other),
        MODEL[0]: "generator.model=Wan2.1-T2V-Tiny",
        MODEL[1]: "latent_shape=[16,5,4,4]",
    }
    words = [changed.get(word, word) for word in ode_words(tmp_path, tiny_root, "--i2v")]
    assert refusal(generate_ode_pairs.main, words, capsys) == (
        f"--i2v: {other} makes clips from text alone; leave it out, or use a model that begins "
        f"with images"
    )


# ---- videos to latents


def test_videos_become_latents_of_stride_16_at_24_frames_per_second(
    tiny_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mp4", frames=60)
    (tmp_path / "videos" / "a.txt").write_text(CAPTION, encoding="utf-8")
    words = [
        "--input_video_folder", str(tmp_path / "videos"), "--model_name", TI2V_NAME,
        "--output_latent_folder", str(tmp_path / "latents"),
        "--model_root", str(tiny_root / "wan_models"), "--height", "32", "--width", "48",
        "--num_frames", "9", "--min_source_fps", "0",
    ]  # fmt: skip
    assert compute_vae_latent.main(words) == 0
    (path,) = clip_files(tmp_path / "latents")
    (clip,) = read_encoded_clips(path)
    assert clip.latents.shape == (48, 3, 2, 3)
    assert clip.fps == 24.0
    assert clip.first_frame is not None
    assert clip.first_frame.shape == (3, 32, 48)
    codec = open_model(folder_of(tiny_root)).load_codec(CPU, torch.float32)
    frame = to_signed(fit(clip.first_frame, (32, 48)))[None, :, None]
    assert torch.equal(clip.latents[:, :1], codec.encode_to_latent(frame)[0].half())


def test_sides_that_stride_16_does_not_divide_are_refused(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--input_video_folder", str(tmp_path), "--model_name", TI2V_NAME,
        "--output_latent_folder", str(tmp_path / "latents"),
        "--model_root", str(tiny_root / "wan_models"), "--height", "40", "--width", "32",
    ]  # fmt: skip
    said = refusal(compute_vae_latent.main, words, capsys)
    assert said == "40 x 32: both sides must be multiples of 16 up to 8192"
