"""Prompts and latents from files, and the order in which a run takes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from utils.data.dataset import (
    DataOrder,
    RecordShapes,
    TrajectoryManifest,
    open_dataset,
)
from utils.data.prompts import read_prompt_file, read_prompt_folder
from utils.data.shards import ShardWriter
from utils.records import MANIFEST, read_manifest


def test_a_prompt_file_holds_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\n")
    data = open_dataset(path)
    assert [data[i].prompt for i in range(len(data))] == ["a cat", "a dog"]


def test_prompts_alone_carry_no_latents(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\n")
    data = open_dataset(path)
    assert list(data.buckets) == [RecordShapes()]
    assert data[0].latents is None


def test_blank_lines_and_outer_spaces_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n  a cat \r\n\n \t\na dog")
    assert read_prompt_file(path) == ["a cat", "a dog"]


def test_only_line_feeds_and_carriage_returns_end_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("one\u2028prompt\x0chere\r\ntwo\rthree".encode())
    assert read_prompt_file(path) == ["one\u2028prompt\x0chere", "two", "three"]


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\n")
    assert read_prompt_file(path) == ["a cat"]


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        open_dataset(path)
    assert str(caught.value) == f"{path}: holds no prompt; write one per line"


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"a caf\xe9\n")
    with pytest.raises(ValueError) as caught:
        open_dataset(path)
    assert str(caught.value) == f"{path}: not UTF-8 at byte 5; save it as UTF-8"


def test_a_missing_prompt_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        read_prompt_file(tmp_path / "p.txt")


def test_missing_data_tells_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_dataset(tmp_path / "absent")
    assert str(caught.value) == (
        f"{tmp_path}/absent: no such data; give a .txt file with one prompt per line, a folder of "
        ".txt files with one prompt each, or a folder of LMDB shards"
    )


def test_a_prompt_folder_holds_one_prompt_per_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a dog\non two lines\n")
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "readme.md").write_text("not a prompt\n")
    (tmp_path / "._a.txt").write_bytes(b"\x00\xff")  # as macOS leaves
    data = open_dataset(tmp_path)
    assert [data[i].prompt for i in range(len(data))] == ["a cat", "a dog\non two lines"]


def test_empty_files_of_a_prompt_folder_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("a dog")
    assert read_prompt_folder(tmp_path) == ["a dog"]


def test_a_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no prompt: 1 .txt files, all empty"):
        open_dataset(tmp_path)


def test_shards_give_captions_with_latents(tiny_root: Path) -> None:
    data = open_dataset(tiny_root / "data" / "tiny" / "latents")
    item = data[63]
    assert len(data) == 64
    assert data.buckets == {RecordShapes((16, 5, 4, 4), image=(32, 32)): list(range(64))}
    assert item.latents is not None
    assert item.latents.dtype == torch.float32
    assert item.prompt.startswith("a ")
    assert item.trajectory is None


def test_shards_of_ode_pairs_give_captions_with_trajectories(tiny_root: Path) -> None:
    data = open_dataset(tiny_root / "data" / "tiny" / "ode_pairs")
    item = data[15]
    assert len(data) == 16
    assert list(data.buckets) == [RecordShapes(trajectory=(5, 16, 5, 4, 4))]
    assert item.latents is None
    assert item.trajectory is not None
    assert item.trajectory.dtype == torch.float32
    assert item.prompt.startswith("a ")


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = TrajectoryManifest(
        7, [1000, 500], 5.0, [16, 5, 4, 4], 48, 2.0, 0, "digest", "", False, "run"
    )
    (tmp_path / MANIFEST).write_text(json.dumps(asdict(written)), encoding="utf-8")
    assert read_manifest(tmp_path, TrajectoryManifest) == written


def test_a_folder_of_other_data_has_no_manifest(tiny_root: Path) -> None:
    assert read_manifest(tiny_root / "data" / "tiny" / "latents", TrajectoryManifest) is None
    assert read_manifest(tiny_root / "data" / "tiny" / "prompts.txt", TrajectoryManifest) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"count": 3}', '{"weather": "fine"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_manifest(tmp_path, TrajectoryManifest)
    expected = f"{tmp_path}/manifest.json: not a manifest of ODE pairs: "
    assert str(caught.value).startswith(expected)


def test_each_epoch_is_a_permutation_of_all_records() -> None:
    order = DataOrder([range(7)], 1, seed=1)
    for epoch in range(3):
        assert sorted(order[epoch * 7 + i] for i in range(7)) == list(range(7))


def test_records_are_read_in_turn_across_batches() -> None:
    order = DataOrder([range(7)], 4, seed=1)
    assert sorted(order[i] for i in range(28)) == sorted(4 * list(range(7)))


def test_epochs_differ_in_their_order() -> None:
    order = DataOrder([range(50)], 1, seed=1)
    assert [order[i] for i in range(50)] != [order[50 + i] for i in range(50)]


def test_the_order_depends_on_nothing_but_the_seed() -> None:
    buckets = [range(5), range(5, 9)]
    first, second = DataOrder(buckets, 3, seed=3), DataOrder(buckets, 3, seed=3)
    backwards = [second[i] for i in reversed(range(45))]
    assert [first[i] for i in range(45)] == backwards[::-1]


def test_another_seed_gives_another_order() -> None:
    first, second = (DataOrder([range(50)], 5, seed=seed) for seed in (3, 4))
    assert [first[i] for i in range(50)] != [second[i] for i in range(50)]


BUCKETS = [range(40), range(40, 52), range(52, 53)]  # of very different sizes


def drawn(batches: int, size: int = 4) -> list[list[int]]:
    """The records of the first batches from BUCKETS."""
    order = DataOrder(BUCKETS, size, seed=7)
    return [[order[batch * size + i] for i in range(size)] for batch in range(batches)]


def bucket_of(record: int) -> int:
    """The number of a record's bucket."""
    return next(k for k, records in enumerate(BUCKETS) if record in records)


