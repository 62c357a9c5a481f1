"""Folders of Wan2.2 in both layouts: what is found where, and the same bits after any journey."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.families.base import Advice, Experts, Export, ImageSpec, Model
from model.families.registry import find_model, open_model
from model.families.wan21 import Wan21
from model.families.wan21.folder import CONFIG, TEXT_ENCODER, VAE22_FILE, ModelFolder
from model.types import LatentSpec, Side
from model.wan.config import PRESETS, diffusers_config, read_wan_config, write_wan_config
from model.wan.weights import to_diffusers
from tests.folders import (
    VAE,
    expert_config,
    make_diffusers,
    make_experts,
    make_official,
    toy_config,
)
from utils.errors import UserError
from utils.weights import WeightFile, WeightsError, write_weights

KINDS = ("ti2v", "t2v", "i2v")  # TI2V-5B; A14B of text, and of images
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """A release of each kind as it is published."""
    root = tmp_path_factory.mktemp("official22")
    experts = {kind: make_experts(root / kind, kind) for kind in ("t2v", "i2v")}
    return {"ti2v": make_official(root / "ti2v", "ti2v"), **experts}


@pytest.fixture(scope="module")
def twins(
    official: dict[str, ModelFolder], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ModelFolder]:
    """The same in diffusers' layout."""
    root = tmp_path_factory.mktemp("diffusers22")
    return {kind: make_diffusers(root / kind, folder) for kind, folder in official.items()}


def exported(source: Path, target: Path, layout: str, **changes: Any) -> Model:
    """The model at `source` written to `target` in a layout."""
    model = open_model(source)
    model.export(Export(model.find_weights(), layout, **changes), target)
    return open_model(target)


def hashes(path: Path) -> dict[str, str]:
    """The sha256 of each tensor in a weight file or behind an index, with its dtype and shape."""
    held: dict[str, Tensor]
    if path.suffix == ".pth":
        held = torch.load(path, weights_only=True)
    else:
        file = WeightFile(path)
        held = {name: file.read(name) for name in file.shapes()}
    return {
        name: f"{value.dtype} {list(value.shape)} "
        + hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in held.items()
    }


def weights_file(folder: Path) -> Path:
    """The index or the single file of a transformer."""
    names = (f"{STEM}.safetensors.index.json", f"{STEM}.safetensors")
    return next(folder / name for name in names if (folder / name).is_file())


def all_hashes(folder: Path) -> dict[str, str]:
    """Of all tensors of an official folder, by file and name."""
    homes = [
        home
        for home in ("", "high_noise_model", "low_noise_model")
        if (folder / home / CONFIG).is_file()
    ]
    files = {home: weights_file(folder / home) for home in homes}
    files |= {n: folder / n for n in (VAE, VAE22_FILE, TEXT_ENCODER) if (folder / n).is_file()}
    return {
        f"{place}/{name}": value
        for place, path in files.items()
        for name, value in hashes(path).items()
    }


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))


# ---- journeys


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_comes_back_from_diffusers_layout_bit_for_bit(
    kind: str, official: dict[str, ModelFolder], twins: dict[str, ModelFolder], tmp_path: Path
) -> None:
    back = exported(twins[kind].path, tmp_path / "back", "official")
    found, expected = all_hashes(back.path), all_hashes(official[kind].path)
    assert found == expected
    places = {name.partition("/")[0] for name in found}
    networks = {""} if kind == "ti2v" else {"high_noise_model", "low_noise_model"}
    assert places == {*networks, VAE22_FILE if kind == "ti2v" else VAE, TEXT_ENCODER}
    there = open_model(official[kind].path)
    assert back.architecture == there.architecture
    assert back.experts == there.experts
    back.check()


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_high_expert_is_diffusers_first_transformer_and_the_low_one_its_second(
    kind: str, official: dict[str, ModelFolder], twins: dict[str, ModelFolder]
) -> None:
    pairs = {"high_noise_model": "transformer", "low_noise_model": "transformer_2"}
    all_found = []
    for ours, theirs in pairs.items():
        expected = hashes(weights_file(official[kind].path / ours))
        found = hashes(weights_file(twins[kind].path / theirs))
        assert found == {to_diffusers(name): value for name, value in expected.items()}
        all_found.append(found)
    assert all_found[0] != all_found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusers_folder_holds_what_ours_and_theirs_need(
    kind: str, twins: dict[str, ModelFolder]
) -> None:
    folder, index = twins[kind].path, index_of(twins[kind].path)
    open_model(folder).check()
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    parts = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    assert there == parts
    transformer = ["diffusers", "WanTransformer3DModel"]
    expected: dict[str, Any] = {"_class_name": "WanPipeline", "transformer": transformer}
    if kind == "ti2v":
        expected |= {"boundary_ratio": None, "transformer_2": [None, None]}
        expected |= {"expand_timesteps": True}
    else:
        expected |= {"boundary_ratio": 0.875, "transformer_2": transformer}
    if kind == "i2v":
        expected |= {"boundary_ratio": 0.9, "_class_name": "WanImageToVideoPipeline"}
        expected |= {"image_encoder": [None, None], "image_processor": [None, None]}
    assert {name: index.get(name) for name in expected} == expected


