"""Adapter files that are written here mean the same to diffusers: same keys, same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.folders.adapter_files import AdapterFile, LowRank, read_adapter
from model.folders.adapter_writing import write_adapter
from model.wan.adapter_names import LAYOUTS, Layout
from model.wan.config import WanConfig
from tests.adapters import (
    DEEP,
    DEEP_CLIP,
    answer,
    complaints,
    layers_of,
    merged,
    pipeline_of,
    random_factors,
    theirs,
)
from tests.conftest import build_wan

# What each layout can hold beside the blocks' ten matrices.
CASES: list[tuple[Layout, bool, bool]] = [
    ("diffusers", False, False),
    ("diffusers", True, False),
    ("diffusers", True, True),
    ("comfyui", False, False),
    ("comfyui", True, False),
    ("comfyui", True, True),
    ("kohya", False, False),
    ("kohya", False, True),
]


def loaded(config: WanConfig, *paths: Path, strengths: tuple[float, ...] = (1.0,)) -> Any:
    """diffusers' transformer with adapter files; it must have nothing to complain of."""
    pipe = pipeline_of(theirs(config, build_wan(config).state_dict()))
    names = [f"adapter_{i}" for i in range(len(paths))]
    with complaints() as said:
        for name, path in zip(names, paths, strict=True):
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    assert said == []
    if len(paths) > 1:
        pipe.set_adapters(names, list(strengths))
    return pipe.transformer


def expected(config: WanConfig, *adapters: AdapterFile) -> Tensor:
    return answer(theirs(config, merged(build_wan(config).state_dict(), *adapters)), config)


