"""Runs of models for which images are optional: with, without, and a share of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.types import Batch
from tests.ranks import run_on_ranks
from tests.runs import assert_same_end, built, cut_after, refusal, rows, run
from trainer.base import Trainer
from utils.data.shards import ShardReader, ShardWriter
from utils.media.images import to_signed

from model.families.base import ImageSpec
from model.families.tiny_world import TinyWorld

METHODS = (
    "dmd", "dmd_gan", "dmd_fdistill", "sid", "gan", "gan_teacher", "diffusion", "causvid", "consistency",
    "causal_diffusion", "self_forcing_dmd", "self_forcing_sid",
)  # fmt: skip


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ImageSpec(count=1, how="frame", clip=False, required=False)
    monkeypatch.setattr(TinyWorld, "images", property(lambda self: spec))


@pytest.fixture
def words(tiny_root: Path) -> tuple[str, ...]:
    """What makes a run one of a TI2V model on data with latents and images."""
    return (f"data.path={tiny_root}/data/tiny/latents",)


def first_batch(trainer: Trainer, draws: int = 0) -> Batch:
    """The global batch that begins at `draws`."""
    return trainer.parts.batches(draws, range(trainer.config.batch_size))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_and_without_images(
    method: str, share: float, configs: dict[str, Path], words: tuple[str, ...], tmp_path: Path
) -> None:
    share_words = (
        f"data.image_share={share}",
        "steps=2",
        "validation.every=2",
        "batch_size=2",
        "validation.count=2",
    )
    logdir = run(configs[method], tmp_path, *words, *share_words)
    assert len(rows(logdir)) == 2
    assert (logdir / "samples" / "step_000002.png").is_file()