def test_a_folder_copied_in_its_own_layout_keeps_its_parts_to_the_byte(
    official: dict[str, ModelFolder], twins: dict[str, ModelFolder], tmp_path: Path
) -> None:
    for source, layout in ((official["i2v"], "official"), (twins["i2v"], "diffusers")):
        copy = exported(source.path, tmp_path / layout, layout)
        files = {p.relative_to(source.path) for p in source.path.rglob("*") if p.is_file()}
        others = {p for p in files if not p.name.startswith(STEM) and p.name != CONFIG}
        assert len(others) >= 4
        for name in others:
            assert (copy.path / name).read_bytes() == (source.path / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_both_layouts_are_the_same_under_official_names(
    kind: str, official: dict[str, ModelFolder], twins: dict[str, ModelFolder]
) -> None:
    ours, theirs = (open_model(found[kind].path).find_weights() for found in (official, twins))
    assert ours.shapes() == theirs.shapes()
    for name in ours.shapes():
        assert torch.equal(ours.read(name), theirs.read(name)), name
    if kind != "ti2v":
        sides = {name.partition(".")[0] for name in ours.shapes()}
        assert sides == {"high", "low"}
        name = "blocks.0.ffn.0.weight"
        assert torch.equal(ours.read(f"high.{name}", slice(3, 5)), ours.read(f"high.{name}")[3:5])
        assert not torch.equal(ours.read(f"high.{name}"), ours.read(f"low.{name}"))


# ---- what a folder says


def test_ti2v_says_what_it_is(official: dict[str, ModelFolder]) -> None:
    model = open_model(official["ti2v"].path)
    assert model.latent == LatentSpec(48, 4, 16, (2, 2))
    assert model.images == ImageSpec(1, how="frame", clip=False, required=False)
    assert model.experts is None
    assert model.fps == 24.0
    assert model.advice == Advice(5.0, 50, 5.0)
    assert model.load_image_encoder(torch.float32) is None


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("t2v", Advice(12.0, 40, 4.0, 3.0, 0.875)),
        ("i2v", Advice(5.0, 40, 3.5, 3.5, 0.9)),
    ],
)
def test_a14b_says_what_it_is(
    kind: str, advice: Advice, official: dict[str, ModelFolder], twins: dict[str, ModelFolder]
) -> None:
    images = ImageSpec(1, clip=False) if kind == "i2v" else None
    for folder in (official[kind], twins[kind]):
        model = open_model(folder.path)
        assert model.latent == LatentSpec(16, 4, 8, (2, 2))
        assert model.images == images
        assert model.experts == Experts(advice.boundary or 0.0)
        assert model.fps == 16.0
        assert model.advice == advice
        assert model.load_image_encoder(torch.float32) is None
        assert "image_encoder" not in model.outlines()


