"""LoRAs and folders of two experts, given as weights, are called what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.families.registry import identify_weights, open_model
from utils.weights import WeightsError, write_weights

LORAS = {
    "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "peft": "base_model.model.blocks.0.self_attn.q.lora_A.default.weight",
    "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "kohya": "lora_unet_blocks_0_self_attn_q.lora_up.weight",
    "ours": "blocks.0.self_attn.q.adapters.generator.a",
    "musubi": "lora_unet_blocks_0_self_attn_q.alpha",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", LORAS.values(), ids=LORAS)
def test_a_lora_given_as_weights_is_called_one(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lora{suffix}"
    write_weights({name: torch.zeros(4, 4)}, path, {})
    with pytest.raises(WeightsError) as caught:
        identify_weights(path)
    assert str(caught.value) == (
        f"{path}: is a LoRA, an adapter that is added to a model's weights (it holds {name}, ...); "
        f"add it with --adapter (inference.py, demo.py), go on training it with "
        f"generator.adapter.weights, or merge it into its base with "
        f"convert_checkpoint.py --input_path BASE --adapter {path}"
    )


def test_a_folder_of_two_experts_is_no_weights_of_one_network(
    tiny_root: Path, tmp_path: Path
) -> None:
    home = tmp_path / "release" / "high_noise_model"
    write_weights({"x": torch.zeros(1)}, home / "diffusion_pytorch_model.safetensors", {})
    model = open_model(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    with pytest.raises(WeightsError) as caught:
        model.find_weights(tmp_path / "release")
    assert str(caught.value) == (
        f"{tmp_path}/release: holds two transformers, the experts of high and of low noise levels, "
        f"where one is wanted; name the folder or the index of one of them: {home}"
    )
