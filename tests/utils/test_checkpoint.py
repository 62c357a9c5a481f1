"""Checkpoints on disk: whole or absent, found again, pruned."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import run_on_ranks
from utils import checkpoint
from utils.distributed import Session, distributed_session
from utils.hashes import content_hash
from utils.seeding import generator

ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(value: float) -> dict[str, dict[str, Tensor]]:
    return {"roles": {"weight": torch.full((3,), value)}}


def save(folder: Path, *steps: int) -> list[Path]:
    texts = {"config.yaml": "steps: 3\n"}
    return [checkpoint.save(folder, step, state(float(step)), texts, ALONE) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    """Cut the largest file of a checkpoint in half."""
    file = max(path.iterdir(), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    loaded = state(0.0)
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["roles"]["weight"], torch.full((3,), 7.0))


def test_a_checkpoint_carries_its_texts(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    assert (path / "config.yaml").read_text() == "steps: 3\n"


def test_a_checkpoint_is_named_by_its_step(tmp_path: Path) -> None:
    paths = save(tmp_path, 7, 1234567)
    assert [path.name for path in paths] == ["step_000007", "step_1234567"]
    assert [checkpoint.step_of(path) for path in paths] == [7, 1234567]


def test_the_newest_is_the_latest_by_number_and_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 999_999, 1_000_000)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1000000"


def test_the_latest_file_names_the_last_save(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert (tmp_path / "latest").read_text() == "step_000002\n"


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_absent_folder_has_no_latest(tmp_path: Path, exists: bool) -> None:
    assert checkpoint.latest(tmp_path if exists else tmp_path / "absent") is None


def test_nothing_but_the_checkpoint_is_left_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step_000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = checkpoint.save(tmp_path, 1, state(5.0), {}, ALONE)
    loaded = state(0.0)
    checkpoint.load(path, loaded)
    assert float(loaded["roles"]["weight"][0]) == 5.0
    assert not (path / "config.yaml").exists()


def test_the_manifest_lists_every_file_with_its_size_and_hash(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": content_hash(file)}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    assert (manifest["step"], manifest["files"]) == (1, files)


def test_a_torn_save_is_never_the_latest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.tmp")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000001"


def test_a_torn_save_is_overwritten_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "step_000002.tmp").mkdir()
    (tmp_path / "step_000002.tmp" / "rubbish").write_text("x")
    (path,) = save(tmp_path, 2)
    assert not (path / "rubbish").exists()


def test_pruning_removes_torn_saves(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.tmp")
    checkpoint.prune(tmp_path, 2, ALONE)
    assert names(tmp_path) == ["latest", "step_000001"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    checkpoint.prune(tmp_path, 2, ALONE)
    assert names(tmp_path) == ["latest", "step_000002", "step_000003"]


def test_a_damaged_checkpoint_is_not_counted_among_those_to_keep(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3)
    truncate(paths[2])
    checkpoint.prune(tmp_path, 2, ALONE)
    assert {"step_000001", "step_000002"} <= set(names(tmp_path))


def test_a_truncated_file_makes_the_previous_checkpoint_the_latest(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2)
    truncate(paths[1])
    assert checkpoint.latest(tmp_path) == paths[0]


def test_a_damaged_checkpoint_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = save(tmp_path, 1)
    (path / "config.yaml").write_text("")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) is None
    warnings = [
        record.getMessage() for record in caplog.records if record.name == checkpoint.__name__
    ]
    assert warnings == [
        f"skipping a damaged checkpoint: {path}: config.yaml has 0 bytes, its manifest says 9"
    ]


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    (path / ".metadata").unlink()
    assert str(checkpoint.problem(path)).startswith(f"{path}: .metadata has None bytes")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"files": 3}'])
def test_an_unreadable_manifest_is_a_problem(tmp_path: Path, content: bytes) -> None:
    (path,) = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(content)
    assert checkpoint.problem(path) == f"{path}: has no readable manifest.json"


def test_a_whole_checkpoint_has_no_problem(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    assert checkpoint.problem(path) is None


def test_other_files_of_the_folder_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_000009").write_text("a file")
    (tmp_path / "step_final").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000001"


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_metadata_that_want_to_run_code_are_refused(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"/\.metadata: .*run code \(posix\.mkdir\), .* refused"):
        checkpoint.load(path, state(0.0))
    assert not (tmp_path / "ran").exists()


def test_metadata_of_something_else_are_refused(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    (path / ".metadata").write_bytes(pickle.dumps({"step": 7}))
    with pytest.raises(ValueError, match=r"/\.metadata: holds no metadata but a dict"):
        checkpoint.load(path, state(0.0))


def test_an_object_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, {"step": Evil(tmp_path / "ran")}, {}, ALONE)
    with pytest.raises(BaseException, match=r"GLOBAL posix\.mkdir"):  # torch's own exception
        checkpoint.load(path, {"step": 0})
    assert not (tmp_path / "ran").exists()


def test_plain_objects_are_loaded(tmp_path: Path) -> None:
    held = {"step": 7, "names": ["a", "b"], "mean": {"x": 0.5, "y": None}}
    path = checkpoint.save(tmp_path, 7, held, {}, ALONE)
    loaded = {"step": 0, "names": ["", ""], "mean": {"x": 0.0, "y": None}}
    checkpoint.load(path, loaded)
    assert loaded == held


# ---- rows of a tensor


def bytes_read() -> int:
    """What this process has read so far, from files and from the page cache."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def save_sharded(folder: Path) -> None:
    """On two ranks: tensors of 5 and 1 rows, one of them cut, and one number."""
    with distributed_session(timeout_s=60.0) as session:
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.arange(30.0).view(5, 6)
        state = {
            "long": distribute_tensor(whole, mesh, [Shard(0)]),
            "wide": distribute_tensor(whole.T.contiguous(), mesh, [Shard(1)]),
            "row": distribute_tensor(whole[:1].clone(), mesh, [Shard(0)]),
            "number": torch.tensor(3.5),
        }
        checkpoint.save(folder, 1, state, {}, session)


