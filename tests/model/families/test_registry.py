"""Which family a folder or a file is of, and what is said of those that none can use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from model.families.base import Advice, Model
from model.families.registry import find_model, identify_weights, known_families, open_model
from model.families.tiny_world import TinyExperts, TinyTI2V, TinyWorld
from model.families.wan21 import Wan21
from model.families.wan22 import Wan22Experts, Wan22TI2V
from model.wan.config import PRESETS, WanConfig, diffusers_config, write_wan_config
from tests.conftest import MINIATURE, build_wan
from tests.folders import make_official
from tests.toy import at_home
from utils.errors import UserError
from utils.tiny_world.codec import FILE_NAME
from utils.weights import WeightsError, write_weights


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def sizes(folder: Path, config: WanConfig = MINIATURE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_wan_config(config, folder / "config.json")
    return folder


def test_the_families_are_those_whose_files_are_there() -> None:
    ours = [TinyExperts, TinyTI2V, Wan22Experts, Wan22TI2V, TinyWorld, Wan21]
    assert known_families() == ours
    with at_home():
        assert [family.family for family in known_families()] == [
            "the tiny world of A14B",
            "the tiny world of TI2V",
            "Wan2.2 A14B",
            "Wan2.2 TI2V",
            "the tiny world",
            "Wan2.1",
            "the toy",
        ]
    assert known_families() == ours


def test_a_special_family_is_asked_before_the_one_that_it_is_made_of(tiny_root: Path) -> None:
    model = open_model(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    assert type(model) is TinyWorld
    assert Wan21.recognises(model.path)


def test_a_model_with_one_network_has_no_experts(tiny_root: Path) -> None:
    model = open_model(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    assert model.experts is None
    with pytest.raises(UserError, match="with one network for all noise levels, of which none is"):
        model.only("high")


@pytest.mark.parametrize(
    ("preset", "advice"),
    [
        ("Wan2.1-T2V-1.3B", Advice(8.0, 50, 6.0)),
        ("Wan2.1-T2V-14B", Advice(5.0, 50, 5.0)),
        ("Wan2.1-I2V-14B", Advice(5.0, 40, 5.0)),
        ("Wan2.1-FLF2V-14B", Advice(16.0, 50, 5.0)),
    ],
)
def test_a_release_says_how_it_was_published_to_be_sampled(
    preset: str, advice: Advice, tmp_path: Path
) -> None:
    assert open_model(sizes(tmp_path / "model", PRESETS[preset])).advice == advice


@pytest.mark.parametrize(
    "names",
    [
        ("config.json",),
        ("transformer/config.json",),
        ("model_index.json",),
        ("Wan2.1_VAE.pth",),
        ("vae/config.json",),
    ],
)
def test_wan_is_known_by_any_of_its_parts(names: tuple[str, ...], tmp_path: Path) -> None:
    assert type(open_model(touch(tmp_path, *names))) is Wan21


def test_a_published_name_is_enough(tmp_path: Path) -> None:
    named = {
        "Wan2.1-T2V-1.3B": Wan21,
        "Wan2.1-T2V-Tiny": TinyWorld,
        "Wan2.2-TI2V-5B": Wan22TI2V,
        "Wan2.2-TI2V-5B-Diffusers": Wan22TI2V,
        "Wan2.2-T2V-A14B": Wan22Experts,
        "Wan2.2-I2V-A14B-Diffusers": Wan22Experts,
        "Wan2.2-TI2V-Tiny": TinyTI2V,
        "Wan2.2-T2V-A14B-Tiny": TinyExperts,
        "Wan2.2-I2V-A14B-Tiny": TinyExperts,
    }
    for name, family in named.items():
        (tmp_path / name).mkdir()
        assert type(open_model(tmp_path / name)) is family


def test_the_tiny_world_is_known_by_its_codec_or_its_transformer(tmp_path: Path) -> None:
    assert type(open_model(touch(tmp_path / "codec", FILE_NAME))) is TinyWorld
    assert type(open_model(sizes(tmp_path / "transformer"))) is TinyWorld
    both = touch(sizes(tmp_path / "other codec"), "Wan2.1_VAE.pth")
    assert type(open_model(both)) is Wan21
    assert type(open_model(sizes(tmp_path / "plain", PRESETS["Wan2.1-T2V-14B"]))) is Wan21


def test_a_folder_that_says_it_is_anothers_is_not_wans(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ToyDenoiser"}')
    with pytest.raises(FileNotFoundError) as caught:
        open_model(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no model of a known family (the tiny world of A14B, the tiny world "
        f"of TI2V, Wan2.2 A14B, Wan2.2 TI2V, the tiny world, Wan2.1): found ['config.json']"
    )
    with at_home():
        assert open_model(tmp_path).family == "the toy"


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = touch(tmp_path, "model.safetensors") / "model.safetensors"
    for find in (lambda: open_model(file), lambda: find_model(tmp_path, file.name)):
        with pytest.raises(ValueError) as caught:
            find()
        assert str(caught.value) == (
            f"{file}: is a file; a model is a folder, and weights in a file are named by `weights`"
        )


# ---- Wan2.2


def written(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def ti2v(folder: Path) -> None:
    official = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
    written(folder / "config.json", {**official, "model_type": "ti2v", "in_dim": 48})


def channels(folder: Path) -> None:
    values = {"_class_name": "WanTransformer3DModel", "out_channels": 48}
    written(folder / "transformer" / "config.json", values)


def experts(folder: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        sizes(folder / name, PRESETS["Wan2.1-T2V-14B"])


def diffusers_experts(folder: Path) -> None:
    for name in ("transformer", "transformer_2"):
        written(folder / name / "config.json", diffusers_config(PRESETS["Wan2.1-T2V-14B"]))


def pixel_patches(folder: Path) -> None:
    written(folder / "model_index.json", {"_class_name": "WanPipeline"})
    written(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan", "patch_size": 2})


def indexed(folder: Path, **values: object) -> None:
    written(folder / "model_index.json", {"_class_name": "WanPipeline", **values})


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (ti2v, Wan22TI2V),
        (channels, Wan22TI2V),
        (pixel_patches, Wan22TI2V),
        (lambda folder: touch(folder, "Wan2.2_VAE.pth"), Wan22TI2V),
        (lambda folder: indexed(folder, expand_timesteps=True), Wan22TI2V),
        (experts, Wan22Experts),
        (diffusers_experts, Wan22Experts),
        (lambda folder: touch(folder, "low_noise_model/config.json"), Wan22Experts),
        (lambda folder: indexed(folder, boundary_ratio=0.9), Wan22Experts),
        (lambda folder: indexed(folder, transformer_2=["diffusers", "Wan"]), Wan22Experts),
        (lambda folder: indexed(folder, transformer_2=[None, None]), Wan21),
        (lambda folder: indexed(folder, boundary_ratio=None), Wan21),
    ],
)
def test_wan22_is_known_by_any_of_its_parts(
    make: Callable[[Path], object], family: type[Model], tmp_path: Path
) -> None:
    make(tmp_path / "theirs")
    assert type(find_model(tmp_path, "theirs")) is family


def test_two_networks_of_another_family_are_not_wans(tmp_path: Path) -> None:
    written(tmp_path / "transformer_2" / "config.json", {"_class_name": "ToyDenoiser"})
    written(tmp_path / "model_index.json", {"boundary_ratio": 0.5})
    with pytest.raises(FileNotFoundError, match="no model of a known family"):
        open_model(tmp_path)


def test_a_tiny_world_is_known_by_its_transformers_and_its_codec(tmp_path: Path) -> None:
    for name, family in (("Wan2.2-TI2V-Tiny", TinyTI2V), ("Wan2.1-T2V-Tiny", TinyWorld)):
        folder = touch(sizes(tmp_path / family.family, PRESETS[name]), FILE_NAME)
        assert type(open_model(folder)) is family
    pair = tmp_path / "pair"
    for side in ("high_noise_model", "low_noise_model"):
        sizes(pair / side, PRESETS["Wan2.2-I2V-A14B-Tiny"])
    assert type(open_model(pair)) is TinyExperts  # by its sizes alone
    assert type(open_model(touch(pair, FILE_NAME))) is TinyExperts


# ---- weights without a folder


def test_weights_are_known_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_weights(build_wan().state_dict(), path, {})
    family, weights = identify_weights(path)
    assert issubclass(family, Wan21)
    assert set(weights.shapes()) == set(build_wan().state_dict())


def test_a_folders_weights_are_its_familys(tmp_path: Path) -> None:
    make_official(tmp_path / "model")
    family, weights = identify_weights(tmp_path / "model")
    assert family is Wan21
    assert "patch_embedding.weight" in weights.shapes()


def test_a_part_of_a_network_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    state = build_wan().state_dict()
    del state["head.modulation"]
    write_weights(state, tmp_path / "x.safetensors", {})
    with pytest.raises(WeightsError) as caught:
        identify_weights(tmp_path / "x.safetensors")
    assert str(caught.value) == (
        f"{tmp_path}/x.safetensors: not a whole Wan transformer: lacks head.modulation; give a "
        "model folder, the index of its shards, or a file that holds all weights"
    )
