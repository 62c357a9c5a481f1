"""Output folders that several calls fill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from utils.claims import Claim, Rejected, read_rejected, rejection, write_rejected
from utils.config import ConfigError
from utils.distributed import Session, distributed_session
from utils.errors import UserError

ALONE = Session(0, 1, torch.device("cpu"))


def claim(folder: Path, settings: dict[str, object]) -> None:
    Claim(folder, settings, holds="latents", flag="--out", results="*.pt").take(ALONE)


def test_a_folder_is_claimed_once_and_found_again(tmp_path: Path) -> None:
    claim(tmp_path / "a", {"size": [3, 4], "fps": 8.0})
    claim(tmp_path / "a", {"size": [3, 4], "fps": 8.0})
    with pytest.raises(ValueError) as caught:
        claim(tmp_path / "a", {"size": [3, 5], "fps": 8.0})
    assert str(caught.value) == (
        f"--out {tmp_path}/a: holds latents of other settings (size was [3, 4], is [3, 5]); use "
        "another folder"
    )


def test_settings_that_came_and_went_are_told(tmp_path: Path) -> None:
    claim(tmp_path, {"steps": 4, "shift": 5.0, "none": None})
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path, {"steps": 4, "solver": "euler"})
    assert str(caught.value) == (
        f"--out {tmp_path}: holds latents of other settings (solver was absent, is euler; "
        "shift was 5.0, is absent); use another folder"
    )


def test_results_without_settings_are_someone_elses(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path, {})
    assert str(caught.value) == (
        f"--out {tmp_path}: holds latents of unknown origin (it has no settings.json); use another "
        "folder"
    )
    assert not (tmp_path / "settings.json").exists()


def test_a_claim_may_lie_in_another_file(tmp_path: Path) -> None:
    for count in (3, 3):
        Claim(tmp_path, {"count": count}, holds="pairs", file="manifest.json").take(ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    with pytest.raises(ConfigError, match=r"--output_folder .* pairs .* \(count was 3, is 4\)"):
        Claim(tmp_path, {"count": 4}, holds="pairs", file="manifest.json").take(ALONE)


def told(folder: Path) -> str:
    """What one rank finds or is told of a folder that the main rank alone looks at."""
    with distributed_session(timeout_s=60.0) as session:
        try:
            Claim(folder, {"fps": session.rank}, holds="latents").take(session)
        except UserError as error:
            return str(error)
    return (folder / "settings.json").read_text()


@pytest.mark.slow
def test_every_rank_finds_the_main_ranks_claim_or_is_told_why_not(tmp_path: Path) -> None:
    for _ in range(2):
        assert run_on_ranks(2, told, tmp_path / "a") == ['{\n "fps": 0\n}'] * 2
    claim(tmp_path / "b", {"fps": 8})
    one, other = run_on_ranks(2, told, tmp_path / "b")
    assert one == other
    assert "(fps was 8, is 0)" in one


def test_what_a_killed_call_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, {})
    for name in (
        ".a.pt.5000012.part.pt", "a.pt", ".hidden", ".my.part.pt", "sub/.b.json.5000007.part.json",
        "sub/part.pt", "sub/.b.7.part/c.pt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    claim(tmp_path, {})
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == [
        ".hidden", ".my.part.pt", "a.pt", "settings.json", "sub/.b.7.part/c.pt", "sub/part.pt",
    ]  # fmt: skip


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    for text in ("{", "[]", "\xff"):
        (tmp_path / "settings.json").write_text(text, encoding="latin-1")
        expected = r"settings.json: not the settings of latents: .*; use another folder"
        with pytest.raises(ConfigError, match=expected):
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


def test_settings_that_older_folders_lack_have_the_value_they_were_made_with(
    tmp_path: Path,
) -> None:
    def claimed(**settings: object) -> None:
        Claim(tmp_path, settings, holds="clips", older={"vae": "full"}).take(ALONE)

    claim(tmp_path, {"seed": 0})
    claimed(seed=0, vae="full")
    with pytest.raises(ConfigError, match=r"other settings \(vae was full, is tiny\)"):
        claimed(seed=0, vae="tiny")
