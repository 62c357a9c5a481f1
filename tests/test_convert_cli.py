"""convert_checkpoint.py as its user meets it: the same bits under official names, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import convert_checkpoint
from model.folder import WEIGHTS
from model.loading import Placement, load_network
from model.wan.config import WanConfig
from tests.commands import own_logging, refusal
from tests.runs import read_state, run, step_folder, unequal, write_config
from utils.weights import WeightFile

__all__ = ["own_logging"]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """A diffusion run of two steps, both saved, its average lagging behind."""
    folder = tmp_path_factory.mktemp("convert")
    config = write_config(folder, tiny_root, "diffusion")
    return run(config, folder / "run", "steps=2", "save_every=1", "ema.start_step=0")


def words(source: Path, target: Path, *more: str) -> list[str]:
    return ["--input_path", str(source), "--output_path", str(target), *more]


def weights_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file."""
    file = WeightFile(path)
    return {name: file.read(name) for name in file.shapes()}


def saved(logdir: Path, step: int, prefix: str) -> dict[str, Tensor]:
    """The generator's weights, or its average, in a checkpoint."""
    state = read_state(step_folder(logdir, step))
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("flags", "prefix"),
    [((), "roles.generator."), (("--use_ema",), "ema.generator."), (("--ema",), "ema.generator.")],
)
def test_a_converted_file_holds_the_bits_of_the_newest_checkpoint(
    suffix: str, flags: tuple[str, ...], prefix: str, logdir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / f"file{suffix}"
    assert convert_checkpoint.main(words(logdir, target, *flags)) == 0
    expected = saved(logdir, 2, prefix)
    assert len(expected) > 50
    assert unequal(weights_in(target), expected) == []
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_weights_and_average_differ(logdir: Path) -> None:
    regular, average = saved(logdir, 2, "roles.generator."), saved(logdir, 2, "ema.generator.")
    assert regular.keys() == average.keys()
    assert unequal(regular, average) != []


def test_a_step_folder_is_converted_as_that_step(logdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(step_folder(logdir, 1), target)) == 0
    assert unequal(weights_in(target), saved(logdir, 1, "roles.generator.")) == []


def test_a_converted_file_loads_into_the_network_bit_for_bit(
    logdir: Path, tiny_config: WanConfig, tmp_path: Path
) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target)) == 0
    place = Placement(torch.device("cpu"))
    network = load_network(tiny_config, WeightFile(target), place, what="the converted file")
    assert unequal(dict(network.model.state_dict()), saved(logdir, 2, "roles.generator.")) == []


def test_names_are_those_of_the_official_release(
    logdir: Path, tiny_root: Path, tmp_path: Path
) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target)) == 0
    official = WeightFile(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny" / WEIGHTS[1])
    assert WeightFile(target).shapes() == official.shapes()


def test_a_safetensors_file_says_where_it_comes_from(logdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target, "--use_ema")) == 0
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "source": str(step_folder(logdir, 2)),
            "weights": "ema",
        }


def test_a_file_is_converted_to_the_other_kind_and_back_unchanged(
    logdir: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / f"{i}" for i in ("a.safetensors", "b.pt", "c.safetensors"))
    for source, target in ((logdir, first), (first, second), (second, third)):
        assert convert_checkpoint.main(words(source, target)) == 0
    assert unequal(weights_in(third), weights_in(first)) == []


def test_dtype_rounds_each_weight_once(logdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target, "--dtype", "bfloat16")) == 0
    expected = {k: v.bfloat16() for k, v in saved(logdir, 2, "roles.generator.").items()}
    assert unequal(weights_in(target), expected) == []


# ---- bad input


def test_another_suffix_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "file.bin"
    assert refusal(convert_checkpoint.main, words(logdir, target), capsys) == (
        f"--output_path {target}: must end in .safetensors or .pt"
    )
    assert not target.exists()


def test_a_missing_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "nowhere"
    line = words(source, tmp_path / "file.pt")
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"{source}: no weights here; give a model folder, a .safetensors or .pt file, a training "
        "checkpoint (checkpoints/step_N), or the log directory of a run"
    )


def test_a_torn_checkpoint_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "step_000002"
    source.mkdir()
    for file in step_folder(logdir, 2).iterdir():
        (source / file.name).write_bytes(file.read_bytes()[:100])
    message = refusal(convert_checkpoint.main, words(source, tmp_path / "file.pt"), capsys)
    assert message.startswith(f"{source}: ")
    assert "manifest" in message


def test_the_average_of_a_file_without_one_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "file.pt"
    assert convert_checkpoint.main(words(logdir, source)) == 0
    line = words(source, tmp_path / "ema.pt", "--use_ema")
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"{source}: holds no averaged weights beside its own; ask for the regular ones"
    )
