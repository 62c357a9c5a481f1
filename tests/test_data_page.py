"""Every command of docs/data.md runs as it is written, on tiny videos, one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from scripts import compute_vae_latent, create_lmdb_14b_shards, validate_dataset
from scripts.make_tiny_world import NAME
from tests.commands import own_logging
from tests.documented import documented, script_of
from tests.videos import make_video
from utils.data.captioned_clips import read_encoded_clips
from utils.data.shards import ShardReader, shard_paths

__all__ = ["own_logging"]

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "compute_vae_latent.py": compute_vae_latent.main,
    "create_lmdb_14b_shards.py": create_lmdb_14b_shards.main,
    "validate_dataset.py": validate_dataset.main,
}
SMALL = ["--num_frames", "5", "--fps", "8"]


def miniature(words: list[str]) -> list[str]:
    """A documented command's arguments, with small sizes."""
    arguments = words[[Path(word).name == script_of(words) for word in words].index(True) + 1 :]
    if script_of(words) != "compute_vae_latent.py":
        return arguments
    sizes = {"480x832": "32x64", "832x480": "64x32", "640x640": "48x48"}
    small = ["--height", "32", "--width", "64", *SMALL]
    return [sizes.get(word, word) for word in arguments] + small


def run(words: list[str]) -> None:
    assert MAINS[script_of(words)](miniature(words)) == 0, words


@pytest.fixture
def folder(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page's commands are run: videos, their texts twice, and a model."""
    model = tmp_path / "wan_models" / "Wan2.1-T2V-14B"
    shutil.copytree(tiny_root / "wan_models" / NAME, model)
    (tmp_path / "data" / "texts").mkdir(parents=True)
    for name, size in (("cat", (32, 64)), ("dog", (64, 32)), ("owl", (40, 40))):
        make_video(tmp_path / "data" / "videos" / f"{name}.mp4", frames=12, size=size)
        for place in ("videos", "texts"):
            (tmp_path / "data" / place / f"{name}.txt").write_text(f"a {name}\n")
    (tmp_path / "data" / "foreign_latents").mkdir()
    for number, name in enumerate(("cat", "owl")):
        latents = torch.full((1, 2, 16, 4, 8), float(number))
        torch.save({f"a {name}": latents}, tmp_path / "data" / "foreign_latents" / f"{number}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def test_the_commands_of_the_page_run_one_after_the_other(folder: Path) -> None:
    commands = documented("docs/data.md")
    assert {script_of(words) for words in commands} == set(MAINS)
    for words in commands:
        run(words)
    assert len(ShardReader(folder / "shards")) == 3
    assert ShardReader(folder / "foreign_shards").image_shape(0) == (32, 64)
    assert len(list((folder / "latents_of_all_sizes").glob("*.pt"))) == 6
    (clip,) = read_encoded_clips(folder / "latents_of_all_sizes" / "dog-1.pt")
    assert clip.latents.shape == (16, 2, 8, 4)


def test_a_shard_that_was_cut_is_made_anew_alone_as_the_page_says(folder: Path) -> None:
    encode, shards = (
        next(w for w in documented("docs/data.md") if script_of(w) == name)
        for name in ("compute_vae_latent.py", "create_lmdb_14b_shards.py")
    )
    run(encode)
    run(shards)
    cut, *others = shard_paths(folder / "shards")
    untouched = [(path / "data.mdb").stat().st_mtime_ns for path in others]
    whole = (cut / "data.mdb").read_bytes()
    shutil.rmtree(cut)
    run(shards)
    assert (cut / "data.mdb").read_bytes() == whole
    assert [(path / "data.mdb").stat().st_mtime_ns for path in others] == untouched
