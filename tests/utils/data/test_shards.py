"""LMDB shards: what is written is read back, and damaged folders say so."""

from __future__ import annotations

import resource
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch import Tensor

from utils.data.shards import ShardReader, ShardWriter, shard_paths

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
    assert reader.latent_shape(2) == SHAPE
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
    assert ShardReader(write(tmp_path, "a", ["x"])).latent_shape(0) is None


def test_trajectories_come_back_in_their_own_layout(tmp_path: Path) -> None:
    states = latents(6).view(2, 3, *SHAPE)
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x", "y"], trajectories=states)
    reader = ShardReader(tmp_path)
    assert (reader.trajectory_shape(1), reader.latent_shape(1)) == ((3, *SHAPE), None)
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


def test_shards_may_hold_trajectories_of_several_lengths(tmp_path: Path) -> None:
    for name, states in (("a", 3), ("b", 4)):
        with ShardWriter(tmp_path / name) as writer:
            writer.append(["x"], trajectories=torch.zeros(1, states, *SHAPE))
    reader = ShardReader(tmp_path)
    assert [reader.trajectory_shape(i) for i in (0, 1)] == [(3, *SHAPE), (4, *SHAPE)]
    assert reader.trajectory(1).shape == (4, *SHAPE)


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
    monkeypatch.setattr("utils.data.lmdb_files.FIRST_MAP_BYTES", 64 * 1024)
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


def test_shards_of_several_shapes_lie_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x", "y"], latents(2))
    write(tmp_path, "b", ["z"], torch.ones(1, 3, 2, 4, 6))
    reader = ShardReader(tmp_path)
    assert [reader.latent_shape(i) for i in range(3)] == [SHAPE, SHAPE, (3, 2, 4, 6)]
    assert [(shard.name, shard.rows) for shard in reader.shards] == [("a", 2), ("b", 1)]
    assert torch.equal(reader.latents(1), latents(2)[1])
    assert torch.equal(reader.latents(2), torch.ones(3, 2, 4, 6))


def test_shards_with_and_without_latents_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    write(tmp_path, "b", ["y"])
    with pytest.raises(ValueError) as caught:
        ShardReader(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: shards of different kinds: a holds prompts, latents, b holds prompts alone; "
        "keep them in folders of their own"
    )


def test_an_empty_shard_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, "b", ["x"], latents(1))
    with ShardWriter(tmp_path / "a"):
        pass
    reader = ShardReader(tmp_path)
    assert (len(reader), [shard.name for shard in reader.shards]) == (1, ["b"])


@pytest.mark.parametrize("index", [-1, 2])
def test_a_record_that_is_not_there_is_an_index_error(tmp_path: Path, index: int) -> None:
    reader = ShardReader(write(tmp_path, "a", ["x", "y"]))
    with pytest.raises(IndexError, match=f"no record {index}, it holds 2"):
        reader.prompt(index)


def test_a_folder_that_is_itself_a_shard_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    assert torch.equal(ShardReader(tmp_path / "a").latents(0), latents(1)[0])


# ---- pictures


def pictures(count: int, height: int = 4, width: int = 6) -> Tensor:
    size = 3 * height * width
    return torch.arange(count * size).remainder(251).to(torch.uint8).view(count, 3, height, width)


def test_pictures_come_back_and_lie_in_the_file_colours_last(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x"], latents(1), images=pictures(1))
        writer.append(["y"], latents(1), images=pictures(2)[1:])
    with lmdb.open(str(tmp_path / "a"), readonly=True, lock=False) as env, env.begin() as rows:
        assert bytes(rows.get(b"img_shape")) == b"2 4 6 3"
        assert bytes(rows.get(b"img_1_data")) == pictures(2)[1].permute(1, 2, 0).numpy().tobytes()
    reader = ShardReader(tmp_path)
    assert (reader.image_shape(0), reader.image(0).dtype) == ((4, 6), torch.uint8)
    assert torch.equal(torch.stack([reader.image(i) for i in (0, 1)]), pictures(2))


def test_shards_without_pictures_say_so(tmp_path: Path) -> None:
    assert ShardReader(write(tmp_path, "a", ["x"], latents(1))).image_shape(0) is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, 4, 6),
            r"must be uint8 \[B, 3, H, W\], got torch.float32 \(1, 3, 4, 6\)",
        ),
        (torch.zeros(1, 4, 6, 3, dtype=torch.uint8), r"\[B, 3, H, W\], got torch.uint8 \(1, 4, 6"),
        (pictures(1, 6, 4), r"images must be \(1, 3, 4, 6\), .*got \(1, 3, 6, 4\)"),
        (pictures(2), r"images must be \(1, 3, 4, 6\), one row per prompt"),
    ],
)
def test_pictures_of_another_kind_are_refused(tmp_path: Path, images: Tensor, message: str) -> None:
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x"], images=pictures(1))
        with pytest.raises(ValueError, match=message):
            writer.append(["y"], images=images)
        assert writer.rows == 1


# ---- shards of another system, which writes the latents' shape under every name


