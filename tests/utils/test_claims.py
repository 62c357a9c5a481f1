"""Output folders that several calls fill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from utils.claims import Rejected, claim_folder, read_rejected, rejection, write_rejected
from utils.distributed import Session, distributed_session

ALONE = Session(0, 1, torch.device("cpu"))


def claim(folder: Path, settings: dict[str, object]) -> None:
    claim_folder(folder, settings, ALONE, holds="latents", flag="--out")


def test_a_folder_is_claimed_once_and_found_again(tmp_path: Path) -> None:
    claim(tmp_path / "a", {"size": [3, 4], "fps": 8.0})
    claim(tmp_path / "a", {"size": [3, 4], "fps": 8.0})
    with pytest.raises(ValueError) as caught:
        claim(tmp_path / "a", {"size": [3, 5], "fps": 8.0})
    assert str(caught.value) == (
        f"--out {tmp_path}/a: holds latents of other settings (size was [3, 4], is [3, 5]); use "
        "another folder"
    )


def test_what_a_killed_call_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.pt.12.part.pt", "a.pt", ".hidden", "sub/.b.json.7.part.json", "sub/part.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    claim(tmp_path, {})
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".hidden", "a.pt", "settings.json", "sub/part.pt"]


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: damaged: .*; use another folder"):
        claim(tmp_path, {})


def test_rejected_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    entries = [Rejected("\u732b.mp4", "too short"), Rejected("b", "torn")]
    write_rejected(tmp_path / "r.json", entries)
    assert read_rejected(tmp_path / "r.json") == entries
    assert read_rejected(tmp_path / "none.json") == []


@pytest.mark.parametrize("text", ["{", "3", '[{"file": "x"}]', "[3]"])
def test_a_damaged_list_of_rejected_files_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json: not a list of rejected files: "):
        read_rejected(tmp_path / "r.json")


def test_a_reason_is_one_line_without_the_files_name() -> None:
    error = ValueError("data/a.mp4: torn\nin the middle")
    assert rejection("a.mp4", Path("data/a.mp4"), error) == Rejected("a.mp4", "torn")


def gathered() -> list[list[Rejected]]:
    with distributed_session(timeout_s=60.0) as session:
        return session.gather([Rejected(f"{session.rank}", "")] * session.rank)


def test_every_rank_gets_what_all_ranks_have_in_their_order() -> None:
    expected = [[], [Rejected("1", "")], [Rejected("2", "")] * 2]
    assert run_on_ranks(3, gathered) == [expected] * 3


def test_a_process_alone_gathers_its_own() -> None:
    assert ALONE.gather(3) == [3]
