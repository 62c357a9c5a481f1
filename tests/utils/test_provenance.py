"""Commit, version and time, in words."""

from __future__ import annotations

import subprocess
from pathlib import Path

from utils.provenance import commit, stamp, version
from utils.version import VERSION


def git(folder: Path, *words: str) -> str:
    named = ("-c", "user.name=a", "-c", "user.email=a@b")
    line = ["git", "-C", str(folder), *named, *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_tells_its_commit_and_whether_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == short
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{short}+"


def test_what_is_no_checkout_has_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) is None


def test_version_and_time_are_short() -> None:
    assert version().startswith(VERSION)
    assert stamp(0.0) == "1970-01-01 00:00 UTC"
