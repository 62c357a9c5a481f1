"""An official config.json: what is read from it, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.wan.config import (
    PRESETS,
    WanConfig,
    diffusers_config,
    read_wan_config,
    write_wan_config,
)

# The file of Wan2.1-T2V-1.3B, as it was released.
OFFICIAL = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "text_len": 512,
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(OFFICIAL | changes))
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_wan_config(path)
    return str(caught.value)


def test_an_official_file_gives_its_preset(tmp_path: Path) -> None:
    assert read_wan_config(write(tmp_path)) == PRESETS["Wan2.1-T2V-1.3B"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_preset_is_read_back(tmp_path: Path, name: str) -> None:
    write_wan_config(PRESETS[name], tmp_path / "config.json")
    assert read_wan_config(tmp_path / "config.json") == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible(name: str) -> None:
    assert PRESETS[name].problems() == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_heads": 0}, "num_heads must be a whole number above 0, got 0"),
        ({"dim": "1536"}, "dim must be a whole number above 0, got '1536'"),
        ({"num_layers": 1.5}, "num_layers must be a whole number above 0, got 1.5"),
        ({"num_heads": 7}, "num_heads=7 must divide dim=1536 into heads of even width"),
        ({"num_heads": 512}, "num_heads=512 must divide dim=1536 into heads of even width"),
        ({"model_type": "vace"}, "model_type must be t2v, ti2v, i2v or flf2v, got 'vace'"),
        ({"model_type": 3}, "model_type must be t2v, ti2v, i2v or flf2v, got 3"),
        ({"qk_norm": False}, "qk_norm must be True in Wan2.1, got False"),
        ({"cross_attn_norm": False}, "cross_attn_norm must be True in Wan2.1, got False"),
        ({"window_size": [4, 4]}, "window_size must be [-1, -1] in Wan2.1, got [4, 4]"),
        ({"image_tokens": 0}, "image_tokens must be a whole number above 0, got 0"),
        ({"patch_size": [2, 2, 2]}, "patch_size must not span frames, got (2, 2, 2)"),
        ({"patch_size": [2, 2]}, "patch_size must be three numbers, got (2, 2)"),
        ({"patch_size": 2}, "patch_size must be three numbers, got 2"),
        ({"freq_dim": 255}, "freq_dim must be even, got 255"),
        ({"in_dim": 36}, "in_dim must be out_dim + 0, got 36 and 16"),
        (
            {"in_dim": 16, "absolute_positions": True},
            "in_dim must be out_dim + 10, got 16 and 16",
        ),
        ({"in_dim": 16, "model_type": "i2v"}, "in_dim must be out_dim + 20, got 16 and 16"),
        ({"in_dim": 16, "model_type": "flf2v"}, "in_dim must be out_dim + 20, got 16 and 16"),
    ],
)
def test_impossible_sizes_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = write(tmp_path, **changes)
    assert error_of(path) == f"{path}: {problem}"


def test_unknown_and_missing_fields_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"dim": 8, "ffn_dim": 8, "num_heads": 2, "layers": 3}')
    message = error_of(path)
    assert message.startswith(f"{path}: not a Wan transformer's config: ")
    assert "missing ['num_layers'], unknown ['layers']" in message


def test_choices_that_all_wan_transformers_share_may_be_spelled_out(tmp_path: Path) -> None:
    path = write(tmp_path, qk_norm=True, cross_attn_norm=True, window_size=[-1, -1])
    assert read_wan_config(path) == PRESETS["Wan2.1-T2V-1.3B"]


# transformer/config.json of Wan2.1-I2V-14B-480P in diffusers' layout, as it was released.
DIFFUSERS = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": 5120,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": 1280,
    "in_channels": 36,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}

TI2V = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
TI2V |= {"in_channels": 48, "out_channels": 48}


def write_diffusers(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(DIFFUSERS | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "preset"),
    [
        ({}, "Wan2.1-I2V-14B"),
        ({"pos_embed_seq_len": None}, "Wan2.1-I2V-14B"),
        ({"pos_embed_seq_len": 514}, "Wan2.1-FLF2V-14B"),
        ({"image_dim": None, "added_kv_proj_dim": None, "in_channels": 16}, "Wan2.1-T2V-14B"),
        ({"image_dim": None, "added_kv_proj_dim": None}, "Wan2.2-I2V-A14B"),
        ({**TI2V, "image_dim": None, "added_kv_proj_dim": None}, "Wan2.2-TI2V-5B"),
        (TI2V, "Wan2.2-TI2V-5B"),  # an early copy, which speaks of a branch that it has not
    ],
)
def test_a_diffusers_file_gives_its_preset(
    tmp_path: Path, changes: dict[str, Any], preset: str
) -> None:
    assert read_wan_config(write_diffusers(tmp_path, **changes)) == PRESETS[preset]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"qk_norm": None}, "qk_norm must be 'rms_norm_across_heads' in Wan2.1, got None"),
        ({"vace_layers": [0]}, "not a Wan transformer's config: missing [], unknown ['vace_layers"),
        ({"num_attention_heads": "40"}, "num_attention_heads and attention_head_dim must be whole"),
        (
            {"added_kv_proj_dim": 1280},
            "added_kv_proj_dim must be 5120 with an image_dim, and null without, "
            "got 1280 with 1280",
        ),
        (
            {"image_dim": None},
            "added_kv_proj_dim must be 5120 with an image_dim, and null without, "
            "got 5120 with None",
        ),
        ({"pos_embed_seq_len": 257}, "pos_embed_seq_len must be an even number, of the tokens of"),
        ({"in_channels": 16}, "in_dim must be out_dim + 20, got 16 and 16"),
    ],
)
def test_impossible_diffusers_sizes_are_named(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    path = write_diffusers(tmp_path, **changes)
    assert error_of(path).startswith(f"{path}: {problem}")


CONVERTIBLE = [
    *(config for config in PRESETS.values() if not config.absolute_positions),
    WanConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=1, text_len=12),
    WanConfig(8, 8, 2, 1, model_type="i2v", in_dim=36, image_dim=80, image_tokens=5),
    WanConfig(8, 8, 2, 1, model_type="flf2v", in_dim=36, image_dim=80, image_tokens=5),
    WanConfig(8, 8, 2, 1, model_type="i2v", in_dim=36, text_len=12, clip=False),
    WanConfig(8, 8, 2, 1, model_type="ti2v", in_dim=8, out_dim=8),
]


@pytest.mark.parametrize("config", CONVERTIBLE, ids=str)
def test_sizes_survive_diffusers(tmp_path: Path, config: WanConfig) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(diffusers_config(config)))
    assert read_wan_config(path) == config


def test_a_released_model_gives_the_file_that_was_released() -> None:
    ours = json.loads(json.dumps(diffusers_config(PRESETS["Wan2.1-I2V-14B"])))
    assert ours.pop("pos_embed_seq_len") is None
    assert ours == {key: value for key, value in DIFFUSERS.items() if key != "_diffusers_version"}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (PRESETS["Wan2.1-T2V-Tiny"], "diffusers has no transformer with absolute positions"),
        (
            WanConfig(8, 8, 2, 1, model_type="i2v", in_dim=36, text_len=12),
            "text_len=12: diffusers' image-to-video transformers count on 512 rows of text",
        ),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(config: WanConfig, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        diffusers_config(config)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(("kind", "count"), [("t2v", 0), ("ti2v", 0), ("i2v", 1), ("flf2v", 2)])
def test_a_model_type_tells_how_many_images_it_sees(kind: str, count: int) -> None:
    config = WanConfig(8, 8, 2, 1, model_type=kind)
    assert config.image_count == count
    assert config.given_latents is config.reads_clip is (count > 0)


def test_only_a_model_that_is_given_an_image_alone_may_do_without_clip() -> None:
    sizes = {"dim": 8, "ffn_dim": 8, "num_heads": 2, "num_layers": 1}
    config = WanConfig(**sizes, model_type="i2v", in_dim=36, clip=False)
    assert config.problems() == []
    assert config.given_latents and not config.reads_clip
    for kind in ("t2v", "ti2v", "flf2v"):
        problems = WanConfig(**sizes, model_type=kind, clip=False).problems()
        assert f"clip must be true unless model_type is i2v, got '{kind}'" in problems
    assert WanConfig(**sizes, clip="no").problems() == ["clip must be true or false, got 'no'"]


def test_a_file_says_nothing_of_clip_where_official_ones_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for name, said in (("Wan2.1-I2V-14B", False), ("Wan2.2-I2V-A14B", True)):
        write_wan_config(PRESETS[name], path)
        assert ("clip" in json.loads(path.read_text())) is said
        assert read_wan_config(path) == PRESETS[name]


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert error_of(path).startswith(f"{path}: not readable as JSON: ")


def test_a_list_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    assert error_of(path) == f"{path}: must hold a JSON object, got list"


def test_the_width_of_a_head_is_its_share() -> None:
    assert WanConfig(dim=12, ffn_dim=1, num_heads=3, num_layers=1).head_dim == 4
