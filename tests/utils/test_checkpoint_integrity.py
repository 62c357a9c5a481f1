"""Checkpoints that were damaged, cut or exchanged: found, named, and not loaded."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from utils import checkpoint
from utils.checkpoint import newest_good, problem
from utils.checkpoint_manifest import Manifest, Written
from utils.distributed import Session, distributed_session
from utils.errors import UserError
from utils.seeding import generator

ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))
FACTS = {"config": "c0ffee", "versions": {"fewstep": "0.1.0"}}
TEXTS = {"config.yaml": "steps: 3\nseed: 7\n"}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder: Path, *steps: int, size: int = 3) -> list[Path]:
    """Checkpoints whose files have the same sizes at every step."""
    return [
        checkpoint.save(
            folder, step, {"w": torch.randn(size, generator=generator(step))}, TEXTS, ALONE,
            facts=FACTS,
        )
        for step in steps
    ]  # fmt: skip


def whole(path: Path) -> str | None:
    return problem(path, rank=0)


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_any_byte_of_any_file_that_is_flipped_is_found(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    assert {f.name for f in files(path)} == {
        ".metadata", "__0_0.distcp", "config.yaml", "manifest.json",
    }  # fmt: skip
    silent = []
    for file in files(path):
        data = file.read_bytes()
        with file.open("r+b", buffering=0) as held:
            for at in range(len(data)):
                held.seek(at)
                held.write(bytes([data[at] ^ 1 << at % 8]))
                if whole(path) is None:
                    silent.append((file.name, at))
                held.seek(at)
                held.write(data[at : at + 1])
    assert silent == []
    assert whole(path) is None


@pytest.mark.slow
def test_any_of_a_thousand_random_bytes_of_a_larger_one_is_found(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7, size=10**6)
    draw, missed = random.Random(0), []
    for _ in range(1000):
        file = draw.choice(files(path))
        at, bit = draw.randrange(file.stat().st_size), 1 << draw.randrange(8)
        with file.open("r+b", buffering=0) as held:
            held.seek(at)
            (byte,) = held.read(1)
            held.seek(at)
            held.write(bytes([byte ^ bit]))
            if whole(path) is None:
                missed.append((file.name, at, bit))
            held.seek(at)
            held.write(bytes([byte]))
    assert missed == []
    assert whole(path) is None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "config.yaml", "manifest.json"])
def test_a_file_that_is_cut_anywhere_is_found(name: str, tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    data = (path / name).read_bytes()
    for length in {0, 1, len(data) // 2, len(data) - 1}:
        (path / name).write_bytes(data[:length])
        assert whole(path) is not None
    (path / name).write_bytes(data + b"\n")
    assert whole(path) is not None
    (path / name).unlink()
    assert whole(path) is not None


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_file_of_another_step_is_found(name: str, tmp_path: Path) -> None:
    first, second = save(tmp_path, 7, 8)
    assert (first / name).stat().st_size == (second / name).stat().st_size
    shutil.copy(first / name, second / name)
    assert whole(second) is not None


def test_a_checkpoint_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    first, second = save(tmp_path, 7, 8)
    shutil.rmtree(second)
    first.rename(second)
    assert whole(second) == f"{second}: its manifest.json is of step 7"


def test_a_copy_under_a_name_of_its_own_is_whole(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    assert whole(path.rename(tmp_path / "best")) is None


def test_a_quick_look_reads_no_file_of_tensors(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    flip(path / "__0_0.distcp")
    assert problem(path) is None
    assert "__0_0.distcp is not what was saved" in str(whole(path))


def flip(file: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def test_the_manifest_tells_sizes_hashes_step_settings_and_versions(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["facts"]) == (7, FACTS)
    for file in files(path):
        if file.name != "manifest.json":
            assert manifest["files"][file.name]["bytes"] == file.stat().st_size
            assert len(manifest["files"][file.name]["sha256"]) == 64


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    (first,), (second,) = save(tmp_path / "a", 7), save(tmp_path / "b", 7)
    for one, other in zip(files(first), files(second), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_manifest_is_read_as_it_was_written() -> None:
    manifest = Manifest(3, {"a": Written(5, "0" * 64)}, {"seed": 1})
    assert Manifest.from_json(manifest.to_json()) == manifest


# ---- which is taken


def test_the_newest_good_one_is_taken_and_the_damaged_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = save(tmp_path, 1, 2, 3)
    flip(three / "__0_0.distcp")
    flip(two / ".metadata")
    with caplog.at_level(logging.WARNING, logger="utils.checkpoint"):
        assert newest_good(tmp_path, ALONE) == one
    told = [r.getMessage() for r in caplog.records if r.name == "utils.checkpoint"]
    assert told == [
        f"skipping a damaged checkpoint: {path}: the content of {name} is not what was saved (its "
        "SHA-256 differs)"
        for path, name in ((three, "__0_0.distcp"), (two, ".metadata"))
    ]


def test_all_damaged_is_an_error_and_none_is_no_start(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    flip(path / "__0_0.distcp")
    with pytest.raises(UserError, match="all its checkpoints are damaged; restore one, or use"):
        newest_good(tmp_path, ALONE)
    assert newest_good(tmp_path / "absent", ALONE) is None


def old(path: Path) -> Path:
    """Make a checkpoint what version 0.1 wrote."""
    sizes = {f.name: f.stat().st_size for f in files(path) if f.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": sizes}, indent=2))
    return path


def test_a_checkpoint_of_the_first_release_without_hashes_is_taken(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    assert newest_good(tmp_path, ALONE) == old(path)
    loaded = {"w": torch.zeros(3)}
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["w"], torch.randn(3, generator=generator(1)))


def test_one_whose_metadata_cannot_be_read_is_not(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    old(path)
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(b"\x00" * len(data))
    assert "not readable as metadata" in str(problem(path))


def test_one_of_another_step_is_not(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    moved = old(path).rename(tmp_path / "step_000002")
    assert problem(moved) == f"{moved}: its manifest.json is of step 1"


def choose_together(folder: Path) -> tuple[str, int]:
    """On each of two ranks: save twice; damage a file that rank 1 wrote; choose."""
    with distributed_session(timeout_s=60.0) as session:
        values = torch.arange(400.0)
        for step in (1, 2):
            state = {"a": values + step, "b": values - step}
            path = checkpoint.save(folder, step, state, TEXTS, session)
        if session.is_main:
            flip(path / "__1_0.distcp")
        session.barrier()
        fault = problem(path, rank=session.rank, world_size=2)
        return str(newest_good(folder, session)), int(fault is not None)


def test_ranks_share_the_reading_and_choose_alike(tmp_path: Path) -> None:
    found = run_on_ranks(2, choose_together, tmp_path)
    assert found == [(str(tmp_path / "step_000001"), 0), (str(tmp_path / "step_000001"), 1)]


# ---- what torn saves leave


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    path.rename(tmp_path / "step_000001.old")
    checkpoint.tidy(tmp_path)
    assert newest_good(tmp_path, ALONE) == path


def test_what_torn_saves_have_left_is_removed(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / "step_000001.old")
    shutil.copytree(path, tmp_path / "step_000002.tmp")
    (tmp_path / "step_000003.tmp").write_text("a file")
    (tmp_path / ".latest.5000017.part").write_text("x")
    checkpoint.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]


def test_a_file_with_a_checkpoints_name_is_no_checkpoint_and_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "step_000001").write_text("a file")
    assert newest_good(tmp_path, ALONE) is None
    (path,) = save(tmp_path, 1)
    assert whole(path) is None
