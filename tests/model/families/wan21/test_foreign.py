"""LoRAs, quantised files and folders of experts, given as weights, are called what they are."""

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


LINEAR = "blocks.0.self_attn.q.weight"
SCALES = {
    "comfyui": "blocks.0.self_attn.q.scale_weight",
    "comfyui's inputs": "blocks.0.self_attn.q.scale_input",
    "comfyui's mark": "scaled_fp8",
    "comfyui's other mark": "model.diffusion_model.blocks.0.self_attn.q.comfy_quant",
    "transformers": "blocks.0.self_attn.q.weight_scale",
    "blocks": "blocks.0.self_attn.q.weight_scale_inv",
    "bitsandbytes": "blocks.0.self_attn.q.weight.absmax",
    "its state": "blocks.0.self_attn.q.weight.quant_state.bitsandbytes__nf4",
    "gptq": "blocks.0.self_attn.q.qweight",
}


@pytest.mark.parametrize("name", SCALES.values(), ids=SCALES)
def test_weights_with_scales_beside_them_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "scaled.safetensors"
    write_weights({LINEAR: torch.zeros(4, 4), name: torch.ones(1)}, path, {})
    with pytest.raises(WeightsError) as caught:
        identify_weights(path)
    held = name.removeprefix("model.")
    assert str(caught.value) == (
        f"{path}: holds quantised weights ({held} of dtype F32, ...), which without their scales "
        f"are noise; give the weights that they were made of, in float32, bfloat16 or float16"
    )


@pytest.mark.parametrize(
    ("dtype", "safe"),
    [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8")],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_few_bits_are_refused_by_their_dtype(
    dtype: torch.dtype, safe: str, suffix: str, tiny_root: Path, tmp_path: Path
) -> None:
    model = open_model(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    weights, path = model.find_weights(), tmp_path / f"few{suffix}"
    tensors = {name: weights.read(name) for name in weights.shapes()}
    write_weights({**tensors, LINEAR: tensors[LINEAR].to(dtype)}, path, {})
    called = safe if suffix == ".safetensors" else str(dtype)
    with pytest.raises(WeightsError) as caught:
        model.find_weights(path)
    message = f"{path}: holds quantised weights ({LINEAR} of dtype {called}, ...), which without"
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits_and_more_are_taken(
    dtype: torch.dtype, tiny_root: Path, tmp_path: Path
) -> None:
    model = open_model(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    weights, path = model.find_weights(), tmp_path / "w.safetensors"
    write_weights({n: weights.read(n).to(dtype) for n in weights.shapes()}, path, {})
    model.check_weights(model.find_weights(path), what="a test")


def test_a_gguf_file_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(WeightsError, match="it is a GGUF file, of quantised weights; give those"):
        identify_weights(path)