def test_a_batch_is_of_one_bucket() -> None:
    assert all(len({bucket_of(record) for record in batch}) == 1 for batch in drawn(60))


def test_buckets_have_batches_in_proportion_to_their_sizes() -> None:
    counts = [0, 0, 0]
    for batch in drawn(10 * (10 + 3 + 1)):
        counts[bucket_of(batch[0])] += 1
    assert counts == [100, 30, 10]


def test_buckets_take_turns_within_an_epoch() -> None:
    kinds = [bucket_of(batch[0]) for batch in drawn(14)]
    assert kinds != sorted(kinds)


def test_every_record_of_a_bucket_is_read_equally_often() -> None:
    read = [record for batch in drawn(10 * 14) for record in batch]
    assert {read.count(record) for record in BUCKETS[0]} == {10}
    assert {read.count(record) for record in BUCKETS[1]} == {10}


def test_shards_of_several_shapes_make_buckets(tmp_path: Path) -> None:
    for name, frames, count in (("a", 2, 3), ("b", 3, 2), ("c", 2, 1)):
        with ShardWriter(tmp_path / name) as writer:
            latents = torch.zeros(count, 16, frames, 4, 4)
            images = torch.full((count, 3, 32, 32), frames, dtype=torch.uint8)
            writer.append([name] * count, latents, images=images)
    data = open_dataset(tmp_path)
    assert data.buckets == {
        RecordShapes((16, 2, 4, 4), image=(32, 32)): [0, 1, 2, 5],
        RecordShapes((16, 3, 4, 4), image=(32, 32)): [3, 4],
    }
    item = data[3]
    assert (item.prompt, data.prompt(3)) == ("b", "b")
    assert item.latents is not None
    assert item.latents.shape == (16, 3, 4, 4)
    assert item.image is not None
    assert int(item.image.min()) == 3


def test_shards_of_a_stopped_script_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x"], torch.zeros(1, 16, 2, 4, 4))
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        open_dataset(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: scripts/create_lmdb_14b_shards.py was stopped before it was done; run the "
        f"same command again"
    )
    (tmp_path / "report.json").write_text("{}")
    assert len(open_dataset(tmp_path)) == 1


@pytest.mark.parametrize(
    ("shapes", "stride", "video"),
    [
        (RecordShapes(), 8, (16, 5, 4, 4)),
        (RecordShapes(image=(32, 48)), 8, (16, 5, 4, 6)),
        (RecordShapes(image=(32, 48)), 4, (16, 5, 8, 12)),
        (RecordShapes((16, 3, 2, 2), image=(16, 16)), 8, (16, 3, 2, 2)),
    ],
)
def test_a_record_tells_the_shape_of_its_video(
    shapes: RecordShapes, stride: int, video: tuple[int, int, int, int]
) -> None:
    assert shapes.video([16, 5, 4, 4], stride) == video
