"""A run whose data or weights have changed is not continued in silence."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import build_wan
from tests.runs import build, built, rows, run, write_config
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from utils.config import ConfigError
from utils.data.shards import ShardReader, ShardWriter
from utils.distributed import distributed_session
from utils.weights import write_weights

SHORT = ("steps=2", "save_every=1", "batch_size=2")
WEIGHTS = "wan_models/Wan2.1-T2V-Tiny/diffusion_pytorch_model.safetensors"
LATENTS = "data/tiny/latents"


@pytest.fixture(scope="module")
def begun(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data and a run on them, of which one of two steps is done."""
    room = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_root / "wan_models", room / "wan_models")
    shutil.copytree(tiny_root / "data", room / "data")
    run(write_config(room, room, "dmd_gan"), room / "run", *SHORT, "steps=1")
    return room


@pytest.fixture
def room(begun: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    copy = Path(shutil.copytree(begun, tmp_path / "room"))
    write_config(copy, copy, "dmd_gan")
    return copy


def rewrite(room: Path, count: int, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Write the shard of latents anew, with `count` records."""
    reader = ShardReader(room / LATENTS)
    order = [i % len(reader) for i in range(count)]
    prompts = [reader.prompt(i) for i in order]
    latents = torch.stack([change(n, reader.latents(i)) for n, i in enumerate(order)])
    images = torch.stack([reader.image(i) for i in order])
    del reader
    shutil.rmtree(room / LATENTS)
    with ShardWriter(room / LATENTS / "shard") as writer:
        writer.append(prompts, latents=latents, images=images)


def grow(room: Path) -> None:
    rewrite(room, 65, lambda _, x: x)


def shrink(room: Path) -> None:
    rewrite(room, 63, lambda _, x: x)


def exchange_latents(room: Path) -> None:
    rewrite(room, 64, lambda _, x: x + 1.0)


def exchange_weights(room: Path) -> None:
    write_weights(build_wan(seed=5).state_dict(), room / WEIGHTS, {})


CHANGES = {
    "grown": (grow, "data.path: has grown from 64 to 65 records"),
    "shrunk": (shrink, "data.path: has shrunk from 64 to 63 records"),
    "latents": (exchange_latents, "data.path: latents, images or trajectories were changed"),
    "weights": (
        exchange_weights,
        "critic: the weights that it begins with were exchanged; "
        "generator: the weights that it begins with were exchanged; "
        "teacher: the weights that it begins with were exchanged",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named_and_needs_a_flag(
    change: str, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mend, told = CHANGES[change]
    mend(room)
    config = load(room / "dmd_gan.yaml", SHORT)
    with distributed_session() as session:
        with pytest.raises(ConfigError) as caught:
            build(room / "dmd_gan.yaml", room / "run", session, *SHORT)
        assert str(caught.value) == (
            f"{room / 'run'}: holds another run; use a new --logdir, restore what has changed, or "
            f"continue all the same with --allow_config_change: {told}"
        )
        del caught
        options = RunOptions(room / "run", "dmd_gan", wandb=False, allow_change=True)
        with caplog.at_level(logging.WARNING, logger="trainer.logdir"):
            build_trainer(config, session, options).train()
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"continuing although changed: {part}" for part in told.split("; ")]
    assert [row["step"] for row in rows(room / "run")] == [1, 2]


def test_reordered_captions_are_noticed(room: Path, tiny_root: Path) -> None:
    captions = (tiny_root / "data/tiny/prompts.txt").read_text(encoding="utf-8").splitlines()
    config = write_config(room, room, "dmd")
    run(config, room / "again", *SHORT, "steps=1")
    path = room / "data/tiny/prompts.txt"
    path.write_text("\n".join(reversed(captions)), encoding="utf-8")
    told = r"captions were changed, or records reordered$"
    with pytest.raises(ConfigError, match=told), built(config, room / "again", *SHORT):
        pytest.fail("other data was taken")


def test_a_run_whose_folders_were_moved_goes_on(room: Path) -> None:
    run(room / "dmd_gan.yaml", room / "run", *SHORT)
    assert [row["step"] for row in rows(room / "run")] == [1, 2]


def test_a_damaged_fingerprint_is_named(room: Path) -> None:
    path = room / "run" / "fingerprint.json"
    path.write_text(json.dumps({"records": 3}), encoding="utf-8")
    told = rf"^{path}: damaged: .*; delete it to go on without$"
    config = room / "dmd_gan.yaml"
    with pytest.raises(ConfigError, match=told), built(config, room / "run", *SHORT):
        pytest.fail("a damaged file was taken")