@pytest.mark.parametrize(("layout", "embeddings", "mixed"), CASES)
def test_a_written_file_loads_and_equals_the_merged_weights(
    layout: Layout, embeddings: bool, mixed: bool, tmp_path: Path
) -> None:
    factors = random_factors(layers_of(embeddings=embeddings), mixed=mixed)
    path = tmp_path / "few.safetensors"
    write_adapter(path, factors, layout=layout)
    wanted = expected(DEEP, AdapterFile(factors))
    base = answer(theirs(DEEP, build_wan(DEEP).state_dict()), DEEP)
    error = (answer(loaded(DEEP, path), DEEP) - wanted).abs().max()
    print(f"{layout}: {error:.1e} of {(wanted - base).abs().max():.2f}")
    assert (wanted - base).abs().max() > 0.1
    assert error < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_a_text_model_serves_an_image_model(layout: Layout, tmp_path: Path) -> None:
    factors = random_factors(layers_of(DEEP_CLIP), DEEP_CLIP, mixed=True)
    path = tmp_path / "few.safetensors"
    write_adapter(path, factors, layout=layout)
    assert not any("k_img" in name for name in read_adapter(path).factors)
    wanted = expected(DEEP_CLIP, read_adapter(path))
    assert (answer(loaded(DEEP_CLIP, path), DEEP_CLIP) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_branch_that_reads_images_travels_too(layout: Layout, tmp_path: Path) -> None:
    layers = layers_of(DEEP_CLIP, clip=True, embeddings=layout != "kohya")
    factors = random_factors(layers, DEEP_CLIP)
    path = tmp_path / "few.safetensors"
    write_adapter(path, factors, layout=layout)
    wanted = expected(DEEP_CLIP, AdapterFile(factors))
    assert (answer(loaded(DEEP_CLIP, path), DEEP_CLIP) - wanted).abs().max() < 1e-5


def test_diffusers_would_complain_of_keys_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    write_adapter(path, random_factors(layers_of()), layout="diffusers")
    extra = {"transformer.blocks.12.attn1.to_q.lora_A.weight": torch.zeros(4, 32)}
    save_file({**load_file(path), **extra}, path)
    pipe = pipeline_of(theirs(DEEP, build_wan(DEEP).state_dict()))
    with complaints() as said:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    assert "unexpected keys" in said[0]


def test_two_adapters_add_up_with_their_strengths(tmp_path: Path) -> None:
    few = random_factors(layers_of(), seed=1)
    style = random_factors(layers_of(embeddings=True), rank=2, seed=2)
    write_adapter(tmp_path / "few.safetensors", few, layout="kohya")
    write_adapter(tmp_path / "style.safetensors", style)
    paths = tmp_path / "few.safetensors", tmp_path / "style.safetensors"
    wanted = expected(DEEP, AdapterFile(few), read_adapter(paths[1]).scaled(0.7))
    transformer = loaded(DEEP, *paths, strengths=(1.0, 0.7))
    assert (answer(transformer, DEEP) - wanted).abs().max() < 1e-5
    transformer.fuse_lora()
    assert (answer(transformer, DEEP) - wanted).abs().max() < 1e-5


def test_each_expert_gets_its_own_file(tmp_path: Path) -> None:
    state = build_wan(DEEP).state_dict()
    sides = {side: random_factors(layers_of(), seed=i) for i, side in enumerate(("high", "low"))}
    factors = {f"{side}.{n}": pair for side, held in sides.items() for n, pair in held.items()}
    write_adapter(tmp_path / "few", factors)
    pipe = pipeline_of(theirs(DEEP, state), theirs(DEEP, state))
    with complaints() as said:
        for side, second in (("high", False), ("low", True)):
            pipe.load_lora_weights(
                tmp_path / "few",
                weight_name=f"{side}_noise_model.safetensors",
                adapter_name="few",
                load_into_transformer_2=second,
            )
    assert said == []
    for transformer, side in ((pipe.transformer, "high"), (pipe.transformer_2, "low")):
        wanted = expected(DEEP, AdapterFile(sides[side]))
        assert (answer(transformer, DEEP) - wanted).abs().max() < 1e-5


def test_a_folder_loads_by_its_name_alone(tmp_path: Path) -> None:
    factors = random_factors(layers_of())
    write_adapter(tmp_path / "few", factors)
    pipe = pipeline_of(theirs(DEEP, build_wan(DEEP).state_dict()))
    pipe.load_lora_weights(str(tmp_path / "few"))
    wanted = expected(DEEP, AdapterFile(factors))
    assert (answer(pipe.transformer, DEEP) - wanted).abs().max() < 1e-5


# ---- files that diffusers reads, read here


@pytest.mark.parametrize("alpha", [2.0, 16.0])
def test_alpha_of_a_kohya_file_means_the_same_here(alpha: float, tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    write_adapter(path, random_factors(layers_of(), mixed=True), layout="kohya")
    tensors = load_file(path)
    scaled = {k: torch.tensor(alpha) if k.endswith("alpha") else v for k, v in tensors.items()}
    save_file(scaled, path)
    difference = answer(loaded(DEEP, path), DEEP) - expected(DEEP, read_adapter(path))
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("rooted", [False, True])
def test_alpha_in_the_header_of_a_file_of_peft_means_the_same_here(
    rooted: bool, tmp_path: Path
) -> None:
    from peft import LoraConfig

    model = theirs(DEEP, build_wan(DEEP).state_dict())
    pattern = {"blocks.1.attn1.to_q": 8.0}
    model.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=2,
            alpha_pattern=pattern,
            rank_pattern={"proj_out": 3},
            use_rslora=rooted,
            target_modules=["to_q", "to_v", "net.2", "proj_out"],
            init_lora_weights=False,
        ),
        "mine",
    )
    model.save_lora_adapter(tmp_path, adapter_name="mine")
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.factors["head.head"].rank == 3
    assert (answer(model, DEEP) - expected(DEEP, adapter)).abs().max() < 1e-5


def test_a_bias_of_the_second_factor_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = theirs(DEEP, build_wan(DEEP).state_dict())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], lora_bias=True)
    model.add_adapter(config, "mine")
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_lora_adapter(tmp_path, adapter_name="mine")
    adapter = read_adapter(tmp_path)
    assert len(adapter.diffs) == 24
    assert (answer(model, DEEP) - expected(DEEP, adapter)).abs().max() < 1e-5


def test_factors_are_named_as_a_two_expert_model_names_its_weights() -> None:
    factors = {"head.head": LowRank(torch.ones(1, 2), torch.ones(3, 1))}
    named = AdapterFile(factors).of_expert("low")
    assert named.shapes() == {"low.head.head.weight": (3, 2)}
