"""Hashes of files are those of sha256sum, and a folder's follows names and contents."""

from __future__ import annotations

import hashlib
from pathlib import Path

from utils.hashes import CHUNK_BYTES, content_hash, sha256_of


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    content = {"a": b"", "b": b"weights", "c": bytes(CHUNK_BYTES + 1)}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    assert sha256_of({name: tmp_path / name for name in content}) == {
        name: hashlib.sha256(data).hexdigest() for name, data in content.items()
    }
    assert sha256_of({}) == {}


def test_a_file_is_known_by_its_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    assert content_hash(tmp_path / "a") == hashlib.sha256(b"x").hexdigest()
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "c")


def test_a_folder_is_known_by_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> str:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content, encoding="utf-8")
        return content_hash(tmp_path / name)

    first = folder("1", a="x", b="y")
    assert folder("2", b="y", a="x") == first
    assert folder("3", a="y", b="x") != first
    assert folder("4", a="x") != first
    assert folder("5", a="x", b="z") != first
    (tmp_path / "1" / ".cache").write_text("z", encoding="utf-8")
    assert content_hash(tmp_path / "1") == first
