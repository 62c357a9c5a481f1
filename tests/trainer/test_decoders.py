"""Clips decoded by the tiny autoencoder: what they are, what is said of them, what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import demo
import inference
from model.encoders.tiny_vae import PreviewVAE, TinySizes, TinyVAE
from model.types import LatentSpec
from pipeline.request import Request
from scripts.make_tiny_world import NAME
from tests.commands import no_weights, own_logging, refusal
from tests.conftest import random_value
from tests.runs import write_config
from tests.trainer.test_plan import small_run
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.media.video import to_unit
from utils.web.jobs import JobQueue

__all__ = ["no_weights", "own_logging"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """A text-to-video model, and tiny autoencoders beside it."""

    config: Path
    weights: Path
    folder: Path
    tiny: Path  # of the model's latents

    def words(self, output: Path, *more: str) -> list[str]:
        return [
            "--config_path", str(self.config), "--checkpoint_path", str(self.weights),
            "--data_path", str(self.folder / "prompts.txt"), "--output_folder", str(output),
            "--num_output_frames", "2", *more,
        ]  # fmt: skip

    def preview(self, output: Path) -> list[str]:
        return self.words(output, "--vae", "tiny", "--tiny_vae", str(self.tiny))


def write_tiny(path: Path, channels: int = 16, patch: int = 1) -> Path:
    vae = TinyVAE(TinySizes(channels, patch, widths=(12, 8, 6, 6), encoder_width=6))
    torch.save({k: random_value(k, v.shape, 0) for k, v in vae.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    folder = tmp_path_factory.mktemp("previews")
    (folder / "prompts.txt").write_text("a red circle moves right\n", encoding="utf-8")
    config, weights = write_config(folder, tiny_root, "dmd"), tiny_root / "wan_models" / NAME
    return World(config, weights, folder, write_tiny(folder / "taew2_1.pth"))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_the_tiny_autoencoder_decodes_what_the_model_samples(world: World) -> None:
    source = check_source(load(world.config, []), world.weights, use_ema=False)
    full = load_generator(source, CPU)
    preview = load_generator(source, CPU, tiny_vae=world.tiny)
    request = Request("a red circle", frames=5)
    latents = full.latents([request])
    assert torch.equal(preview.latents([request]), latents)
    tiny = TinyVAE.load(world.tiny, torch.float32, source.model.latent)
    expected = to_unit(tiny.decode_to_pixel(latents))
    assert torch.equal(preview.clips([request]), expected)
    assert torch.equal(torch.cat([*preview.stream(request)], dim=1), expected[0])
    assert not torch.allclose(full.clips([request]), expected, atol=0.05)


def test_what_clips_begin_with_is_encoded_by_the_models_own_codec(world: World) -> None:
    source = check_source(load(world.config, []), world.weights, use_ema=False)
    full = load_generator(source, CPU)
    preview = load_generator(source, CPU, tiny_vae=world.tiny)
    assert isinstance(preview.vae, PreviewVAE)
    pixels = torch.rand(1, 3, 5, 32, 32) * 2.0 - 1.0
    expected = full.vae.encode_to_latent(pixels)
    assert torch.equal(preview.vae.encode_to_latent(pixels), expected)


def test_the_manifest_says_who_made_the_pixels(world: World, tmp_path: Path) -> None:
    full, preview = tmp_path / "full", tmp_path / "preview"
    assert inference.main(world.words(full)) == 0
    assert inference.main(world.preview(preview)) == 0
    told = [
        {key: read(folder / "manifest.json")[key] for key in ("vae", "tiny_vae_sha256")}
        for folder in (full, preview)
    ]
    digest = hashlib.sha256(world.tiny.read_bytes()).hexdigest()
    assert told == [
        {"vae": "full", "tiny_vae_sha256": None},
        {"vae": "tiny", "tiny_vae_sha256": digest},
    ]
    (one,), (other,) = ([*folder.glob("*.mp4")] for folder in (full, preview))
    assert one.name == other.name
    assert one.read_bytes() != other.read_bytes()


def test_a_folder_of_before_the_choice_goes_on_with_the_models_codec_alone(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    assert inference.main(world.words(clips)) == 0
    for name in ("settings.json", "manifest.json"):
        older = read(clips / name)
        assert older.pop("vae") == "full"
        del older["tiny_vae_sha256"]
        (clips / name).write_text(json.dumps(older), encoding="utf-8")
    assert inference.main(world.words(clips)) == 0
    assert read(clips / "manifest.json")["vae"] == "full"
    message = refusal(inference.main, world.preview(clips), capsys)
    assert f"--output_folder {clips}: holds clips of other settings (vae was full, is tiny" in (
        message
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["inference", "demo"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--vae", "tiny"),
            "--vae tiny: needs --tiny_vae, the file of taew2_1; or use --vae full",
        ),
        (("--tiny_vae", "{tiny}"), "--tiny_vae {tiny}: has no effect without --vae tiny"),
        (("--vae", "tiny", "--tiny_vae", "nowhere.pth"), "nowhere.pth: no such weight file"),
        (
            ("--vae", "tiny", "--tiny_vae", "{other}"),
            "{other}: a tiny autoencoder of 48 channels and strides of 4 frames and 16 pixels; the "
            "model's latents have 16 channels and strides of 4 frames and 8 pixels; take taew2_1 "
            "for Wan2.1 and A14B, or taew2_2 for TI2V-5B",
        ),
    ],
)
def test_a_decoder_that_cannot_be_is_refused_before_anything_is_read(
    command: str,
    words: tuple[str, ...],
    told: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    files = {"tiny": world.tiny, "other": write_tiny(tmp_path / "taew2_2.pth", 48, 2)}
    more = [word.format(**files) for word in words]
    if command == "inference":
        message = refusal(inference.main, world.words(tmp_path / "clips", *more), capsys)
    else:
        line = ["--config_path", str(world.config), "--checkpoint_path", str(world.weights)]
        message = refusal(demo.main, [*line, "--port", "0", *more], capsys)
    assert message == told.format(**files)
    assert not (tmp_path / "clips").exists()


def test_the_demo_decodes_with_the_tiny_autoencoder_and_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    load_it, make_app = demo.load_generator, demo.create_app

    def loading(*args: Any, **kwargs: Any) -> Any:
        asked["generator"] = load_it(*args, **kwargs)
        return asked["generator"]

    def making(queue: JobQueue[Request], about: demo.About, model: Any) -> Any:
        asked["status"] = make_app(queue, about, model).test_client().get("/api/status").json
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(demo, "load_generator", loading)
    monkeypatch.setattr(demo, "create_app", making)
    line = ["--config_path", str(world.config), "--checkpoint_path", str(world.weights)]
    more = ["--port", "0", "--vae", "tiny", "--tiny_vae", str(world.tiny)]
    assert demo.main([*line, *more]) == 130
    assert isinstance(asked["generator"].vae, PreviewVAE)
    assert asked["status"]["vae"] == "tiny"


@pytest.mark.slow  # traces of clips, and the real codec
def test_a_preview_is_planned_with_the_tiny_autoencoder(tmp_path: Path) -> None:
    small_run(tmp_path, "tiny")
    plans = []
    for vae in ("full", "tiny"):
        words = ["--config_path", str(tmp_path / "run.yaml"), "--plan", "--num_output_frames", "2"]
        out = tmp_path / f"{vae}.json"
        assert inference.main([*words, "--vae", vae, "--plan_json", str(out)]) == 0
        plans.append(read(out))
    full, tiny = plans
    assert {"codec", "tiny_vae"} & full["peak"]["encoders"].keys() == {"codec"}
    assert {"codec", "tiny_vae"} & tiny["peak"]["encoders"].keys() == {"tiny_vae"}
    assert tiny["peak"]["encoders"]["tiny_vae"] == pytest.approx(4 * (9_844_611 + 1_470_928))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        TinyVAE.outline(LatentSpec(16, 4, 8, (2, 2))).decode_to_pixel(torch.empty(1, 16, 2, 4, 4))
    flops = tiny["parts"]["decode"]["flops"]
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
