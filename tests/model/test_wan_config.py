"""An official config.json: what is read from it, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.wan.config import PRESETS, WanConfig, read_wan_config, write_wan_config

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
        ({"model_type": "vace"}, "model_type must be t2v or i2v, got 'vace'"),
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
