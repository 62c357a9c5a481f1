"""scripts/make_tiny_world.py: what it says where it cannot write."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import make_tiny_world
from tests.commands import refusal


def test_a_folder_that_cannot_be_made_is_told_in_a_line(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["--model_root", f"{tiny_root}/wan_models", "--data_path", f"{tmp_path}/file/data"]
    message = refusal(make_tiny_world.main, words, capsys)
    assert message == f"{tmp_path}/file/data: not a directory"


def test_a_world_without_clips_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_root", str(tmp_path), "--data_path", str(tmp_path), "--clips", "0"]
    assert refusal(make_tiny_world.main, words, capsys) == "--clips: must be at least 1, got 0"
