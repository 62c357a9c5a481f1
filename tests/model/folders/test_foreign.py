"""LoRAs and Wan2.2 releases, given as a model or as its weights, are called what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.families import registry
from model.folders.folder import find_model
from model.folders.loading import find_weights
from utils.errors import NotFoundError, UserError
from utils.weights import WeightsError, write_weights

LORAS = {
    "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "peft": "base_model.model.blocks.0.self_attn.q.lora_A.default.weight",
    "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "kohya": "lora_unet_blocks_0_self_attn_q.lora_up.weight",
    "musubi": "lora_unet_blocks_0_self_attn_q.alpha",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", LORAS.values(), ids=LORAS)
def test_a_lora_given_as_weights_is_called_one(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lora{suffix}"
    write_weights({name: torch.zeros(4, 4)}, path, {})
    with pytest.raises(WeightsError) as caught:
        find_weights(path)
    assert str(caught.value) == (
        f"{path}: is a LoRA, an adapter that is added to a model's weights (it holds {name}, ...); "
        f"give the weights of a whole model, such as the two merged"
    )


def make(folder: Path, *, folders: tuple[str, ...] = (), **files: object) -> Path:
    """A model folder with these sub-folders, and JSON files by their paths."""
    for name in folders:
        (folder / name).mkdir(parents=True)
    for name, values in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def a14b(folder: Path) -> Path:
    return make(folder, folders=("high_noise_model", "low_noise_model"))


def a14b_diffusers(folder: Path) -> Path:
    return make(folder, folders=("transformer_2",), transformer__config={"in_channels": 16})


def ti2v(folder: Path) -> Path:
    return make(folder, config={"model_type": "ti2v", "dim": 3072, "out_dim": 48})


def ti2v_diffusers(folder: Path) -> Path:
    return make(folder, transformer__config={"out_channels": 48}, vae__config={"z_dim": 48})


def only_codec(folder: Path) -> Path:
    make(folder, folders=("google",))
    (folder / "Wan2.2_VAE.pth").touch()
    return folder


CASES = [
    (a14b, "it holds high_noise_model/"),
    (a14b_diffusers, "it holds transformer_2/"),
    (ti2v, "its model_type is ti2v"),
    (ti2v_diffusers, "its latents have 48 channels"),
    (only_codec, "it holds Wan2.2_VAE.pth"),
]


@pytest.mark.parametrize(("build", "mark"), CASES)
@pytest.mark.parametrize("find", [find_model, registry.find_model])
def test_a_wan22_folder_given_as_model_is_called_one(
    find: object, build: object, mark: str, tmp_path: Path
) -> None:
    path = build(tmp_path / "release")  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        find(tmp_path, "release")  # type: ignore[operator]
    assert str(caught.value) == (
        f"{path}: is a Wan2.2 release ({mark}), and Wan2.1's are read alone; use one of them"
    )


def test_a_wan22_folder_given_as_weights_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a Wan2\.2 release \(it holds high_noise_model/\)"):
        find_weights(a14b(tmp_path / "release"))


@pytest.mark.parametrize("find", [find_model, registry.find_model])
def test_a_file_given_as_model_is_called_one(find: object, tmp_path: Path) -> None:
    (tmp_path / "release").touch()
    with pytest.raises(NotFoundError, match=r"'release': .*/release is a file; give"):
        find(tmp_path, "release")  # type: ignore[operator]