@pytest.mark.parametrize("rows", [slice(None), slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)])
def test_rows_of_a_tensor_are_read_as_they_were_saved_by_any_number_of_ranks(
    rows: slice, tmp_path: Path
) -> None:
    run_on_ranks(2, save_sharded, tmp_path)
    reader = checkpoint.Reader(tmp_path / "step_000001")
    whole = torch.arange(30.0).view(5, 6)
    assert torch.equal(reader.read_rows("long", rows), whole[rows])
    assert torch.equal(reader.read_rows("wide", rows), whole.T[rows])
    assert torch.equal(reader.read_rows("row", rows), whole[:1][rows])
    assert reader.read_rows("number", rows) == 3.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_views_of_any_type_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(4 * 10 * 3).view(4, 10, 3).to(dtype)
    held = {"column": base[:, 2:5], "transposed": base.transpose(0, 2), "part": base[1:3]}
    checkpoint.save(tmp_path, 1, held, {}, ALONE)
    reader = checkpoint.Reader(tmp_path / "step_000001")
    for name, value in held.items():
        assert torch.equal(reader.read_rows(name, slice(1, 3)), value[1:3])


def test_of_a_large_tensor_no_more_is_read_than_the_rows_that_are_wanted(tmp_path: Path) -> None:
    value = torch.rand(64, 2**16, generator=generator("rows"))  # 16 MiB
    checkpoint.save(tmp_path, 1, {"value": value}, {}, ALONE)
    reader = checkpoint.Reader(tmp_path / "step_000001")
    before = bytes_read()
    found = reader.read_rows("value", slice(8, 16))
    assert bytes_read() - before < 2**21 + 2**17  # 2 MiB of rows, and the file's headers
    assert torch.equal(found, value[8:16])
