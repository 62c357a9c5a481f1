"""Model folders in both layouts: the same bits after any journey, loadable by diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from model.encoders.vae import WanVAEWrapper
from model.families.base import Export
from model.families.registry import open_model
from model.families.wan21.folder import CONFIG, IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, ModelFolder
from model.families.wan21.weights import find_weights, load_network
from model.folders.component import folder_config
from model.folders.loading import Placement
from model.folders.writing import write_shards
from model.wan.weights import to_diffusers
from tests.conftest import build_wan
from tests.folders import VAE, make_official, toy_config, umt5_state, vae_state
from tests.runs import unequal
from utils.tiny_world.codec import FILE_NAME
from utils.weights import WeightFile, WeightsError, write_weights

TYPES = ("t2v", "i2v", "flf2v")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """A release of each model type as it is published."""
    root = tmp_path_factory.mktemp("official")
    return {kind: make_official(root / kind, kind) for kind in TYPES}


@pytest.fixture(scope="module")
def twins(
    official: dict[str, ModelFolder], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ModelFolder]:
    """The same in diffusers' layout."""
    root = tmp_path_factory.mktemp("diffusers")
    return {kind: converted(folder, root / kind) for kind, folder in official.items()}


def converted(
    source: ModelFolder, target: Path, layout: str = "diffusers", **changes: Any
) -> ModelFolder:
    """`source` written to `target` in a layout."""
    weights = find_weights(source.path)
    open_model(source.path).export(Export(weights, layout, **changes), target)
    return ModelFolder(target)


