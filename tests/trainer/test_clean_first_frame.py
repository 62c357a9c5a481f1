"""Runs of models for which images are optional: with, without, and a share of both."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from model.types import Batch
from tests.ranks import run_on_ranks
from tests.runs import assert_same_end, built, cut_after, refusal, rows, run
from trainer.base import Trainer
from utils.data.shards import ShardReader, ShardWriter
from utils.media.images import to_signed

METHODS = (
    "dmd", "dmd_gan", "dmd_fdistill", "sid", "gan", "gan_teacher", "diffusion", "causvid",
    "consistency", "causal_diffusion", "self_forcing_dmd", "self_forcing_sid",
)  # fmt: skip
slow = partial(pytest.param, marks=pytest.mark.slow)
SHORT = ("steps=2", "batch_size=2", "validation.every=2", "validation.count=2")


MODEL = ("generator.model=Wan2.2-TI2V-Tiny", "latent_shape=[48,5,2,2]")


def on(root: Path, data: str = "latents_16") -> tuple[str, ...]:
    """What makes a run one of a TI2V model on data of its world."""
    return (*MODEL, f"data.path={root}/data/tiny/{data}")


def batches(trainer: Trainer, count: int) -> list[Batch]:
    """The global batches that a run begins with."""
    size = trainer.config.batch_size
    return [trainer.parts.batches(i * size, range(size)) for i in range(count)]


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_and_without_images(
    method: str, share: float, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    logdir = run(configs[method], tmp_path, *on(tiny_root), *SHORT, f"data.image_share={share}")
    assert len(rows(logdir)) == 2
    assert (logdir / "samples" / "step_000002.png").is_file()


def test_without_a_share_a_run_is_text_to_video(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, *on(tiny_root, "prompts.txt")) as trainer:
        (batch,) = batches(trainer, 1)
    assert batch.given is None
    assert batch.conditioning.first_frame is None


def test_a_share_of_the_batches_begins_with_the_first_frames_of_its_data(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = (*on(tiny_root), "data.image_share=0.5", "batch_size=2")
    with built(configs["diffusion"], tmp_path, *words) as trainer:
        made = batches(trainer, 40)
        begun = [batch.given is not None for batch in made]
    assert 8 <= sum(begun) <= 32
    for batch in made:
        assert batch.x0 is not None
        assert batch.given is None or torch.equal(batch.given, batch.x0[:, :, :1])


@pytest.mark.parametrize(("share", "every"), [(0.0, False), (1.0, True)])
def test_no_share_and_the_whole_one_are_exact(
    share: float, every: bool, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = (*on(tiny_root), f"data.image_share={share}", "batch_size=2")
    with built(configs["dmd"], tmp_path, *words) as trainer:
        assert [batch.given is not None for batch in batches(trainer, 10)] == [every] * 10


def test_images_stand_for_first_frames_where_there_are_no_latents(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    reader = ShardReader(tiny_root / "data" / "tiny" / "latents_16")
    images = torch.stack([reader.image(i) for i in range(8)])
    with ShardWriter(tmp_path / "images" / "shard") as writer:
        writer.append([reader.prompt(i) for i in range(8)], images=images)
    words = (*on(tiny_root), f"data.path={tmp_path}/images", "data.image_share=1", "batch_size=4")
    with built(configs["dmd"], tmp_path / "run", *words) as trainer:
        (batch,) = batches(trainer, 1)
        vae, record = trainer.parts.batches.vae, trainer.parts.batches.order[2]
    assert vae is not None
    assert batch.given is not None
    alone = vae.encode_to_latent(to_signed(images[record])[None, :, None])
    assert torch.equal(batch.given[2:3], alone)


@pytest.mark.parametrize("method", ["self_forcing_dmd", *map(slow, ("diffusion", "gan"))])
def test_a_stopped_run_of_both_kinds_resumes_bit_for_bit(
    method: str, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = (*on(tiny_root), "data.image_share=0.5", "batch_size=2", "steps=4")
    straight = run(configs[method], tmp_path / "straight", *words, "save_every=2")
    stopped = cut_after(straight, tmp_path / "stopped", 2)
    assert_same_end(run(configs[method], stopped, *words), straight, 4)


def test_a_critic_that_learns_on_the_generators_samples_is_given_their_frames(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    """A phase that is handed another's samples begins as they do."""
    words = (*on(tiny_root), "data.image_share=0.5", "batch_size=2", "steps=6")
    logdir = run(configs["dmd"], tmp_path, *words, "loss.reuse_rollout=true")
    assert len(rows(logdir)) == 6


