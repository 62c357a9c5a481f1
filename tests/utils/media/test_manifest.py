"""What a manifest says of files and code is what others find."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from utils.config import ConfigError
from utils.distributed import Session
from utils.media.manifest import (
    claim_folder,
    code_revision,
    package_versions,
    weight_files,
)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_files_of_an_index_are_itself_and_its_shards(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    shards = {"x": "model-2.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors"}
    path.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    assert weight_files(path) == {
        name: tmp_path / name for name in (path.name, "model-1.safetensors", "model-2.safetensors")
    }


def test_the_files_of_a_training_checkpoint_are_its_data(tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml", "manifest.json"):
        (tmp_path / name).touch()
    assert sorted(weight_files(tmp_path)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def test_one_file_is_itself(tmp_path: Path) -> None:
    assert weight_files(tmp_path / "a.pt") == {"a.pt": tmp_path / "a.pt"}


def test_the_revision_of_a_checkout_and_whether_tracked_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert code_revision(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1", encoding="utf-8")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "clip.mp4").touch()
    assert code_revision(tmp_path) == {"revision": commit, "dirty": False}
    (tmp_path / "a.py").write_text("2", encoding="utf-8")
    assert code_revision(tmp_path) == {"revision": commit, "dirty": True}


def test_code_outside_a_checkout_has_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_revision(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").touch()
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "installed").mkdir()
    assert code_revision(tmp_path / "installed") is None  # it is someone else's checkout
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_revision(tmp_path) is None  # there is no git


def test_versions_are_those_of_what_is_installed() -> None:
    versions = package_versions(["torch", "no-such-package"])
    assert versions["torch"] is not None and versions["python"] is not None
    assert versions["no-such-package"] is None


def test_ranks_that_found_different_checkpoints_are_refused(tmp_path: Path) -> None:
    class Pair(Session):
        def gather(self, value: str) -> list[str]:  # type: ignore[override]
            return [value, f"{tmp_path}/step_000002"]

    session = Pair(rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"step_000001.*step_000002"):
        claim_folder(tmp_path / "clips", {}, [tmp_path / "step_000001"], [], session)
    assert not (tmp_path / "clips").exists()
