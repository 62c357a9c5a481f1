"""Weight files of all kinds into modules, and the messages about those that do not fit."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.weights import (
    MissingFilesError,
    WeightFile,
    WeightsError,
    check_fits,
    fill_weights,
    load_weights,
    plain_name,
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
    with pytest.raises(MissingFilesError):
        WeightFile(index)


def write_index(folder: Path) -> Path:
    """`tensors` in two files and their index, under names of wrappers."""
    values = {f"model.{name}": value for name, value in tensors().items()}
    last = values.pop("model.0.weight")
    save_file(values, folder / "1.safetensors")
    save_file({"model.0.weight": last}, folder / "2.safetensors")
    files = dict.fromkeys(values, "1.safetensors") | {"model.0.weight": "2.safetensors"}
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index


def test_shapes_are_read_once_per_file_and_come_in_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def opening(path: Path, framework: str) -> object:
        opened.append(path.name)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("utils.weights.safe_open", opening)
    weights = WeightFile(write_index(tmp_path))
    assert list(weights.shapes()) == ["0.bias", "1.weight", "0.weight"]
    assert list(weights.shapes()) == ["0.bias", "1.weight", "0.weight"]
    assert opened == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("left", [0, 4, 100])
def test_a_shard_that_was_cut_off_is_named(tmp_path: Path, left: int) -> None:
    index, shard = write_index(tmp_path), tmp_path / "2.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    message = error_of(index)
    assert message.startswith(f"{shard}: not readable as weights: ")
    assert message.endswith("; was it cut off?")


@pytest.mark.parametrize(
    "prefix",
    ["model.", "_fsdp_wrapped_module.model.", "_orig_mod.model._checkpoint_wrapped_module."],
)
def test_prefixes_are_stripped_in_safetensors_files_too(tmp_path: Path, prefix: str) -> None:
    write_weights({prefix + n: v for n, v in tensors().items()}, tmp_path / "w.safetensors", {})
    assert_loads(tmp_path / "w.safetensors")


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = tensors() | {"model.0.bias": torch.zeros(4)}
    write_weights(twice, tmp_path / "w.safetensors", {})
    assert error_of(tmp_path / "w.safetensors") == f"{tmp_path}/w.safetensors: holds '0.bias' twice"


def test_a_file_in_the_format_before_archives_loads(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "w.pth")


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


def test_a_critic_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in tensors().items()}
    torch.save({"generator": zeros, "critic": tensors()}, tmp_path / "w.pt")
    weights = WeightFile(tmp_path / "w.pt", role="critic", averaged=False)
    assert torch.equal(weights.read("0.bias"), tensors()["0.bias"])
    with pytest.raises(WeightsError, match="holds no critic; ask for the generator"):
        WeightFile(tmp_path / "w.pt", role="critic", averaged=True)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_critic_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    write_weights(tensors(), tmp_path / name, {})
    with pytest.raises(WeightsError) as caught:
        WeightFile(tmp_path / name, role="critic")
    assert str(caught.value) == f"{tmp_path / name}: holds no critic; ask for the generator"


def test_wrappers_segments_are_removed_wherever_they_stand() -> None:
    wrapped = "model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.norm3.bias"
    assert plain_name(wrapped) == "blocks.0.norm3.bias"


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
    assert error_of(tmp_path / "w.pt") == (
        f"{tmp_path}/w.pt: not a file of plain tensors: it wants to run code (getattr), which is "
        "refused; save tensors alone"
    )
    assert not marker.exists()


def test_a_pickle_that_wants_a_module_of_the_system_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"0.weight": Evil()}, tmp_path / "w.pt")
    assert "it wants to run code (posix.mkdir), which is refused" in error_of(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_an_object_of_another_package_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"config": PurePosixPath("x"), "model": tensors()}, tmp_path / "w.pt")
    assert "it wants to run code (pathlib.PurePosixPath)" in error_of(tmp_path / "w.pt")


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


def test_a_name_that_a_pt_file_holds_twice_is_refused(tmp_path: Path) -> None:
    torch.save({"0.bias": torch.zeros(4), "model.0.bias": torch.ones(4)}, tmp_path / "w.pt")
    assert error_of(tmp_path / "w.pt") == f"{tmp_path}/w.pt: holds '0.bias' twice"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not weights at all", "it is damaged, cut off, or nothing that torch.save wrote"),
        (bytes(5000), "it is damaged, cut off, or nothing that torch.save wrote"),
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "it is a web page; download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "it is a pointer of git lfs; fetch the file itself with: git lfs pull",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_told_without_advice_to_run_its_code(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        WeightFile(path)
    assert str(caught.value).startswith(f"{path}: not a file of plain tensors: {reason}")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_told_as_such(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(10000)}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(WeightsError, match="it is damaged, cut off, or nothing"):
        WeightFile(path)


def test_a_pointer_of_git_lfs_in_the_place_of_safetensors_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match="fetch the file itself with: git lfs pull"):
        WeightFile(path)
