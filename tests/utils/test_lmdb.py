"""LMDB shards: what is written is read back, and damaged folders say so."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch import Tensor

from utils import lmdb as module
from utils.lmdb import ShardReader, ShardWriter, shard_paths

SHAPE = (3, 2, 4, 5)  # [C, F, H, W]


def latents(count: int, start: int = 0) -> Tensor:
    """Numbers that fp16 holds exactly, all different within a row."""
    size = torch.Size(SHAPE).numel()
    return torch.arange(start, start + count * size).remainder(2048).float().view(count, *SHAPE)


def write(folder: Path, name: str, prompts: list[str], values: Tensor | None = None) -> Path:
    with ShardWriter(folder / name) as writer:
        writer.append(prompts, values)
    return folder


def test_latents_come_back_in_their_own_layout(tmp_path: Path) -> None:
    values = latents(3)
    reader = ShardReader(write(tmp_path, "a", ["x", "y", "z"], values))
    assert reader.latent_shape == SHAPE
    assert all(torch.equal(reader.latents(i), values[i]) for i in range(3))


def test_latents_lie_in_the_file_as_half_precision_frames_first(tmp_path: Path) -> None:
    values = latents(1)
    write(tmp_path, "a", ["x"], values)
    with lmdb.open(str(tmp_path / "a"), readonly=True, lock=False) as env, env.begin() as rows:
        stored = np.frombuffer(bytes(rows.get(b"latents_0_data")), dtype=np.float16)
        assert bytes(rows.get(b"latents_shape")) == b"1 2 3 4 5"
    assert np.array_equal(stored.reshape(2, 3, 4, 5), values[0].transpose(0, 1).numpy())


def test_latents_are_rounded_to_half_precision_and_no_further(tmp_path: Path) -> None:
    values = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    reader = ShardReader(write(tmp_path, "a", ["x"], values))
    assert torch.equal(reader.latents(0), values[0].half().float())


def test_prompts_keep_every_character(tmp_path: Path) -> None:
    prompts = ["Gr\u00fc\u00dfe", "\u4f60\u597d", "two\nlines", ""]
    reader = ShardReader(write(tmp_path, "a", prompts))
    assert [reader.prompt(i) for i in range(len(reader))] == prompts


def test_prompts_alone_have_no_latent_shape(tmp_path: Path) -> None:
    assert ShardReader(write(tmp_path, "a", ["x"])).latent_shape is None


def test_trajectories_come_back_in_their_own_layout(tmp_path: Path) -> None:
    states = latents(6).view(2, 3, *SHAPE)
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x", "y"], trajectories=states)
    reader = ShardReader(tmp_path)
    assert (reader.trajectory_shape, reader.latent_shape) == ((3, *SHAPE), None)
    assert all(torch.equal(reader.trajectory(i), states[i]) for i in range(2))


def test_trajectories_lie_in_the_file_as_half_precision_frames_first(tmp_path: Path) -> None:
    states = latents(3).view(1, 3, *SHAPE)
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x"], trajectories=states)
    with lmdb.open(str(tmp_path / "a"), readonly=True, lock=False) as env, env.begin() as rows:
        stored = np.frombuffer(bytes(rows.get(b"trajectories_0_data")), dtype=np.float16)
        assert bytes(rows.get(b"trajectories_shape")) == b"1 3 2 3 4 5"
    assert np.array_equal(stored.reshape(3, 2, 3, 4, 5), states[0].transpose(1, 2).numpy())


def test_a_record_may_hold_latents_and_a_trajectory(tmp_path: Path) -> None:
    values, states = latents(2), latents(6, start=5).view(2, 3, *SHAPE)
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x", "y"], values, states)
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.latents(1), values[1])
    assert torch.equal(reader.trajectory(1), states[1])


@pytest.mark.parametrize(
    ("shape", "got"), [((1, 3, *SHAPE), r"\(1, 3, 3, 2, 4, 5\)"), ((2, 4, *SHAPE), r"\(2, 4, 3")]
)
def test_trajectories_of_another_number_or_length_are_refused(
    tmp_path: Path, shape: tuple[int, ...], got: str
) -> None:
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["w"], trajectories=torch.zeros(1, 3, *SHAPE))
        with pytest.raises(ValueError, match=r"trajectories must be \(2, 3, 3, 2, .*got " + got):
            writer.append(["x", "y"], trajectories=torch.zeros(shape))
        assert writer.rows == 1


def test_shards_with_trajectories_of_several_lengths_are_refused(tmp_path: Path) -> None:
    for name, states in (("a", 3), ("b", 4)):
        with ShardWriter(tmp_path / name) as writer:
            writer.append(["x"], trajectories=torch.zeros(1, states, *SHAPE))
    with pytest.raises(ValueError, match="shards hold trajectories of several shapes"):
        ShardReader(tmp_path)


def test_a_writer_counts_the_rows_that_its_shard_holds(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x", "y"])
    with ShardWriter(tmp_path / "a") as writer:
        assert writer.rows == 2
        writer.append(["z"])
        assert writer.rows == 3


def test_a_reopened_shard_is_continued(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x", "y"], latents(2))
    reader = ShardReader(write(tmp_path, "a", ["z"], latents(1, start=7)))
    assert [reader.prompt(i) for i in range(len(reader))] == ["x", "y", "z"]
    assert torch.equal(reader.latents(2), latents(1, start=7)[0])


def test_records_of_all_shards_follow_the_order_of_shard_names(tmp_path: Path) -> None:
    for name, prompts in (("b", ["3"]), ("a", ["1", "2"]), ("c", ["4", "5"])):
        write(tmp_path, name, prompts)
    reader = ShardReader(tmp_path)
    assert [reader.prompt(i) for i in range(len(reader))] == ["1", "2", "3", "4", "5"]


def test_a_shard_grows_past_its_first_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_MAP_BYTES", 64 * 1024)
    count = 64 * 1024 * 5 // (2 * torch.Size(SHAPE).numel())
    reader = ShardReader(write(tmp_path, "a", ["x"] * count, latents(count)))
    assert torch.equal(reader.latents(count - 1), latents(count)[-1])


def test_a_reader_takes_files_larger_than_the_default_map(tmp_path: Path) -> None:
    rows = torch.zeros(12, 16, 8, 64, 64)  # 12 MiB; LMDB maps 10 MiB unless told otherwise
    reader = ShardReader(write(tmp_path, "a", ["x"] * 12, rows))
    assert reader.latents(11).shape == (16, 8, 64, 64)


def test_fewer_latents_than_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be \(2, 3, 2, 4, 5\), .*got \(1, 3, 2, 4, 5\)"):
        write(tmp_path, "a", ["x", "y"], latents(1))


def test_a_second_shape_in_one_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    with pytest.raises(ValueError, match=r"must be \(1, 3, 2, 4, 5\), .*got \(1, 3, 2, 4, 6\)"):
        write(tmp_path, "a", ["y"], torch.zeros(1, 3, 2, 4, 6))


def test_shards_of_several_shapes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    write(tmp_path, "b", ["y"], torch.zeros(1, 3, 2, 4, 6))
    with pytest.raises(ValueError, match="shards hold latents of several shapes"):
        ShardReader(tmp_path)


def test_shards_with_and_without_latents_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    write(tmp_path, "b", ["y"])
    with pytest.raises(ValueError, match="shards hold latents of several shapes"):
        ShardReader(tmp_path)


def test_a_row_without_latents_names_its_record(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    reader = ShardReader(write(tmp_path, "a", ["y"]))
    with pytest.raises(ValueError, match="record 1 has no 'latents_1_data'"):
        reader.latents(1)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_shards_is_not_found(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match="no LMDB shards"):
        ShardReader(folder)


def test_shards_without_records_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a"):
        pass
    with pytest.raises(ValueError, match="its 1 LMDB shards hold no record"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("left", [0, 100, 4096, 8192, 20_000])
def test_a_shard_that_was_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    write(tmp_path, "a", ["x"] * 64, latents(64))
    path = tmp_path / "a" / "data.mdb"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"not readable as LMDB|cut off"):
        ShardReader(tmp_path)


def test_a_file_that_is_no_lmdb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data.mdb").write_bytes(b"x" * 20_000)
    with pytest.raises(ValueError, match="not readable as LMDB"):
        ShardReader(tmp_path)


def test_only_folders_with_a_data_file_are_shards(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"])
    (tmp_path / "b").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert shard_paths(tmp_path) == [tmp_path / "a"]
