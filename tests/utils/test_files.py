"""What killed writers leave half written goes at the next start; what others write stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.disks import ended_process
from utils.files import remove_leftovers, replaced_atomically


def part(path: Path, process: int) -> Path:
    """What a writer of `path` leaves that is killed."""
    left = path.with_name(f".{path.name}.{process}.part{path.suffix}")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    return left


@pytest.mark.parametrize("name", ["manifest.json", "videos/a [cat] *.mp4", "data", "a.b.c.png"])
def test_what_killed_writers_left_is_removed_below_a_folder(name: str, tmp_path: Path) -> None:
    left = part(tmp_path / name, ended_process())
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_what_another_process_writes_now_stays(tmp_path: Path) -> None:
    left = part(tmp_path / "a.mp4", os.getppid())
    remove_leftovers(tmp_path)
    with replaced_atomically(tmp_path / "a.mp4") as own:
        own.write_bytes(b"whole")
    assert left.exists()


def test_files_that_only_look_alike_stay(tmp_path: Path) -> None:
    names = [".a.part", "a.mp4.12.part.mp4", ".a.mp4.x.part.mp4", ".a.mp4.12.party"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".a.mp4.12.part.mp4").mkdir()
    remove_leftovers(tmp_path)
    assert all((tmp_path / name).exists() for name in [*names, ".a.mp4.12.part.mp4"])


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_writing_a_file_again_removes_what_a_kill_left_of_it_alone(tmp_path: Path) -> None:
    gone = ended_process()
    own, other = part(tmp_path / "a.json", gone), part(tmp_path / "b.json", gone)
    with replaced_atomically(tmp_path / "a.json") as path:
        path.write_text("{}", encoding="utf-8")
    assert (own.exists(), other.exists()) == (False, True)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "{}"


def test_what_is_half_written_may_lie_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with replaced_atomically(tmp_path / "videos" / "a.mp4", tmp_path / "parts") as path:
        path.write_bytes(b"whole")
        assert path.parent == tmp_path / "parts"
        assert list((tmp_path / "videos").iterdir()) == []
    assert (tmp_path / "videos" / "a.mp4").read_bytes() == b"whole"
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_folder_of_another_file_system_is_no_place_for_what_becomes_a_file_here(
    tmp_path: Path,
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    with replaced_atomically(tmp_path / "a.mp4", other) as path:
        path.write_bytes(b"whole")
        assert path.parent == tmp_path
    assert (tmp_path / "a.mp4").read_bytes() == b"whole"