def foreign(
    folder: Path,
    *,
    records: int = 1,
    image_bytes: int = 32 * 48 * 3,
    latent_bytes: int = 2 * 3 * 4 * 6 * 2,
) -> Path:
    """One shard with records of latents [F=2, C=3, 4, 6] and a picture of 32 x 48.

    image_bytes, latent_bytes: of the first record; the others are whole.
    """
    shape = f"{records} 2 3 4 6".encode()
    rows = {f"{name}_shape".encode(): shape for name in ("prompts", "latents", "img")}
    for row in range(records):
        image, latent = (32 * 48 * 3, 288) if row else (image_bytes, latent_bytes)
        rows[f"prompts_{row}_data".encode()] = "Gr\u00fc\u00dfe".encode()
        rows[f"latents_{row}_data".encode()] = bytes(latent)
        rows[f"img_{row}_data".encode()] = bytes([1, 2, 3]) * (image // 3)
    with lmdb.open(str(folder / "shard_0")) as env, env.begin(write=True) as transaction:
        for key, value in rows.items():
            transaction.put(key, value)
    return folder


def test_shards_of_another_system_are_read(tmp_path: Path) -> None:
    reader = ShardReader(foreign(tmp_path))
    assert (len(reader), reader.prompt(0)) == (1, "Gr\u00fc\u00dfe")
    assert (reader.latent_shape(0), reader.image_shape(0)) == ((3, 2, 4, 6), (32, 48))
    assert reader.latents(0).shape == (3, 2, 4, 6)
    assert reader.image(0)[:, 31, 47].tolist() == [1, 2, 3]


def test_a_row_of_another_length_names_its_key_and_both_lengths(tmp_path: Path) -> None:
    reader = ShardReader(foreign(tmp_path, records=2, image_bytes=300, latent_bytes=10))
    where = f"{tmp_path}/shard_0"
    for read, words in (
        (reader.image, "'img_0_data' has 300 bytes, expected 4608 for 32 x 48 x 3 of uint8"),
        (
            reader.latents,
            "'latents_0_data' has 10 bytes, expected 288 for 2 x 3 x 4 x 6 of float16",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            read(0)
        assert str(caught.value) == f"{where}: {words}"


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_the_size_of_foreign_pictures_follows_from_their_bytes(tmp_path: Path, stride: int) -> None:
    reader = ShardReader(foreign(tmp_path, image_bytes=3 * 4 * 6 * stride**2))
    assert reader.image_shape(0) == (4 * stride, 6 * stride)
    assert reader.image(0).shape == (3, 4 * stride, 6 * stride)


def test_foreign_pictures_of_no_possible_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        ShardReader(foreign(tmp_path, image_bytes=300))
    assert str(caught.value) == (
        f"{tmp_path}/shard_0: 'img_0_data' has 300 bytes, which make no picture of the shape of "
        f"the latents, 4 x 6"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"latents_shape", b"1 5 2 3 4 6", "'latents_shape' must be N F C H W, got 6 numbers"),
        (b"latents_shape", b"one", "'latents_shape' must hold whole numbers, got b'one'"),
        (b"img_shape", b"1 4 6", "'img_shape' must be N H W 3, got (1, 4, 6)"),
    ],
)
def test_a_shape_that_is_none_is_named(
    tmp_path: Path, key: bytes, value: bytes, message: str
) -> None:
    write(tmp_path, "a", ["x"])
    with lmdb.open(str(tmp_path / "a")) as env, env.begin(write=True) as transaction:
        transaction.put(key, value)
    with pytest.raises(ValueError) as caught:
        ShardReader(tmp_path)
    assert str(caught.value) == f"{tmp_path}/a: {message}"


def test_a_prompt_that_is_not_utf8_names_its_key(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"])
    with lmdb.open(str(tmp_path / "a")) as env, env.begin(write=True) as transaction:
        transaction.put(b"prompts_0_data", b"a caf\xe9")
    with pytest.raises(ValueError, match="'prompts_0_data' is not UTF-8 at byte 5"):
        ShardReader(tmp_path).prompt(0)


# ---- damage


@pytest.mark.parametrize("left", [100, 8192, 20_000])
def test_a_cut_shard_is_not_written_to(tmp_path: Path, left: int) -> None:
    write(tmp_path, "a", ["x"] * 64, latents(64))
    path = tmp_path / "a" / "data.mdb"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"not readable as LMDB|cut off"):
        ShardWriter(tmp_path / "a")
    assert path.stat().st_size == left


def test_a_full_disk_is_told_and_costs_no_record(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ShardWriter(tmp_path / "shard") as writer:
        writer.append(["a"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # of any file, in bytes
        try:
            with pytest.raises(OSError, match=r"shard: cannot be written: .*is the disk full\?"):
                writer.append(["b" * 2**19])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with ShardWriter(tmp_path / "shard") as writer:
        writer.append(["c"])
    reader = ShardReader(tmp_path)
    assert [reader.prompt(i) for i in range(len(reader))] == ["a", "c"]


def test_a_shard_whose_writer_died_before_it_began_is_begun(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data.mdb").touch()
    assert len(ShardReader(write(tmp_path, "a", ["x"], latents(1)))) == 1


def test_a_row_without_latents_names_its_record(tmp_path: Path) -> None:
    write(tmp_path, "a", ["x"], latents(1))
    reader = ShardReader(write(tmp_path, "a", ["y"]))
    with pytest.raises(ValueError, match="record 1 has no 'latents_1_data'"):
        reader.latents(1)


def test_a_shard_may_be_read_by_several_at_once(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shard_0") as writer:
        writer.append(["a", "b"])
    readers = [ShardReader(tmp_path / "shard_0") for _ in range(3)]
    assert [reader.prompt(1) for reader in readers] == ["b"] * 3


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


def test_as_many_shards_are_read_as_the_system_lets_a_process_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(40):
        write(tmp_path, f"{i:02d}", ["x"])
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        assert len(ShardReader(tmp_path)) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
