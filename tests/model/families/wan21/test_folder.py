"""Model folders of both layouts: what is found where, and what is said of what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.families.registry import find_model, open_model
from model.families.wan21.folder import ModelFolder
from model.wan.config import PRESETS, diffusers_config, write_wan_config

TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
STEM = "diffusion_pytorch_model"
OFFICIAL = (
    f"{STEM}.safetensors.index.json", "Wan2.1_VAE.pth", TEXT, "google/umt5-xxl/spiece.model", CLIP,
)  # fmt: skip
DIFFUSERS = (
    "model_index.json", f"transformer/{STEM}.safetensors.index.json", "vae/config.json",
    "text_encoder/config.json", "tokenizer/tokenizer.json", "image_encoder/config.json",
)  # fmt: skip


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def official(folder: Path, preset: str = "Wan2.1-I2V-14B") -> ModelFolder:
    touch(folder, *OFFICIAL)
    write_wan_config(PRESETS[preset], folder / "config.json")
    return ModelFolder(folder)


def diffusers(folder: Path, preset: str = "Wan2.1-I2V-14B") -> ModelFolder:
    touch(folder, *DIFFUSERS)
    text = json.dumps(diffusers_config(PRESETS[preset]))
    (folder / "transformer" / "config.json").write_text(text)
    return ModelFolder(folder)


def error_of(folder: ModelFolder, **options: bool) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        open_model(folder.path).check(**options)
    return str(caught.value)


def test_an_official_folder_holds_its_parts_at_the_top(tmp_path: Path) -> None:
    folder = official(tmp_path)
    assert folder.config == tmp_path / "config.json"
    assert folder.wan_config() == PRESETS["Wan2.1-I2V-14B"]
    assert folder.weights == tmp_path / f"{STEM}.safetensors.index.json"
    assert folder.vae == tmp_path / "Wan2.1_VAE.pth"
    assert folder.text_encoder == tmp_path / TEXT
    assert folder.tokenizer == tmp_path / "google/umt5-xxl"
    assert folder.image_encoder == tmp_path / CLIP
    open_model(folder.path).check()


def test_a_diffusers_folder_holds_its_parts_below(tmp_path: Path) -> None:
    folder = diffusers(tmp_path)
    assert folder.config == tmp_path / "transformer" / "config.json"
    assert folder.wan_config() == PRESETS["Wan2.1-I2V-14B"]
    assert folder.weights == tmp_path / f"transformer/{STEM}.safetensors.index.json"
    assert folder.vae == tmp_path / "vae"
    assert folder.text_encoder == tmp_path / "text_encoder"
    assert folder.tokenizer == tmp_path / "tokenizer"
    assert folder.image_encoder == tmp_path / "image_encoder"
    open_model(folder.path).check()


def test_a_mixture_takes_what_lies_at_the_top_first(tmp_path: Path) -> None:
    diffusers(tmp_path, "Wan2.1-T2V-14B")
    folder = official(tmp_path)
    assert folder.config == tmp_path / "config.json"
    assert folder.wan_config().model_type == "i2v"
    assert folder.text_encoder == tmp_path / TEXT
    (tmp_path / TEXT).unlink()
    assert folder.text_encoder == tmp_path / "text_encoder"
    open_model(folder.path).check()


@pytest.mark.parametrize("make", [official, diffusers])
def test_a_single_file_of_weights_does(tmp_path: Path, make: Callable[[Path], ModelFolder]) -> None:
    folder = make(tmp_path)
    index = folder.weights
    assert index is not None
    index.unlink()
    assert folder.weights is None
    touch(index.parent, f"{STEM}.safetensors")
    assert folder.weights == index.parent / f"{STEM}.safetensors"


def test_an_empty_sub_folder_counts_as_missing(tmp_path: Path) -> None:
    folder = diffusers(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    assert folder.vae is None
    assert folder.missing() == ["Wan2.1_VAE.pth or vae"]


@pytest.mark.parametrize("preset", ["Wan2.1-I2V-14B", "Wan2.1-FLF2V-14B"])
def test_only_models_that_see_images_want_an_image_encoder(tmp_path: Path, preset: str) -> None:
    official(tmp_path, preset)
    (tmp_path / CLIP).unlink()
    assert ModelFolder(tmp_path).missing() == [f"{CLIP} or image_encoder"]
    assert ModelFolder(tmp_path).missing(encoders=False) == []
    write_wan_config(PRESETS["Wan2.1-T2V-14B"], tmp_path / "config.json")
    assert ModelFolder(tmp_path).missing() == []


def test_parts_that_a_run_does_not_read_are_not_wanted(tmp_path: Path) -> None:
    write_wan_config(PRESETS["Wan2.1-T2V-14B"], tmp_path / "config.json")
    folder = ModelFolder(tmp_path)
    assert folder.missing(weights=False, encoders=False) == []
    vae = ["Wan2.1_VAE.pth or vae"]
    assert folder.missing(weights=False, text=False) == vae
    assert folder.missing(weights=False)[:2] == [
        f"{TEXT} or text_encoder",
        "google/umt5-xxl or tokenizer",
    ]


def test_an_incomplete_release_is_told_the_command_that_completes_it(tmp_path: Path) -> None:
    path = tmp_path / "Wan2.1-T2V-14B"
    folder = official(path, "Wan2.1-T2V-14B")
    (path / "Wan2.1_VAE.pth").unlink()
    assert error_of(folder) == (
        f"{path}: not a complete model folder: missing "
        "Wan2.1_VAE.pth or vae "
        f"(found ['config.json', '{STEM}.safetensors.index.json', 'google', '{CLIP}', '{TEXT}']); "
        f"fetch what is missing with: hf download Wan-AI/Wan2.1-T2V-14B --local-dir {path}"
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("Wan2.1-T2V-1.3B", "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir"),
        ("Wan2.1-I2V-14B-720P", "hf download Wan-AI/Wan2.1-I2V-14B-720P --local-dir"),
        ("Wan2.1-T2V-14B-Diffusers", "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir"),
        (
            "Wan2.1-FLF2V-14B-720P-Diffusers",
            "hf download Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers --local-dir",
        ),
        ("Wan2.1-T2V-Tiny", "make it with: python scripts/make_tiny_world.py"),
        ("Wan2.1-I2V-Tiny", "make it with: python scripts/make_tiny_world.py"),
    ],
)
def test_the_command_is_that_of_the_folders_name(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).mkdir()
    assert command in error_of(ModelFolder(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=command):
        find_model(tmp_path / "elsewhere", name)


def test_no_command_is_invented_for_other_names(tmp_path: Path) -> None:
    assert "hf download" not in error_of(ModelFolder(tmp_path))


def test_a_model_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    official(tmp_path / "mine")
    assert find_model(tmp_path, "mine").path == tmp_path / "mine"
    assert find_model(Path("nowhere"), str(tmp_path / "mine")).path == tmp_path / "mine"


def test_models_of_both_layouts_are_listed_when_a_name_is_wrong(tmp_path: Path) -> None:
    official(tmp_path / "ours")
    diffusers(tmp_path / "theirs")
    touch(tmp_path, "indexed/model_index.json", "bare/other.json", "file")
    with pytest.raises(FileNotFoundError) as caught:
        find_model(tmp_path, "their")
    assert str(caught.value) == (
        f"model 'their': no folder {tmp_path}/their (it holds ['indexed', 'ours', 'theirs']); "
        "did you mean 'theirs'?"
    )


def test_a_bare_transformer_folder_of_diffusers_is_read(tmp_path: Path) -> None:
    config = replace(PRESETS["Wan2.1-T2V-14B"], num_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config(config)))
    assert ModelFolder(tmp_path).wan_config() == config
