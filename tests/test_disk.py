"""A disk that takes no more, in training and conversion: one line, and nothing torn is left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import convert_checkpoint
import train
from tests.commands import main_and_stderr, own_logging
from tests.disks import largest_file, on_small_disk
from tests.folders import make_diffusers, make_official
from tests.ranks import run_on_ranks
from tests.runs import write_config
from utils.files import replaced_atomically, writing
from utils.weights import write_weights

__all__ = ["own_logging"]

FULL = "file too large; the file system, or `ulimit -f`, allows no larger file"
ROOM = "no space left on device; make room, then run the same command again"
TENSORS: dict[str, Tensor] = {"weight": torch.zeros(300, 300)}


def errors(text: str) -> list[str]:
    """The lines of stderr that tell an error; none of them may be a traceback's."""
    assert "Traceback" not in text
    assert "inline_container" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("disk"), tiny_root, "diffusion")


def words(config: Path, logdir: Path, *more: str) -> list[str]:
    return ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", *more]


def test_a_full_disk_ends_a_run_with_a_line_and_keeps_the_last_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words(config, tmp_path, "steps=1")) == 0
    capsys.readouterr()
    with largest_file(2**16):
        assert train.main(words(config, tmp_path, "steps=2")) == 2
    (line,) = errors(capsys.readouterr().err)
    checkpoints = tmp_path / "checkpoints"
    assert line == f"error: {checkpoints}/step_000002.tmp/__0_0.distcp: {FULL}"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000001"]
    assert train.main(words(config, tmp_path, "steps=2")) == 0


def train_on_a_full_disk(line: list[str], rank: int | None) -> tuple[int, str]:
    """Train where the files of one rank, or of all, cannot grow."""

    def main(words: object) -> int:
        full = rank is None or int(os.environ["RANK"]) == rank
        with largest_file(2**14) if full else contextlib.nullcontext():
            return train.main(line)

    return main_and_stderr(main, line)


@pytest.mark.parametrize(("rank", "told"), [(None, [0, 1]), (1, [1])])
def test_of_several_ranks_the_main_one_tells_whose_disk_is_full(
    rank: int | None, told: list[int], config: Path, tmp_path: Path
) -> None:
    line = words(config, tmp_path, "steps=1")
    (status, text), quiet = run_on_ranks(2, train_on_a_full_disk, line, rank)
    assert (status, quiet[0], errors(quiet[1])) == (2, 2, [])
    part = tmp_path / "checkpoints" / "step_000001.tmp"
    assert errors(text) == [f"error: rank {n}: {part}/__{n}_0.distcp: {FULL}" for n in told]
    assert not part.exists()


@pytest.mark.parametrize("flags", [(), ("--naming", "diffusers"), ("--naming", "reference")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_ends_a_conversion_with_a_line_and_leaves_nothing(
    suffix: str,
    flags: tuple[str, ...],
    tiny_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "reference" in flags and suffix != ".pt":
        pytest.skip("the reference's dictionaries are of .pt files alone")
    source = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    target = tmp_path / f"file{suffix}"
    line = ["--input_path", str(source), "--output_path", str(target), *flags]
    with largest_file(2**14):
        assert convert_checkpoint.main(line) == 2
    assert errors(capsys.readouterr().err) == [f"error: {target}: {FULL}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_full_disk_ends_the_export_of_a_folder_with_a_line(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_official(tmp_path / "source")
    if layout == "official":
        source = make_diffusers(tmp_path / "twin", source)
    line = ["--input_path", str(source.path), "--output_path", str(tmp_path / "out")]
    with largest_file(2**14):
        assert convert_checkpoint.main([*line, "--layout", layout]) == 2
    (told,) = errors(capsys.readouterr().err)
    assert told.endswith(FULL)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def write_pt(path: Path) -> None:
    torch.save(TENSORS, path)


def write_bytes(path: Path) -> None:
    path.write_bytes(bytes(10**6))


@pytest.mark.parametrize("write", [write_pt, write_bytes])
def test_the_file_is_named_whatever_a_library_makes_of_a_full_disk(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    with (
        largest_file(2**14),
        pytest.raises(OSError, match="File too large") as caught,
        replaced_atomically(tmp_path / "file") as part,
    ):
        write(part)
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_fault_of_the_disk_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file"):
        (tmp_path / "file").write_bytes(bytes([1 // 0]))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_device_without_space_is_told_as_such(suffix: str, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from utils.errors import words\n"
        "from utils.weights import write_weights\n"
        f"path = Path(sys.argv[1]) / 'file{suffix}'\n"
        "try: write_weights({'w': torch.zeros(10**6)}, path, {})\n"
        "except OSError as error: print(words(error))"
    )
    assert on_small_disk(code, tmp_path, "1m") == f"{tmp_path}/file{suffix}: {ROOM}\n"


# ---- places that cannot be written


def test_a_log_directory_below_a_file_is_refused_before_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    logdir = tmp_path / "file" / "run"
    assert train.main(words(config, logdir)) == 2
    assert errors(capsys.readouterr().err) == [f"error: {tmp_path}/file/run: not a directory"]


def test_a_file_below_a_file_cannot_be_written(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    source, target = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny", tmp_path / "file" / "a.pt"
    line = ["--input_path", str(source), "--output_path", str(target)]
    assert convert_checkpoint.main(line) == 2
    assert errors(capsys.readouterr().err) == [f"error: {tmp_path}/file: file exists"]


def test_a_file_replaces_another_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_weights({"weight": torch.ones(3)}, path, {})
    before = path.read_bytes()
    with largest_file(2**14), pytest.raises(OSError, match="File too large"):
        write_weights(TENSORS, path, {})
    assert path.read_bytes() == before