def test_an_i2v_expert_reads_no_clip_though_its_config_is_that_of_wan21(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    home = official["i2v"].path / "high_noise_model"
    assert read_wan_config(home / CONFIG).reads_clip  # what the file alone would mean
    assert ModelFolder(official["i2v"].path, side="high").wan_config() == expert_config("i2v")
    bare = tmp_path / "bare"  # known by its weights then
    bare.mkdir()
    for file in home.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    assert ModelFolder(bare).wan_config() == expert_config("i2v")
    wan21 = make_official(tmp_path / "wan21", "i2v")
    assert wan21.wan_config().reads_clip


def test_a_boundary_is_read_from_the_index(twins: dict[str, ModelFolder], tmp_path: Path) -> None:
    copy = exported(twins["t2v"].path, tmp_path / "copy", "diffusers", boundary=0.915)
    assert copy.experts == Experts(0.915)
    assert index_of(copy.path)["boundary_ratio"] == 0.915


def test_a_boundary_survives_both_layouts(official: dict[str, ModelFolder], tmp_path: Path) -> None:
    one = exported(official["i2v"].path, tmp_path / "one", "official", boundary=0.82)
    two = exported(one.path, tmp_path / "two", "diffusers")
    three = exported(two.path, tmp_path / "three", "official")
    assert [model.experts for model in (one, two, three)] == [Experts(0.82)] * 3
    assert index_of(two.path)["boundary_ratio"] == 0.82
    for home in ("high_noise_model", "low_noise_model"):
        path = three.path / home / CONFIG
        assert json.loads(path.read_text(encoding="utf-8"))["_boundary"] == 0.82
        assert read_wan_config(path) == expert_config("i2v")


@pytest.mark.parametrize("boundary", [0.0, 1.0, "half", True])
def test_a_boundary_that_is_no_noise_level_is_refused(
    boundary: Any, twins: dict[str, ModelFolder], tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    home = tmp_path / "transformer"
    home.mkdir()
    write_wan_config(expert_config("t2v"), home / CONFIG)
    with pytest.raises(
        UserError, match=r"model_index\.json: boundary must be a noise level between"
    ):
        open_model(tmp_path).experts  # noqa: B018
    model = open_model(twins["t2v"].path)
    export = Export(model.find_weights(), "diffusers", boundary=boundary)
    with pytest.raises(UserError, match="boundary must be a noise level between 0 and 1, above"):
        model.check_export(export, tmp_path / "out")


def test_one_network_has_no_boundary_to_write(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    model = open_model(official["ti2v"].path)
    with pytest.raises(UserError, match="has one network for all noise levels; leave it out"):
        model.check_export(Export(model.find_weights(), "official", boundary=0.9), tmp_path / "x")


@pytest.mark.parametrize(("kind", "shift"), [("ti2v", 5.0), ("t2v", 12.0), ("i2v", 5.0)])
def test_a_scheduler_has_the_release_s_shift_or_the_one_that_was_trained_with(
    kind: str,
    shift: float,
    official: dict[str, ModelFolder],
    twins: dict[str, ModelFolder],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def shift_of(folder: Path) -> float:
        path = folder / "scheduler" / "scheduler_config.json"
        return float(json.loads(path.read_text(encoding="utf-8"))["flow_shift"])

    assert shift_of(twins[kind].path) == shift
    trained = exported(official[kind].path, tmp_path / "trained", "diffusers", shift=7.0)
    assert shift_of(trained.path) == 7.0
    with caplog.at_level(logging.INFO, logger="model.families.wan21.export"):
        again = exported(trained.path, tmp_path / "again", "diffusers")
    assert shift_of(again.path) == shift
    assert caplog.messages == [
        f"{trained.path}/scheduler: its flow_shift of 7.0 is not kept: the new folder's is "
        f"{shift:g}"
    ]


# ---- one expert of two


@pytest.mark.parametrize("side", ["high", "low"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_one_expert_is_a_model_of_one_network_with_plain_names(
    layout: str, side: Side, official: dict[str, ModelFolder], twins: dict[str, ModelFolder]
) -> None:
    pair = open_model((official if layout == "official" else twins)["i2v"].path)
    model = pair.only(side)
    assert model.path == pair.path
    assert model.experts is None
    assert (model.latent, model.text, model.images) == (pair.latent, pair.text, pair.images)
    weights, both = model.find_weights(), pair.find_weights()
    model.check_weights(weights, what="a test")
    model.check()
    assert "head.head.weight" in weights.shapes()
    for name in weights.shapes():
        assert torch.equal(weights.read(name), both.read(f"{side}.{name}"))


def test_one_expert_s_weights_are_found_in_a_file_of_both(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    pair = open_model(official["t2v"].path)
    both, path = pair.find_weights(), tmp_path / "both.safetensors"
    write_weights({name: both.read(name) for name in both.shapes()}, path, {})
    low = pair.only("low").find_weights(path)
    name = "head.head.weight"
    assert torch.equal(low.read(name), both.read(f"low.{name}"))
    assert pair.find_weights(path).shapes() == both.shapes()


def test_one_expert_exports_as_a_model_of_its_own(
    twins: dict[str, ModelFolder], tmp_path: Path
) -> None:
    low = open_model(twins["i2v"].path).only("low")
    for layout in ("official", "diffusers"):
        low.export(Export(low.find_weights(), layout), tmp_path / layout)
        alone = open_model(tmp_path / layout)
        assert type(alone) is Wan21
        assert alone.images == ImageSpec(1, clip=False)
        alone.check()
        weights = alone.find_weights()
        alone.check_weights(weights, what="a test")
        name = "blocks.1.self_attn.q.weight"
        assert torch.equal(weights.read(name), low.find_weights().read(name))
    index = index_of(tmp_path / "diffusers")
    assert (index["boundary_ratio"], index["transformer_2"]) == (None, [None, None])


def test_there_is_no_third_expert(official: dict[str, ModelFolder]) -> None:
    with pytest.raises(UserError, match="no expert 'middle'; its experts are high and low"):
        open_model(official["t2v"].path).only("middle")  # type: ignore[arg-type]


# ---- incomplete, or something else


def incomplete(folder: Path, lost: str) -> str:
    for path in (folder / lost).iterdir():
        path.unlink()
    (folder / lost).rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        open_model(folder).check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("side", "ours", "theirs"),
    [
        ("high", "high_noise_model", "transformer"),
        ("low", "low_noise_model", "transformer_2"),
    ],
)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_folder_with_one_of_two_experts_says_which_is_missing(
    layout: str,
    side: Side,
    ours: str,
    theirs: str,
    official: dict[str, ModelFolder],
    tmp_path: Path,
) -> None:
    copy = exported(official["t2v"].path, tmp_path / "Wan2.2-T2V-A14B", layout)
    message = incomplete(copy.path, ours if layout == "official" else theirs)
    assert message.startswith(
        f"{copy.path}: not a complete model folder: missing of the {side}-noise expert "
        f"{ours}/config.json or {theirs}/config.json; of the {side}-noise expert {ours}/{STEM}"
    )
    other = "low" if side == "high" else "high"
    assert f"of the {other}-noise" not in message
    assert message.endswith(
        f"fetch what is missing with: hf download Wan-AI/Wan2.2-T2V-A14B --local-dir {copy.path}"
    )
    with pytest.raises(WeightsError) as caught:
        open_model(copy.path).find_weights()
    assert str(caught.value).startswith(
        f"{copy.path}: lacks the weights of the {side}-noise expert ({ours} or {theirs}); fetch "
    )


def test_what_both_experts_share_is_missed_once(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    copy = exported(official["t2v"].path, tmp_path / "copy", "official")
    (copy.path / VAE).unlink()
    assert copy.missing() == [f"{VAE} or vae"]
    assert copy.missing(encoders=False) == []


def test_experts_of_different_sizes_are_refused(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    copy = exported(official["t2v"].path, tmp_path / "copy", "official")
    other = copy.path / "low_noise_model" / CONFIG
    write_wan_config(replace(expert_config("t2v"), num_layers=3), other)
    with pytest.raises(UserError, match="its two experts are of different sizes"):
        open_model(copy.path).architecture  # noqa: B018


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("Wan2.2-TI2V-5B", "hf download Wan-AI/Wan2.2-TI2V-5B --local-dir"),
        ("wan2.2-t2v-a14b-diffusers", "hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --local-dir"),
        ("Wan2.2-I2V-A14B", "hf download Wan-AI/Wan2.2-I2V-A14B --local-dir"),
        ("Wan2.2-TI2V-Tiny", "make it with: python scripts/make_tiny_world.py"),
        ("Wan2.2-T2V-A14B-Tiny", "make it with: python scripts/make_tiny_world.py"),
    ],
)
def test_the_command_is_that_of_the_folder_s_name(tmp_path: Path, name: str, command: str) -> None:
    with pytest.raises(FileNotFoundError, match=command):
        find_model(tmp_path / "elsewhere", name)
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=command):
        open_model(tmp_path / name).check()


def test_weights_of_one_network_are_none_of_two_experts(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    pair, single = open_model(official["t2v"].path), make_official(tmp_path / "single")
    with pytest.raises(WeightsError) as caught:
        pair.find_weights(single.path)
    assert str(caught.value) == (
        f"{single.path}: holds one network, where those of two experts are wanted; give a folder "
        "of both, or a file whose names begin with high. and low."
    )
    high = pair.only("high").find_weights()
    tensors = {f"high.{name}": high.read(name) for name in high.shapes()}
    write_weights(tensors, tmp_path / "half.safetensors", {})
    with pytest.raises(WeightsError, match="holds no weights of the low-noise expert, where"):
        pair.find_weights(tmp_path / "half.safetensors")


def test_weights_of_wan21_with_clip_are_refused_by_name(
    official: dict[str, ModelFolder], tmp_path: Path
) -> None:
    sizes = replace(toy_config("i2v"), text_len=32)
    wan21 = open_model(make_official(tmp_path / "wan21", "i2v", config=sizes).path)
    expert = open_model(official["i2v"].path).only("high")
    with pytest.raises(WeightsError) as caught:
        expert.check_weights(wan21.find_weights(), what="a test")
    message = str(caught.value)
    assert "unexpected ['blocks.0.cross_attn.k_img.bias'" in message
    assert "They look like i2v with dim 32" in message
    assert "expected i2v without CLIP with dim 32" in message
    pair = open_model(official["i2v"].path)
    with pytest.raises(WeightsError, match="They look like two Wan transformers, experts of high"):
        wan21.check_weights(pair.find_weights(), what="a test")


def test_weights_of_ti2v_are_told_by_their_channels(official: dict[str, ModelFolder]) -> None:
    ti2v, expert = open_model(official["ti2v"].path), open_model(official["t2v"].path).only("low")
    with pytest.raises(WeightsError, match="They look like ti2v with dim 32, ffn_dim 64, 2 layers"):
        expert.check_weights(ti2v.find_weights(), what="a test")


def test_an_early_copy_of_ti2v_that_speaks_of_clip_is_read_and_said_so_once(
    twins: dict[str, ModelFolder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = exported(twins["ti2v"].path, tmp_path / "copy", "diffusers").path
    path = copy / "transformer" / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    early = values | {"added_kv_proj_dim": 5120, "image_dim": 1280}
    path.write_text(json.dumps(early), encoding="utf-8")
    model = open_model(copy)
    with caplog.at_level(logging.INFO, logger="model.families.wan22.ti2v"):
        model.check_weights(model.find_weights(), what="a test")
        model.check()
    assert caplog.messages == [
        f"{path}: speaks of a CLIP branch, which TI2V has not; it is passed over"
    ]
    stored = load_file(weights_file(copy / "transformer"))
    stored["blocks.0.attn2.add_k_proj.weight"] = torch.zeros(1)
    write_weights(stored, tmp_path / "w.safetensors", {})
    with pytest.raises(WeightsError, match=r"1 unexpected \['blocks\.0\.cross_attn\.k_img"):
        model.check_weights(model.find_weights(tmp_path / "w.safetensors"), what="a test")


# ---- before anything is downloaded


def test_published_sizes_are_those_of_the_presets(tmp_path: Path) -> None:
    for name in ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B"):
        config = PRESETS[name]
        assert (config.dim, config.ffn_dim, config.num_heads, config.num_layers) == (
            5120, 13824, 40, 40,
        )  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(diffusers_config(PRESETS["Wan2.2-I2V-A14B"])))
    assert json.loads(path.read_text())["image_dim"] is None
    assert read_wan_config(path) == PRESETS["Wan2.2-I2V-A14B"]
