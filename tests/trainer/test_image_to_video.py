"""Runs that begin with images: image-to-video models, given first frames, data of several sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.families.tiny_world import TinyWorld
from model.types import Batch
from scripts import precompute_prompts
from tests.ranks import run_on_ranks
from tests.runs import assert_same_end, built, cut_after, refusal, rows, run
from trainer.base import Trainer
from utils.data.shards import ShardReader, ShardWriter
from utils.media.images import to_signed

IMAGES = ("generator.model=Wan2.1-I2V-Tiny",)
METHODS = ("dmd", "dmd_gan", "sid", "gan", "diffusion", "causvid", "consistency")
SELF_FORCING = ("causal.given_first_frame=true",)


def first_batch(trainer: Trainer) -> Batch:
    """The global batch that a run begins with."""
    return trainer.parts.batches(0, range(trainer.config.batch_size))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """Shards of two lengths and two sizes, 8 records of each, with first frames."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = torch.Generator().manual_seed(0)
    prompts = [ShardReader(tiny_root / "data" / "tiny" / "latents").prompt(i) for i in range(8)]
    for frames, rows_, columns in ((5, 4, 4), (3, 4, 4), (5, 2, 6)):
        with ShardWriter(folder / f"shard_{frames}x{rows_}x{columns}") as writer:
            latents = torch.randn(8, 16, frames, rows_, columns, generator=rng)
            size = (8, 3, 8 * rows_, 8 * columns)
            images = torch.randint(256, size, generator=rng, dtype=torch.uint8)
            writer.append(prompts, latents, images=images)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_an_image_to_video_model(
    method: str, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    data = f"data.path={tiny_root}/data/tiny/latents"
    logdir = run(configs[method], tmp_path, *IMAGES, data, "steps=2")
    assert len(rows(logdir)) == 2


def test_a_stopped_run_with_images_resumes_bit_for_bit(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = (*IMAGES, f"data.path={tiny_root}/data/tiny/latents", "batch_size=2", "steps=3")
    straight = run(configs["dmd"], tmp_path / "straight", *words, "save_every=2")
    stopped = cut_after(straight, tmp_path / "stopped", 2)
    assert_same_end(run(configs["dmd"], stopped, *words), straight, 3)


def test_a_batch_is_conditioned_on_its_first_frames(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    data = f"data.path={tiny_root}/data/tiny/latents"
    with built(configs["dmd"], tmp_path, *IMAGES, data) as trainer:
        batch, loader = first_batch(trainer), trainer.parts.batches
        records = [loader.dataset[loader.order[i]].latents for i in range(4)]
        del loader
    clip, frame = batch.conditioning.clip, batch.conditioning.first_frame
    assert batch.x0 is None  # nothing of this method needs latents
    x0 = torch.stack([latents for latents in records if latents is not None])
    assert clip is not None
    assert frame is not None
    assert (clip.shape, frame.shape) == ((4, 5, 80), (4, 20, 5, 4, 4))
    assert batch.unconditional.first_frame is frame
    # The tiny codec sees the first frame by itself: its latents are those of the whole clip, but
    # for the rounding of pixels to bytes and of latents to half precision.
    torch.testing.assert_close(frame[:, 4:, 0], x0[:, :, 0], atol=0.05, rtol=0.0)
    assert not torch.allclose(frame[:, 4:, 1], x0[:, :, 1], atol=0.5)


def test_a_causal_run_begins_with_images_where_there_are_no_latents(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    reader = ShardReader(tiny_root / "data" / "tiny" / "latents")
    prompts = [reader.prompt(i) for i in range(8)]
    images = torch.stack([reader.image(i) for i in range(8)])
    with ShardWriter(tmp_path / "images" / "shard") as writer:
        writer.append(prompts, images=images)
    words = (*SELF_FORCING, f"data.path={tmp_path}/images", "steps=2", "validation.every=2")
    with built(configs["self_forcing_dmd"], tmp_path / "run", *words) as trainer:
        given = first_batch(trainer).given
        vae = trainer.parts.batches.vae
        records = [trainer.parts.batches.order[i] for i in range(4)]
        trainer.train()
    assert given is not None
    assert vae is not None
    expected = vae.encode_to_latent(to_signed(images[records[2]])[None, :, None])
    assert torch.equal(given[2:3], expected)
    assert (tmp_path / "run" / "samples" / "step_000002.png").is_file()


def test_an_image_to_video_generator_may_be_causal(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    data = f"data.path={tiny_root}/data/tiny/latents"
    words = (*IMAGES, data, "steps=2", "validation.every=2", "validation.count=2")
    logdir = run(configs["self_forcing_dmd"], tmp_path, *words)
    assert (logdir / "samples" / "step_000002.png").is_file()


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        (
            "dmd",
            (*IMAGES, "data.path={root}/data/tiny/prompts.txt"),
            "data.path: {root}/wan_models/Wan2.1-I2V-Tiny begins its videos with an image, but "
            "{root}/data/tiny/prompts.txt holds none; make shards with images by "
            "scripts/create_lmdb_14b_shards.py",
        ),
        (
            "dmd",
            ("teacher.model=Wan2.1-I2V-Tiny", "critic.model=Wan2.1-T2V-Tiny"),
            "teacher.model: an image-to-video model and a text-to-video model cannot be used "
            "together; generator {root}/wan_models/Wan2.1-T2V-Tiny, critic "
            "{root}/wan_models/Wan2.1-T2V-Tiny, teacher {root}/wan_models/Wan2.1-I2V-Tiny",
        ),
        (
            "dmd",
            (*IMAGES, "data.path={root}/data/tiny/latents", "latent_shape=[16,5,4,6]"),
            "latent_shape: is [16, 5, 4, 6], but the latents in {root}/data/tiny/latents are "
            "[16, 5, 4, 4]",
        ),
        (
            "dmd",
            (
                *IMAGES,
                "data.path={root}/data/tiny/latents",
                "validation.every=1",
                "validation.prompts={root}/data/tiny/prompts.txt",
            ),
            "validation.prompts: this run's videos begin with an image, which a prompt file does "
            "not hold; set it to null to show the data's first records",
        ),
        (
            "self_forcing_dmd",
            (*IMAGES, "data.path={root}/data/tiny/latents", "causal.rollout_frames=9"),
            "causal.rollout_frames: an image-to-video model is scored from its first frame on; "
            "set it to null",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    method: str,
    words: tuple[str, ...],
    expected: str,
    configs: dict[str, Path],
    tiny_root: Path,
    tmp_path: Path,
) -> None:
    words = tuple(word.format(root=tiny_root) for word in words)
    assert refusal(configs[method], tmp_path, *words) == expected.format(root=tiny_root)


def test_data_of_several_shapes_needs_a_word(
    configs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    message = refusal(configs["diffusion"], tmp_path, f"data.path={shapes}")
    assert message.startswith(f"latent_shape: is [16, 5, 4, 4], but the latents in {shapes} are [[")
    assert message.endswith("]]; data.buckets=true trains on them all")


def test_a_bucket_that_the_model_cannot_make_is_refused(
    configs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    words = ("data.buckets=true", "causal.num_frame_per_block=4", f"data.path={shapes}")
    message = refusal(configs["causal_diffusion"], tmp_path, *words)
    assert "holds [16, 5, 4, 4]: " in message or "holds [16, 3, 4, 4]: " in message


def test_a_bucket_is_checked_where_the_method_needs_no_latents(
    configs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    words = ("data.buckets=true", "causal.num_frame_per_block=4", f"data.path={shapes}")
    message = refusal(configs["self_forcing_dmd"], tmp_path, *words)
    assert message.startswith(f"data.path: {shapes} holds [16, 3, 4, 4]: ")


def test_images_of_another_size_than_their_latents_are_refused_in_any_bucket(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    for name, size in (("a", (32, 48)), ("b", (32, 32))):
        with ShardWriter(tmp_path / "data" / name) as writer:
            images = torch.zeros(1, 3, *size, dtype=torch.uint8)
            writer.append(["x"], torch.zeros(1, 16, 5, 4, 4), images=images)
    words = (*IMAGES, "data.buckets=true", f"data.path={tmp_path}/data")
    assert refusal(configs["diffusion"], tmp_path, *words) == (
        f"data.path: {tmp_path}/data holds images of (32, 48) (height, width) with latents of "
        f"[16, 5, 4, 4]; they should be (32, 32)"
    )


def test_each_batch_is_of_one_shape(configs: dict[str, Path], shapes: Path, tmp_path: Path) -> None:
    words = (*IMAGES, "data.buckets=true", f"data.path={shapes}")
    found = set()
    with built(configs["diffusion"], tmp_path, *words) as trainer:
        for draws in range(0, 6 * 4, 4):
            batch = trainer.parts.batches(draws, range(4))
            assert batch.x0 is not None
            assert batch.conditioning.first_frame is not None
            assert tuple(batch.x0.shape[1:]) == batch.latent_shape
            assert batch.conditioning.first_frame.shape[2:] == batch.x0.shape[2:]
            found.add(batch.latent_shape)
    assert found == {(16, 5, 4, 4), (16, 3, 4, 4), (16, 5, 2, 6)}


@pytest.mark.parametrize("method", ["dmd", "diffusion"])
def test_a_stopped_run_on_buckets_resumes_bit_for_bit(
    method: str, configs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    words = (*IMAGES, "data.buckets=true", f"data.path={shapes}", "batch_size=2", "steps=4")
    straight = run(configs[method], tmp_path / "straight", *words, "save_every=2")
    stopped = cut_after(straight, tmp_path / "stopped", 2)
    assert_same_end(run(configs[method], stopped, *words), straight, 4)


def train_on_buckets(config: str, logdir: str, data: str) -> None:
    """What each rank does."""
    run(Path(config), Path(logdir), *IMAGES, "data.buckets=true", f"data.path={data}", "steps=3")


def test_two_ranks_read_the_same_buckets(
    configs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    run_on_ranks(2, train_on_buckets, str(configs["dmd"]), str(tmp_path / "two"), str(shapes))
    train_on_buckets(str(configs["dmd"]), str(tmp_path / "one"), str(shapes))
    for two, one in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_prompts_that_are_encoded_already_give_the_same_numbers(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    usual = run(configs["dmd"], tmp_path / "usual", "steps=2")
    assert (
        precompute_prompts.main(["--config_path", str(configs["dmd"]), "--output_path", str(store)])
        == 0
    )
    monkeypatch.setattr(TinyWorld, "load_text_encoder", None)  # whoever calls it fails
    again = run(configs["dmd"], tmp_path / "again", "steps=2", f"data.text_embeddings={store}")
    assert rows(again) == rows(usual)


def test_a_prompt_that_is_not_encoded_is_named_at_the_start(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    few, store = tmp_path / "few.txt", tmp_path / "store"
    few.write_text("a red bar\n")
    words = ["--config_path", str(configs["dmd"]), "--output_path", str(store)]
    assert precompute_prompts.main([*words, f"data.path={few}"]) == 0
    assert "precompute_prompts" in refusal(
        configs["dmd"], tmp_path, f"data.text_embeddings={store}"
    )
