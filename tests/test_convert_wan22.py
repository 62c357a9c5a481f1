"""convert_checkpoint.py on Wan2.2: two experts in one file or folder, and each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import convert_checkpoint
from model.families.registry import identify_weights, open_model
from model.families.wan21 import Wan21
from model.families.wan21.folder import ModelFolder
from model.families.wan22 import Wan22Experts
from model.wan.weights import to_diffusers
from tests.commands import own_logging, refusal
from tests.folders import make_experts, make_official
from tests.runs import unequal
from utils.weights import WeightFile, Weights, write_weights

__all__ = ["own_logging"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A release of two experts that are given an image."""
    return make_experts(tmp_path_factory.mktemp("release") / "i2v", "i2v")


def words(source: Path, target: Path, *more: str) -> list[str]:
    return ["--input_path", str(source), "--output_path", str(target), *more]


def values(weights: Weights) -> dict[str, Tensor]:
    return {name: weights.read(name) for name in weights.shapes()}


def test_both_experts_go_through_diffusers_layout_and_back(
    release: ModelFolder, tmp_path: Path
) -> None:
    one, two = tmp_path / "diffusers", tmp_path / "official"
    assert convert_checkpoint.main(words(release.path, one, "--layout", "diffusers")) == 0
    assert convert_checkpoint.main(words(one, two, "--layout", "official")) == 0
    assert {"transformer", "transformer_2"} <= {path.name for path in one.iterdir()}
    expected = values(open_model(release.path).find_weights())
    for folder in (one, two):
        model = open_model(folder)
        model.check()
        assert type(model) is Wan22Experts
        assert unequal(values(model.find_weights()), expected) == []


def test_both_experts_go_into_one_file_and_back_into_a_folder(
    release: ModelFolder, tmp_path: Path
) -> None:
    expected = values(open_model(release.path).find_weights())
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pt"
    assert convert_checkpoint.main(words(release.path, ours)) == 0
    assert convert_checkpoint.main(words(ours, theirs, "--naming", "diffusers")) == 0
    assert unequal(values(WeightFile(ours)), expected) == []
    renamed = {}
    for name, value in expected.items():
        side, _, own = name.partition(".")
        renamed[f"{side}.{to_diffusers(own)}"] = value
    assert unequal(values(WeightFile(theirs)), renamed) == []
    flags = ("--layout", "diffusers", "--model_folder", str(release.path), "--dtype", "bfloat16")
    assert convert_checkpoint.main(words(theirs, tmp_path / "folder", *flags)) == 0
    found = values(open_model(tmp_path / "folder").find_weights())
    assert unequal(found, {name: value.bfloat16() for name, value in expected.items()}) == []


@pytest.mark.parametrize("home", ["high_noise_model", "low_noise_model"])
def test_one_expert_s_folder_becomes_a_file_of_plain_names(
    home: str, release: ModelFolder, tmp_path: Path
) -> None:
    target = tmp_path / "one.safetensors"
    assert convert_checkpoint.main(words(release.path / home, target)) == 0
    side = home.partition("_")[0]
    both = open_model(release.path).find_weights()
    expected = {
        name.removeprefix(f"{side}."): both.read(name)
        for name in both.shapes()
        if name.startswith(f"{side}.")
    }
    assert unequal(values(WeightFile(target)), expected) == []
    assert identify_weights(target)[0] is Wan21  # whose names and shapes these are


def test_ti2v_becomes_a_file_and_a_folder(tmp_path: Path) -> None:
    source = make_official(tmp_path / "ti2v", "ti2v")
    target = tmp_path / "one.safetensors"
    assert convert_checkpoint.main(words(source.path, target, "--naming", "diffusers")) == 0
    flags = ("--layout", "diffusers", "--model_folder", str(source.path))
    assert convert_checkpoint.main(words(target, tmp_path / "folder", *flags)) == 0
    ours, theirs = (open_model(path) for path in (source.path, tmp_path / "folder"))
    assert type(ours) is type(theirs)
    assert unequal(values(theirs.find_weights()), values(ours.find_weights())) == []


def test_one_expert_is_no_folder_of_two(
    release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = release.path / "high_noise_model"
    flags = ("--layout", "diffusers", "--model_folder", str(release.path))
    line = words(path, tmp_path / "folder", *flags)
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"{path}: holds one network, where those of two experts are wanted; give a folder of both, "
        "or a file whose names begin with high. and low."
    )
    assert list(tmp_path.iterdir()) == []


def test_scaled_weights_of_eight_bits_are_refused_in_a_line(
    release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, path = open_model(release.path).only("high").find_weights(), tmp_path / "fp8.pt"
    tensors = {
        n: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for n, v in values(weights).items()
    }
    write_weights({**tensors, "scaled_fp8": torch.zeros(2)}, path, {})
    message = refusal(convert_checkpoint.main, words(path, tmp_path / "file.pt"), capsys)
    assert message.startswith(f"{path}: holds quantised weights (scaled_fp8 of dtype ")