def image_encoder(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The CLIP encoder of a model that sees images."""
    return open_model(folder.path).load_image_encoder(dtype)


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    file = WeightFile(path)
    return {name: file.read(name) for name in file.shapes()}


def all_tensors(folder: ModelFolder) -> dict[str, Tensor]:
    """All tensors of an official folder, by file and name."""
    files = {"": folder.weights, VAE: folder.vae, TEXT_ENCODER: folder.text_encoder}
    files |= {IMAGE_ENCODER: folder.image_encoder}
    return {
        f"{name}/{key}": value
        for name, path in files.items()
        if path is not None
        for key, value in tensors(path).items()
    }


# ---- journeys


@pytest.mark.parametrize("kind", TYPES)
def test_a_release_comes_back_from_diffusers_layout_bit_for_bit(
    kind: str,
    official: dict[str, ModelFolder],
    twins: dict[str, ModelFolder],
    tmp_path: Path,
) -> None:
    back = converted(twins[kind], tmp_path / "back", "official")
    found, expected = all_tensors(back), all_tensors(official[kind])
    dropped = {name for name in expected if name.endswith(("/visual.head", "/log_scale"))}
    dropped |= {name for name in expected if "/textual." in name}  # CLIP's other half
    assert len(dropped) == (0 if kind == "t2v" else 3)
    assert unequal(found, {k: v for k, v in expected.items() if k not in dropped}) == []
    assert back.wan_config() == official[kind].wan_config()
    assert {value.dtype for value in found.values()} >= {torch.float32, torch.bfloat16}
    open_model(back.path).check()


@pytest.mark.parametrize("kind", TYPES)
def test_a_diffusers_folder_holds_what_ours_and_theirs_need(
    kind: str, twins: dict[str, ModelFolder], official: dict[str, ModelFolder]
) -> None:
    folder = twins[kind]
    open_model(folder.path).check()
    assert folder.config == folder.path / "transformer" / "config.json"
    assert folder.wan_config() == official[kind].wan_config()
    index = json.loads((folder.path / "model_index.json").read_text(encoding="utf-8"))
    parts = {name for name in index if not name.startswith("_")}
    assert parts == {path.name for path in folder.path.iterdir() if path.is_dir()}
    expected = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    expected |= set() if kind == "t2v" else {"image_encoder", "image_processor"}
    assert parts == expected


def test_transformer_weights_get_diffusers_names_and_nothing_else_changes(
    official: dict[str, ModelFolder], twins: dict[str, ModelFolder]
) -> None:
    source = official["flf2v"].weights
    assert source is not None
    expected = {to_diffusers(name): value for name, value in tensors(source).items()}
    stored = load_file(twins["flf2v"].path / "transformer/diffusion_pytorch_model.safetensors")
    assert unequal(stored, expected) == []


def test_a_folder_copied_in_its_own_layout_keeps_its_encoders_to_the_byte(
    official: dict[str, ModelFolder], twins: dict[str, ModelFolder], tmp_path: Path
) -> None:
    for source, layout in ((official["i2v"], "official"), (twins["i2v"], "diffusers")):
        copy = converted(source, tmp_path / layout, layout)
        files = {p.relative_to(source.path) for p in source.path.rglob("*") if p.is_file()}
        others = {p for p in files if not p.name.startswith("diffusion_pytorch_model")}
        others = {p for p in others if p not in (Path(CONFIG), Path("transformer", CONFIG))}
        assert len(others) >= 4
        for name in others:
            assert (copy.path / name).read_bytes() == (source.path / name).read_bytes(), name


def test_a_dtype_rounds_the_transformer_alone(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    found = all_tensors(
        converted(official["t2v"], tmp_path / "half", "official", dtype=torch.bfloat16)
    )
    expected = {
        name: value.bfloat16() if name.startswith("/") else value
        for name, value in all_tensors(official["t2v"]).items()
    }
    assert unequal(found, expected) == []


def test_the_tiny_worlds_codec_is_copied_as_it_is(tiny_root: Path, tmp_path: Path) -> None:
    source = ModelFolder(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    copy = converted(source, tmp_path / "copy", "official")
    assert (copy.path / FILE_NAME).read_bytes() == (source.path / FILE_NAME).read_bytes()
    open_model(copy.path).check()


# ---- diffusers reads it


@torch.no_grad()
def difference(pipeline: Any, folder: ModelFolder) -> float:
    """Between the transformer of a diffusers pipeline and ours of the same folder."""
    config, rng = folder.wan_config(), torch.Generator().manual_seed(0)
    ours = load_network(config, find_weights(folder.path), Placement(CPU), what="a test").model
    x = torch.randn(1, config.in_dim, 3, 4, 6, generator=rng)
    text = torch.randn(1, config.text_len, config.text_dim, generator=rng)
    clip = torch.randn(1, config.image_tokens, config.image_dim, generator=rng)
    timestep, seen = torch.tensor([700.0]), clip if config.reads_clip else None
    theirs = pipeline.transformer.eval()(x, timestep, text, seen, return_dict=False)[0]
    assert theirs.std() > 0.1
    return float((ours(x, timestep[:, None], text, seen) - theirs).abs().max())


@torch.no_grad()
def test_wan_pipeline_loads_the_folder_and_computes_what_we_compute(
    twins: dict[str, ModelFolder],
) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    folder = twins["t2v"]
    pipeline = WanPipeline.from_pretrained(folder.path)
    error = difference(pipeline, folder)
    print(f"WanPipeline's transformer against ours: max abs difference {error:.1e}")
    assert error < 2e-5
    prompt = "a red dog runs on the beach"
    theirs = pipeline._get_t5_prompt_embeds([prompt], max_sequence_length=32)
    ours = open_model(folder.path).load_text_encoder(torch.bfloat16)([prompt])
    assert torch.equal(ours, theirs.to(ours.dtype))
    latents = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    vae = WanVAEWrapper.load(folder.path / "vae", torch.float32)
    expected = pipeline.vae.decode(latents * vae.std + vae.mean).sample
    assert (vae.decode_to_pixel(latents) - expected).abs().max() < 1e-5
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    assert pipeline.scheduler.config.use_flow_sigmas
    assert pipeline.scheduler.config.flow_shift == 3.0


@torch.no_grad()
def test_wan_image_to_video_pipeline_loads_the_folder_and_computes_what_we_compute(
    twins: dict[str, ModelFolder],
) -> None:
    from diffusers import WanImageToVideoPipeline

    folder = twins["i2v"]
    pipeline = WanImageToVideoPipeline.from_pretrained(folder.path)
    error = difference(pipeline, folder)
    print(f"WanImageToVideoPipeline's transformer against ours: max abs difference {error:.1e}")
    assert error < 2e-5
    images = 2.0 * torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)) - 1.0
    pixels = (127.5 * (images[0] + 1.0)).round().byte().permute(1, 2, 0).numpy()
    theirs = pipeline.encode_image(pixels, torch.device("cpu"))
    ours = image_encoder(folder, torch.float16)(images)
    assert ours.shape == (1, 5, 160)
    # Theirs went through 8 bits per channel; the encoder's weights are fp16.
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_a_first_last_frame_folder_makes_videos_in_diffusers(twins: dict[str, ModelFolder]) -> None:
    from diffusers import WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline.from_pretrained(twins["flf2v"].path)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))
    first, last = (np.full((32, 48, 3), grey, dtype=np.uint8) for grey in (64, 192))
    images = [Image.fromarray(pixels) for pixels in (first, last)]
    frames = pipeline(
        images[0],
        last_image=images[1],
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert frames.shape == (1, 5, 3, 32, 48)
    assert frames.isfinite().all()


def test_the_image_processor_squeezes_whole_images_as_wan_does(
    twins: dict[str, ModelFolder],
) -> None:
    path = twins["i2v"].path / "image_processor" / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["size"] == {"height": 28, "width": 28}
    assert not values["do_center_crop"]


def test_the_text_encoder_is_stored_in_the_precision_of_the_release(
    twins: dict[str, ModelFolder],
) -> None:
    folder = twins["t2v"].path / "text_encoder"
    assert folder_config(folder, "UMT5EncoderModel")["dtype"] == "bfloat16"
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_the_image_encoder_is_named_as_both_generations_of_transformers_read_it(
    twins: dict[str, ModelFolder],
) -> None:
    from transformers import CLIPVisionModel

    stored = load_file(twins["i2v"].path / "image_encoder" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in stored)
    _, report = CLIPVisionModel.from_pretrained(
        twins["i2v"].path / "image_encoder", output_loading_info=True
    )
    assert not any(report.values())


def test_the_published_tokenizer_is_named_by_its_fast_class(tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    folder = make_official(tmp_path / "source")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(str(folder.path / TOKENIZER))
    twin = converted(folder, tmp_path / "twin")
    index = json.loads((twin.path / "model_index.json").read_text(encoding="utf-8"))
    assert index["tokenizer"] == ["transformers", "T5TokenizerFast"]


def test_an_image_encoder_with_its_projection_is_the_same_encoder(
    twins: dict[str, ModelFolder], official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    folder = converted(twins["i2v"], tmp_path / "projected")
    encoder = folder.path / "image_encoder"
    config = json.loads((encoder / CONFIG).read_text(encoding="utf-8"))
    config["architectures"] = ["CLIPVisionModelWithProjection"]
    (encoder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    state = {**load_file(encoder / "model.safetensors"), "visual_projection.weight": torch.ones(2)}
    write_weights(state, encoder / "model.safetensors", {})
    images = torch.zeros(1, 3, 28, 28)
    states = [image_encoder(f, torch.float32)(images) for f in (folder, official["i2v"])]
    assert torch.equal(*states)
    back = all_tensors(converted(folder, tmp_path / "back", "official"))
    assert not any("visual_projection" in name for name in back)


# ---- shards


def test_shards_stay_below_their_limit_and_are_found_through_the_index(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    folder = converted(official["t2v"], tmp_path / "out", max_shard_bytes=40_000)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        files = sorted((folder.path / part).glob("*.safetensors"))
        count = len(files)
        assert count > 2
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        assert [file.name for file in files] == names
        for file in files:
            held = load_file(file)
            assert len(held) == 1 or sum(v.nbytes for v in held.values()) <= 40_000
    back = converted(folder, tmp_path / "back", "official")
    assert unequal(all_tensors(back), all_tensors(official["t2v"])) == []


def test_a_shard_is_on_disk_before_the_next_one_is_read(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):  # two fit into a shard
            assert len(list(tmp_path.glob("*.safetensors"))) == max(0, number - 1) // 2
            yield f"w{number}", torch.full((250,), float(number))

    write_shards(stream(), tmp_path, "model", 2000, {})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 6000}
    assert index["weight_map"]["w3"] == "model-00002-of-00003.safetensors"
    found = tensors(tmp_path / "model.safetensors.index.json")
    assert [float(found[f"w{i}"][0]) for i in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


# ---- whole or not at all


class Breaking:
    """Weights whose source fails in the middle."""

    def __init__(self, folder: ModelFolder, after: int) -> None:
        self.path = folder.path
        self._weights = find_weights(folder.path)
        self._left = after

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._weights.shapes()

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        self._left -= 1
        if self._left < 0:
            raise OSError("the disk went away")
        return self._weights.read(name, rows)


def test_an_interrupted_call_leaves_nothing(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    export = Export(Breaking(official["t2v"], 30), "official", None, 10_000)
    with pytest.raises(OSError, match="the disk went away"):
        open_model(official["t2v"].path).export(export, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_call_left_is_cleared_by_the_next(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    (tmp_path / ".out.part" / "vae").mkdir(parents=True)
    (tmp_path / ".out.part" / "half").write_text("half", encoding="utf-8")
    converted(official["t2v"], tmp_path / "out", "official")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()


def test_an_empty_folder_is_filled_and_any_other_is_refused(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    converted(official["t2v"], tmp_path / "empty")
    for target in (tmp_path / "empty", official["t2v"].path / CONFIG):
        with pytest.raises(FileExistsError) as caught:
            converted(official["t2v"], target)
        assert str(caught.value) == f"{target}: is there already; give a new or an empty folder"


# ---- what cannot be


def test_tiny_models_have_no_folder_for_diffusers(tiny_root: Path, tmp_path: Path) -> None:
    source = ModelFolder(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    with pytest.raises(ValueError) as caught:
        converted(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{source.path}: no folder for diffusers: diffusers has no transformer with absolute "
        "positions (the tiny models)"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_tiny_worlds_codec_has_no_place_in_diffusers_layout(
    tiny_root: Path, tmp_path: Path
) -> None:
    source = make_official(tmp_path / "source")
    (source.path / VAE).unlink()
    codec = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny" / FILE_NAME
    (source.path / FILE_NAME).write_bytes(codec.read_bytes())
    with pytest.raises(ValueError, match=f"{FILE_NAME}: this codec is no VAE of diffusers'"):
        converted(source, tmp_path / "out")


def test_weights_of_another_size_are_refused_before_anything_is_written(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    write_weights(build_wan(toy_config("i2v")).state_dict(), tmp_path / "i2v.safetensors", {})
    weights = find_weights(tmp_path / "i2v.safetensors")
    with pytest.raises(WeightsError, match=f"does not fit the transformer of {tmp_path.anchor}"):
        open_model(official["t2v"].path).export(Export(weights, "official"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", [VAE, TEXT_ENCODER, IMAGE_ENCODER, TOKENIZER])
def test_a_source_that_lacks_a_part_is_refused(lost: str, tmp_path: Path) -> None:
    folder = make_official(tmp_path / "source", "i2v")
    (folder.path / lost).rename(tmp_path / "lost")
    with pytest.raises(FileNotFoundError) as caught:
        converted(folder, tmp_path / "out")
    assert f"missing {lost} or " in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "state"), [(VAE, umt5_state(8, 16)), (TEXT_ENCODER, vae_state(base_dim=4))]
)
def test_a_part_of_another_kind_is_refused_and_nothing_is_left(
    part: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = make_official(tmp_path / "source")
    torch.save(state, folder.path / part)
    with pytest.raises(WeightsError, match=part):
        converted(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
