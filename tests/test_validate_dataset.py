"""scripts/validate_dataset.py: what a dataset holds, and every kind of damage by key."""

from __future__ import annotations

import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from scripts import validate_dataset
from tests.commands import refusal
from tests.videos import tear
from utils.data.shards import ShardWriter


def shard(path: Path, prompts: list[str], *shape: int, images: bool = True) -> Path:
    values = torch.ones(len(prompts), *(shape or (16, 5, 4, 4)))
    side = (8 * values.shape[-2], 8 * values.shape[-1])
    frames = torch.zeros(len(prompts), 3, *side, dtype=torch.uint8) if images else None
    with ShardWriter(path) as writer:
        writer.append(prompts, values, images=frames)
    return path


def check(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str]]:
    """Exit status, and what is printed, without alignment."""
    capsys.readouterr()
    status = validate_dataset.main(["--data_path", str(path), *more])
    return status, [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]


def test_a_whole_dataset_is_counted_by_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "a", ["a cat", "a cat", "word " * 3000])
    shard(tmp_path / "b", ["a dog"], 16, 3, 4, 8)
    assert check(tmp_path, capsys) == (
        0,
        [
            "shards 2",
            "records 4",
            "latents 16 x 3 x 4 x 8, images 32 x 64 1",
            "latents 16 x 5 x 4 x 4, images 32 x 32 3",
            "prompt characters 5 to 15000, median 5",
            "repeated prompts 1",
            "damaged 0",
        ],
    )


def test_every_kind_of_damage_is_named_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(tmp_path / "a", [f"prompt {n}" for n in range(6)])
    damage = {
        b"prompts_0_data": b"a caf\xe9",
        b"prompts_1_data": b" ",
        b"latents_2_data": b"short",
        b"latents_3_data": np.full(16 * 5 * 4 * 4, np.nan, np.float16).tobytes(),
        b"img_4_data": bytes(100),
    }
    with lmdb.open(str(path)) as env, env.begin(write=True) as transaction:
        for key, value in damage.items():
            transaction.put(key, value)
        transaction.delete(b"img_5_data")
        transaction.delete(b"latents_5_data")
        transaction.delete(b"prompts_5_data")
    status, lines = check(tmp_path, capsys)
    assert status == 1
    assert "records 6" in lines
    assert "damaged 8" in lines
    assert lines[-8:] == [
        f"damaged: {path}: {words}"
        for words in (
            "'prompts_0_data' is not UTF-8 at byte 5",
            "'prompts_1_data' is an empty prompt",
            "'latents_2_data' has 5 bytes, expected 2560 for 5 x 16 x 4 x 4 of float16",
            "'latents_3_data' holds values not finite",
            "'img_4_data' has 100 bytes, expected 3072 for 32 x 32 x 3 of uint8",
            "record 5 has no 'prompts_5_data'",
            "record 5 has no 'latents_5_data'",
            "record 5 has no 'img_5_data'",
        )
    ]


def test_trajectories_are_read_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = torch.zeros(2, 3, 16, 5, 4, 4)
    states[1, 0] = torch.nan
    with ShardWriter(tmp_path / "a") as writer:
        writer.append(["x", "y"], trajectories=states)
    status, lines = check(tmp_path, capsys)
    assert (status, lines[2]) == (1, "trajectories 3 x 16 x 5 x 4 x 4 2")
    assert lines[-1] == f"damaged: {tmp_path}/a: 'trajectories_1_data' holds values not finite"


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
def test_a_shard_cut_off_does_not_hide_the_others(
    tmp_path: Path, left: float, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "a", ["x", "y"])
    tear(shard(tmp_path / "b", ["z"] * 50) / "data.mdb", left)
    before = (tmp_path / "b" / "data.mdb").read_bytes()
    status, lines = check(tmp_path, capsys)
    assert (status, lines[0], lines[1]) == (1, "shards 1", "records 2")
    assert lines[-1].startswith(f"damaged: {tmp_path}/b: ")
    assert "cut off" in lines[-1] or "not readable as LMDB" in lines[-1]
    assert (tmp_path / "b" / "data.mdb").read_bytes() == before


def test_shards_of_different_kinds_are_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "a", ["x"])
    shard(tmp_path / "b", ["y"], images=False)
    status, lines = check(tmp_path, capsys)
    assert (status, lines[1]) == (1, "records 2")
    assert "shards of different kinds: a holds prompts, latents, images, b holds" in lines[-1]


def test_a_folder_of_nothing_but_a_cut_shard_has_nothing_to_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tear(shard(tmp_path / "a", ["x"] * 50) / "data.mdb")
    status, lines = check(tmp_path, capsys)
    assert (status, lines[1], len(lines)) == (2, "records 0", 6)


def test_long_lists_are_shortened_on_paper_but_not_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "data" / "a", [""] * 5)
    more = ("--listed", "2", "--json", str(tmp_path / "found.json"))
    status, lines = check(tmp_path / "data", capsys, *more)
    assert (status, lines[-1]) == (1, "and 3 more; --json lists all")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (len(found["damaged"]), found["summary"]["records"]) == (5, "5")


def test_prompt_files_and_folders_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\na dog\n")
    for path in (tmp_path / "p.txt", tmp_path):
        status, lines = check(path, capsys)
        assert (status, lines[0]) == (0, "shards 0")
    status, lines = check(tmp_path / "p.txt", capsys)
    assert lines[1:5] == [
        "records 3", "prompts alone 3", "prompt characters 5 to 5, median 5", "repeated prompts 1",
    ]  # fmt: skip


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data_path", str(tmp_path / "absent")]
    assert "no such data" in refusal(validate_dataset.main, words, capsys)
