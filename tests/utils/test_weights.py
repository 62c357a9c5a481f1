"""Weight files of all kinds into modules, and the messages about those that do not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.weights import (
    WeightFile,
    WeightsError,
    check_fits,
    fill_weights,
    load_weights,
    official_name,
    write_weights,
)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))


def tensors() -> dict[str, Tensor]:
    """Values for `module`, each its own."""
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4)}
    return {
        name: torch.arange(torch.Size(shape).numel()).float().view(shape) + len(name)
        for name, shape in shapes.items()
    }


def assert_loads(path: Path) -> None:
    target = module()
    load_weights(target, WeightFile(path), what="a test")
    state = target.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors().items())


def error_of(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_weights(module(), WeightFile(path), what="a test")
    return str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_written_weights_are_read_back(tmp_path: Path, name: str) -> None:
    write_weights(tensors(), tmp_path / name, {"made": "by a test"})
    assert_loads(tmp_path / name)


def test_an_index_gathers_its_shards(tmp_path: Path) -> None:
    values = tensors()
    save_file({"0.weight": values.pop("0.weight")}, tmp_path / "1.safetensors")
    save_file(values, tmp_path / "2.safetensors")
    files = dict.fromkeys(values, "2.safetensors") | {"0.weight": "1.safetensors"}
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_loads(index)


def test_an_index_names_the_shards_that_are_missing(tmp_path: Path) -> None:
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "1.safetensors"}}))
    message = f"{index}: lists files that are missing: ['{tmp_path}/1.safetensors']"
    assert error_of(index) == message


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(text)
    assert error_of(index).startswith(f"{index}: not readable as weights: ")


@pytest.mark.parametrize("key", ["generator", "generator_ema", "model"])
@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_checkpoints_of_other_trainers_load(tmp_path: Path, key: str, prefix: str) -> None:
    torch.save({key: {prefix + n: v for n, v in tensors().items()}}, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt")


def two_kinds(path: Path) -> Path:
    """A .pt file with a generator of zeros and its average, which has the values of `tensors`."""
    zeros = {name: torch.zeros_like(value) for name, value in tensors().items()}
    torch.save({"generator": zeros, "generator_ema": tensors()}, path)
    return path


@pytest.mark.parametrize(("averaged", "found"), [(None, True), (True, True), (False, False)])
def test_of_a_generator_and_its_average_the_asked_one_is_read(
    tmp_path: Path, averaged: bool | None, found: bool
) -> None:
    weights = WeightFile(two_kinds(tmp_path / "w.pt"), averaged=averaged)
    assert torch.equal(weights.read("0.bias"), tensors()["0.bias"]) is found


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_an_average_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    write_weights(tensors(), tmp_path / name, {})
    with pytest.raises(WeightsError) as caught:
        WeightFile(tmp_path / name, averaged=True)
    assert str(caught.value) == (
        f"{tmp_path / name}: holds no averaged weights beside its own; ask for the regular ones"
    )


def test_wrappers_segments_are_removed_wherever_they_stand() -> None:
    wrapped = "model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.norm3.bias"
    assert official_name(wrapped) == "blocks.0.norm3.bias"


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    write_weights(tensors(), tmp_path / "w.safetensors", {})
    rows = WeightFile(tmp_path / "w.safetensors").read("0.weight", slice(1, 3))
    assert torch.equal(rows, tensors()["0.weight"][1:3])


def test_shapes_are_known_without_reading(tmp_path: Path) -> None:
    write_weights(tensors(), tmp_path / "w.safetensors", {})
    shapes = WeightFile(tmp_path / "w.safetensors").shapes()
    assert shapes == {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4)}


def test_weights_are_cast_to_the_dtype_of_the_module(tmp_path: Path) -> None:
    halves = {name: value.to(torch.bfloat16) for name, value in tensors().items()}
    write_weights(halves, tmp_path / "w.safetensors", {})
    assert_loads(tmp_path / "w.safetensors")


def test_a_mismatch_lists_missing_unexpected_and_reshaped_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights({"0.weight": torch.zeros(4, 5), "0.bias": torch.zeros(4), "x": torch.zeros(1)},
                  path, {})  # fmt: skip
    assert error_of(path) == (
        f"{path} does not fit a test: 1 weights missing ['1.weight'], 1 unexpected ['x'], "
        "1 of another shape ['0.weight is (4, 5), expected (4, 3)']; "
        "is it a checkpoint of another architecture?"
    )


def test_a_module_without_storage_can_be_checked(tmp_path: Path) -> None:
    write_weights(tensors(), tmp_path / "w.safetensors", {})
    with torch.device("meta"):
        check_fits(module(), WeightFile(tmp_path / "w.safetensors"), what="a test")


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (marker,)

    torch.save({"0.weight": Evil()}, tmp_path / "w.pt")
    assert "not a file of plain tensors" in error_of(tmp_path / "w.pt")
    assert not marker.exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"0.weight": 1}))
    assert "not a file of plain tensors" in error_of(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], 7])
def test_a_file_without_names_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert error_of(tmp_path / "w.pt").startswith(f"{tmp_path}/w.pt: ")


@pytest.mark.parametrize("left", [0, 4, 200])
def test_a_safetensors_file_that_was_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(tensors(), path, {})
    path.write_bytes(path.read_bytes()[:left])
    assert error_of(path).startswith(f"{path}: not readable as weights: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "w.pt") == f"{tmp_path}/w.pt: no such weight file"


def test_weights_are_not_written_to_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"written to .safetensors or .pt files"):
        write_weights(tensors(), tmp_path / "w.bin", {})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(tensors(), path, {})
    with pytest.raises(TypeError):
        write_weights(tensors(), path, {"step": 3})  # type: ignore[dict-item]
    assert_loads(path)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_each_weight_is_filled_by_name_and_shape() -> None:
    target = module()
    fill_weights(target, lambda name, shape: torch.full(shape, float(len(name))))
    assert {name: float(v.mean()) for name, v in target.state_dict().items()} == {
        "0.weight": 8.0,
        "0.bias": 6.0,
        "1.weight": 8.0,
    }
