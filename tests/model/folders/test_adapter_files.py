"""Adapter files of every tool come in with their scales and go out again; others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.folders.adapter_files import AdapterFile, LowRank, check_adapter, read_adapter
from model.folders.adapter_writing import write_adapter
from model.wan.adapter_names import LAYOUTS, Layout, layout_of, read_key
from model.wan.weights import to_diffusers
from tests.adapters import DEEP, adapter_checkpoint, header_of, layers_of, random_factors
from tests.conftest import build_wan
from tests.runs import unequal
from utils.errors import ExistsError
from utils.seeding import generator
from utils.weights import WeightsError, write_weights

Q = "blocks.0.self_attn.q"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "file"))


def flat(factors: dict[str, LowRank]) -> dict[str, Tensor]:
    """Both factors of each layer, named."""
    return {f"{name}.{k}": v for name, pair in factors.items() for k, v in pair._asdict().items()}


def file_of(tmp_path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    path = tmp_path / "some.safetensors"
    write_weights(tensors, path, header)
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """What the file at `path` adds to each weight."""
    adapter = read_adapter(path)
    return {name: adapter.delta(name) for name in adapter.shapes()}


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_adapter(path)
    return str(caught.value)


# ---- there and back


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_factors_travel_between_layouts_bit_for_bit(
    first: Layout, second: Layout, tmp_path: Path
) -> None:
    both_hold_all = "kohya" not in (first, second)
    factors = random_factors(layers_of(embeddings=both_hold_all), mixed=True)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    write_adapter(there, factors, layout=first)
    write_adapter(back, read_adapter(there).factors, layout=second)
    assert unequal(flat(dict(read_adapter(back).factors)), flat(factors)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_folded_once_and_stay_folded(layout: Layout, tmp_path: Path) -> None:
    names = [f"lora_unet_{layer.replace('.', '_')}" for layer in layers_of()]
    shapes = build_wan(DEEP).state_dict()
    tensors: dict[str, Tensor] = {}
    for layer, name in zip(layers_of(), names, strict=True):
        rows, columns = shapes[f"{layer}.weight"].shape
        tensors |= {
            f"{name}.lora_down.weight": noise(4, columns),
            f"{name}.lora_up.weight": noise(rows, 4),
            f"{name}.alpha": torch.tensor(2.0),
        }
    folded = read_adapter(file_of(tmp_path, tensors))
    assert torch.equal(folded.factors[Q].b, 0.5 * tensors[f"{names[0]}.lora_up.weight"])
    write_adapter(tmp_path / "again.safetensors", folded.factors, layout=layout)
    again = read_adapter(tmp_path / "again.safetensors")
    assert unequal(flat(dict(again.factors)), flat(dict(folded.factors))) == []


def test_every_key_of_the_official_layout_is_an_official_name_and_a_known_suffix(
    tmp_path: Path,
) -> None:
    path = tmp_path / "few.safetensors"
    write_adapter(path, random_factors(layers_of(embeddings=True)), layout="comfyui")
    official = {f"diffusion_model.{name}" for name in build_wan(DEEP).state_dict()}
    keys = list(load_file(path))
    stems = {key.rpartition(".lora_")[0] for key in keys}
    assert {key.removeprefix(stem) for key in keys for stem in [key.rpartition(".lora_")[0]]} == {
        ".lora_down.weight",
        ".lora_up.weight",
    }
    assert {f"{stem}.weight" for stem in stems} <= official
    assert len(stems) == 12 * 10 + 6


def test_kohya_files_say_alpha_and_no_others_do(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.safetensors"
        write_adapter(path, random_factors(layers_of(), mixed=True), layout=layout)
        tensors = load_file(path)
        alphas = {k: v for k, v in tensors.items() if k.endswith("alpha")}
        assert len(alphas) == (120 if layout == "kohya" else 0)
        for key, alpha in alphas.items():
            assert float(alpha) == len(tensors[key.replace("alpha", "lora_down.weight")])


def test_the_header_of_a_diffusers_file_says_rank_alpha_and_modules(tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    write_adapter(path, random_factors([Q, "head.head"]), metadata={"steps": "4"})
    header = header_of(path)
    assert header["steps"] == "4"
    settings = json.loads(header["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4
    assert settings["transformer.target_modules"] == ["blocks.0.attn1.to_q", "proj_out"]


def test_two_experts_are_a_folder_with_a_file_each(tmp_path: Path) -> None:
    high, low = random_factors([Q], seed=1), random_factors([Q], seed=2)
    factors = {f"high.{Q}": high[Q], f"low.{Q}": low[Q]}
    written = write_adapter(tmp_path / "few", factors, metadata={"steps": "4"})
    names = ["high_noise_model.safetensors", "low_noise_model.safetensors"]
    assert [path.name for path in written.files] == names
    assert header_of(written.files[1])["expert"] == "low"
    assert unequal(flat(dict(read_adapter(tmp_path / "few").factors)), flat(factors)) == []
    assert unequal(flat(dict(read_adapter(written.files[1]).factors)), flat(low)) == []


def test_one_expert_alone_is_a_folder_too(tmp_path: Path) -> None:
    factors = {f"low.{Q}": random_factors([Q])[Q]}
    write_adapter(tmp_path / "few", factors)
    assert list(read_adapter(tmp_path / "few").factors) == [f"low.{Q}"]


def test_bf16_files_say_how_far_each_product_moved(tmp_path: Path) -> None:
    factors = random_factors([Q, "head.head"])
    path = tmp_path / "few.safetensors"
    written = write_adapter(path, factors, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}
    for layer, pair in factors.items():
        moved = read_adapter(path).factors[layer].delta() - pair.delta()
        assert written.errors[layer] == pytest.approx(float(moved.norm() / pair.delta().norm()))
        assert 1e-4 < written.errors[layer] < 1e-2
    assert set(write_adapter(path, factors).errors.values()) == {0.0}


# ---- what others write


@pytest.mark.parametrize(
    "key",
    [
        "transformer.blocks.0.attn1.to_q.{}.weight",
        "base_model.model.blocks.0.self_attn.q.{}.default.weight",
        "blocks.0.self_attn.q.{}.weight",
        "diffusion_model.blocks.0.self_attn.q.{}.weight",
    ],
)
def test_factors_are_found_under_the_names_of_several_tools(key: str, tmp_path: Path) -> None:
    a, b = noise(4, 8), noise(6, 4)
    path = file_of(tmp_path, {key.format("lora_A"): a.half(), key.format("lora_B"): b.half()})
    assert (
        unequal(
            flat(dict(read_adapter(path).factors)),
            {f"{Q}.a": a.half().float(), f"{Q}.b": b.half().float()},
        )
        == []
    )


def test_whole_differences_are_added_to_weights_biases_and_modulation(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": noise(4, 8),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": noise(6, 4),
        "diffusion_model.blocks.0.self_attn.q.diff_b": noise(6),
        "diffusion_model.blocks.0.norm3.diff": noise(8),
        "diffusion_model.blocks.0.diff_m": noise(1, 6, 8),
        "diffusion_model.patch_embedding.diff": noise(8, 16, 1, 2, 2),
    }
    found = deltas(file_of(tmp_path, tensors))
    assert sorted(found) == [
        "blocks.0.modulation",
        "blocks.0.norm3.weight",
        f"{Q}.bias",
        f"{Q}.weight",
        "patch_embedding.weight",
    ]
    assert torch.equal(found[f"{Q}.bias"], tensors["diffusion_model.blocks.0.self_attn.q.diff_b"])


def test_strength_moves_factors_and_differences_alike() -> None:
    adapter = AdapterFile({Q: LowRank(noise(2, 3), noise(4, 2))}, {f"{Q}.bias": noise(4)})
    for name in adapter.shapes():
        assert torch.allclose(adapter.scaled(0.5).delta(name), 0.5 * adapter.delta(name))


def test_settings_beside_a_file_of_peft_are_read(tmp_path: Path) -> None:
    a, b = noise(4, 8), noise(6, 4)
    name = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
    path = tmp_path / "adapter_model.safetensors"
    write_weights({name.format("A"): a, name.format("B"): b}, path, {})
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}', encoding="utf-8")
    assert torch.equal(read_adapter(path).factors[Q].b, 2 * b)


def test_the_layout_is_decided_in_the_order_of_diffusers() -> None:
    official, kohya, peft = (
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
    )
    assert layout_of([peft, kohya, official]) == "comfyui"
    assert layout_of([peft, kohya]) == "kohya"
    assert layout_of([peft]) == "diffusers"


@pytest.mark.parametrize("layer", layers_of(embeddings=True, clip=True))
def test_every_layer_is_found_under_its_name_in_diffusers(layer: str) -> None:
    entry = read_key(f"transformer.{to_diffusers(layer)}.lora_B.weight", "diffusers")
    assert entry == ("b", layer)


# ---- training checkpoints


def test_a_checkpoint_and_the_log_directory_around_it_hold_an_adapter(tmp_path: Path) -> None:
    factors = random_factors([Q, "head.head"])
    step = adapter_checkpoint(tmp_path / "run", factors)
    for path in (step, tmp_path / "run"):
        adapter = read_adapter(path, averaged=False)
        assert unequal(flat(dict(adapter.factors)), flat(factors)) == []
        assert adapter.path == step
    average = read_adapter(tmp_path / "run")
    assert torch.equal(average.factors[Q].b, 0.5 * factors[Q].b)
    assert torch.equal(average.factors[Q].a, factors[Q].a)


def test_a_critics_adapter_is_read_by_its_role(tmp_path: Path) -> None:
    factors = random_factors([f"blocks.{i}.self_attn.q" for i in range(2)])
    step = adapter_checkpoint(tmp_path / "run", factors, role="critic")
    adapter = read_adapter(step, role="critic")
    assert unequal(flat(dict(adapter.factors)), flat(factors)) == []
    with pytest.raises(WeightsError, match=r"holds no 'ema\.generator'"):
        read_adapter(step)


# ---- what is refused


def test_names_of_another_model_are_told_with_the_nearest_known_ones(tmp_path: Path) -> None:
    names = [f"transformer.blocks.{i}.attn1.to_kk.lora_{k}.weight" for i in range(2) for k in "AB"]
    path = file_of(tmp_path, {name: noise(4, 4) for name in names})
    near = names[0].replace("to_kk", "to_k")
    message = refusal(path)
    assert message.startswith(
        f"{path}: not an adapter of a Wan transformer: 4 of its 4 names are unknown in the "
        f"diffusers layout: {names[0]} (nearest: {near}), {names[1]} (nearest: "
    )
    assert names[2] in message and names[3] not in message


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "it is empty"),
        ({"patch_embedding.weight": noise(2)}, "is a whole network and no adapter"),
        ({f"{Q}.lora_A.weight": noise(4, 8)}, f"{Q} lacks one of its factors (lora_B)"),
        ({f"{Q}.alpha": torch.tensor(4.0)}, f"{Q} lacks one of its factors"),
        (
            {f"{Q}.lora_A.weight": noise(4, 8), f"{Q}.lora_B.weight": noise(6, 3)},
            "[4, 8] and [6, 3], expected [r, in] and [out, r]",
        ),
        (
            {f"{Q}.lora_A.weight": noise(4, 8), f"transformer.{Q}.lora_A.weight": noise(4, 8)},
            f"holds a of {Q} twice",
        ),
        (
            {f"{Q}.lora_A.weight": noise(4, 8), f"{Q}.dora_scale": noise(4)},
            "not a plain product of two factors (DoRA",
        ),
        (
            {f"{Q}.lora_A.weight": noise(4, 8).to(torch.float8_e4m3fn)},
            "is float8_e4m3fn, a quantised format",
        ),
    ],
)
def test_what_cannot_be_read_says_why(
    tensors: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(file_of(tmp_path, tensors))


def test_a_header_that_is_no_json_is_told(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": noise(4, 8), f"{Q}.lora_B.weight": noise(6, 4)}
    path = file_of(tmp_path, tensors, lora_adapter_metadata="{")
    assert f"{path}: lora_adapter_metadata is not readable: " in refusal(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "no weights here" in refusal(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("layers", "path", "layout", "reason"),
    [
        (
            [Q],
            "a.safetensors",
            "kohya",
            "needs all ten matrices of every block, and blocks.0.cross_",
        ),
        (
            [*layers_of(), "head.head"],
            "a.safetensors",
            "kohya",
            "into blocks alone, and there is h",
        ),
        ([f"low.{Q}"], "a.safetensors", "diffusers", "of two experts is a folder with a file for"),
        ([Q], "a.pt", "diffusers", "written to a .safetensors file, or to a new folder"),
        ([], "a.safetensors", "diffusers", "there is nothing to write"),
        ([Q], "a.safetensors", "peft", "must be one of diffusers, comfyui, kohya"),
    ],
)
def test_what_cannot_be_written_says_why_and_leaves_nothing(
    layers: list[str], path: str, layout: Layout, reason: str, tmp_path: Path
) -> None:
    plain = random_factors([layer.removeprefix("low.") for layer in layers])
    factors = dict(zip(layers, plain.values(), strict=True))
    with pytest.raises(WeightsError, match=reason):
        write_adapter(tmp_path / path, factors, layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExistsError, match="give a new or an empty folder"):
        write_adapter(tmp_path, random_factors([Q]))


# ---- whether it fits


def shapes(prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + n: tuple(v.shape) for n, v in build_wan(DEEP).state_dict().items()}


@pytest.mark.parametrize(
    ("layer", "base", "reason"),
    [
        (
            Q,
            shapes(),
            "have another shape (blocks.0.self_attn.q.weight is [3, 2], expected [32, 32])",
        ),
        (
            "blocks.12.ffn.0",
            shapes(),
            "blocks.12.ffn.0.weight; it was made for a model with more bl",
        ),
        ("blocks.0.cross_attn.k_img", shapes(), "made for a model that sees images through CLIP"),
        (Q, shapes("high."), "say which it is for with high=path or low=path"),
        (f"high.{Q}", shapes(), "it was made for the experts of another model"),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_what_it_is_for(
    layer: str, base: dict[str, tuple[int, ...]], reason: str
) -> None:
    adapter = AdapterFile({layer: LowRank(noise(1, 2), noise(3, 1))}, path=Path("few.safetensors"))
    with pytest.raises(WeightsError) as caught:
        check_adapter(adapter, base, what="the base")
    assert reason in str(caught.value)


def test_an_adapter_that_fits_is_accepted() -> None:
    check_adapter(AdapterFile(random_factors(layers_of(embeddings=True))), shapes(), what="it")