def train_both_kinds(config: str, logdir: str, root: str, *more: str) -> None:
    """What each rank does."""
    words = (*on(Path(root)), "data.image_share=0.5", "batch_size=4", "steps=4", *more)
    run(Path(config), Path(logdir), *words)


@pytest.mark.parametrize("method", ["self_forcing_dmd", slow("diffusion")])
def test_ranks_and_micro_batches_begin_alike(
    method: str, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    path = str(configs[method])
    run_on_ranks(2, train_both_kinds, path, str(tmp_path / "two"), str(tiny_root))
    train_both_kinds(path, str(tmp_path / "one"), str(tiny_root))
    train_both_kinds(path, str(tmp_path / "parts"), str(tiny_root), "accumulation=2")
    for name in ("two", "parts"):
        for other, one in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_scored_frames_of_a_longer_rollout_begin_with_a_clean_one(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = (*on(tiny_root), *SHORT, "causal.rollout_frames=9", "data.image_share=0.5")
    assert len(rows(run(configs["self_forcing_dmd"], tmp_path, *words))) == 2


def test_a_given_frame_may_be_noised_a_little_as_the_release_did(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = (*on(tiny_root), *SHORT, "data.image_share=1", "loss.given_noise=0.2")
    assert len(rows(run(configs["diffusion"], tmp_path, *words))) == 2


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        (
            "dmd",
            ("data.image_share=0.5", "data.path={root}/data/tiny/prompts.txt"),
            "data.path: data.image_share needs real latents or images, but "
            "{root}/data/tiny/prompts.txt holds none",
        ),
        (
            "dmd",
            ("data.image_share=1.5",),
            "data.image_share: must lie in [0, 1], or be null, got 1.5",
        ),
        (
            "self_forcing_dmd",
            ("data.image_share=0.5", "causal.given_first_frame=true"),
            "data.image_share: causal.given_first_frame=true says 1 already; set one of them",
        ),
        (
            "self_forcing_dmd",
            (
                "data.image_share=0.5",
                "causal.independent_first_frame=false",
                "causal.num_frame_per_block=5",
            ),
            "data.image_share: 1 given frames of 5 must end where a block ends: at one of none, "
            "the video is one block; set causal.independent_first_frame=true",
        ),
        (
            "diffusion",
            ("loss.given_noise=0.2",),
            "loss.given_noise: has no effect without data.image_share",
        ),
        (
            "causal_diffusion",
            ("loss.given_noise=0.2", "data.image_share=1"),
            "loss.given_noise: has no effect with generator_type: causal, whose past "
            "loss.clean_noise noises",
        ),
        (
            "dmd",
            (
                "data.image_share=1",
                "validation.every=1",
                "validation.prompts={root}/data/tiny/prompts.txt",
            ),
            "validation.prompts: this run's videos begin with an image, which a prompt file does "
            "not hold; set it to null to show the data's first records",
        ),
    ],
)
def test_shares_that_cannot_be_are_refused(
    method: str,
    words: tuple[str, ...],
    expected: str,
    configs: dict[str, Path],
    tiny_root: Path,
    tmp_path: Path,
) -> None:
    words = tuple(word.format(root=tiny_root) for word in words)
    message = refusal(configs[method], tmp_path, *on(tiny_root), *words)
    assert message == expected.format(root=tiny_root)
