"""scripts/make_tiny_world.py: what it says where it cannot write."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.families.registry import open_model
from model.wan.config import PRESETS
from scripts import make_tiny_world
from tests.commands import refusal
from utils.data.shards import ShardReader


def test_a_folder_that_cannot_be_made_is_told_in_a_line(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["--model_root", f"{tiny_root}/wan_models", "--data_path", f"{tmp_path}/file/data"]
    message = refusal(make_tiny_world.main, words, capsys)
    assert message == f"{tmp_path}/file/data: not a directory"


def test_a_world_without_clips_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_root", str(tmp_path), "--data_path", str(tmp_path), "--clips", "0"]
    assert refusal(make_tiny_world.main, words, capsys) == "--clips: must be at least 1, got 0"


def test_the_script_makes_a_folder_of_each_kind_and_data_for_both_codecs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_tiny_world, "CODEC_CLIPS", 48)
    monkeypatch.setattr(make_tiny_world, "WIDE_CODEC_CLIPS", 48)
    models, data = tmp_path / "wan_models", tmp_path / "data"
    words = ["--model_root", str(models), "--data_path", str(data), "--clips", "8"]
    assert make_tiny_world.main(words) == 0
    names = {"Wan2.1-T2V-Tiny", "Wan2.1-I2V-Tiny", "Wan2.2-TI2V-Tiny"}
    names |= {"Wan2.2-T2V-A14B-Tiny", "Wan2.2-I2V-A14B-Tiny"}
    assert {path.name for path in models.iterdir()} == names
    for name in names:
        model = open_model(models / name)
        assert model.sizes == PRESETS[name]
        model.check(weights=False)
        stride = 16 if "TI2V" in name else 8
        assert model.latent.spatial_stride == stride
        latents = ShardReader(data / ("latents_16" if stride == 16 else "latents")).latents(7)
        assert latents.shape == (model.latent.channels, 5, 32 // stride, 32 // stride)
    assert sorted(path.name for path in data.iterdir()) == ["latents", "latents_16", "prompts.txt"]
    lacking = [line for line in capsys.readouterr().out.splitlines() if ": lacks " in line]
    assert len(lacking) == 5
