"""inference.py --i2v as its user meets it: a folder of images and texts becomes clips of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import inference
from model.families.wan21.folder import CONFIG, WEIGHTS
from model.wan.config import write_wan_config
from scripts.make_tiny_world import IMAGE_NAME
from tests.commands import no_weights, own_logging, refusal
from tests.conftest import IMAGE_MINIATURE, build_wan
from tests.ranks import run_on_ranks
from tests.runs import write_config
from utils.media.video import save_mp4
from utils.weights import write_weights

__all__ = ["no_weights", "own_logging"]

CAPTIONS = {
    "boat": "a red circle moves right quickly on a dark floor",
    "cat": "a green bar moves up/down slowly",
    "dog": "a blue triangle moves left slowly on a light floor",
}
SIZES = {"boat": (32, 32), "cat": (64, 96), "dog": (90, 40)}  # height, width


@dataclass(frozen=True)
class World:
    """An image-to-video model, pairs, and the clips of one plain call."""

    config: Path
    weights: Path
    pairs: Path
    clips: Path  # of the pairs, batch size 2, one process

    def words(self, output: Path, *more: str) -> list[str]:
        """The command line of the plain call into another folder, with changes."""
        return [
            "--config_path", str(self.config), "--checkpoint_path", str(self.weights),
            "--data_path", str(self.pairs), "--output_folder", str(output), "--i2v",
            "--batch_size", "2", *more,
        ]  # fmt: skip


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """An image of noise with four channels, half of it transparent."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 4), dtype=np.uint8)
    pixels[: size[0] // 2, :, 3] = 255
    pixels[size[0] // 2 :, :, 3] = 0
    iio.imwrite(path, pixels)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    """Three pairs, 4-channel PNG files of three sizes, and their clips."""
    folder = tmp_path_factory.mktemp("images")
    config = write_config(folder, tiny_root, "dmd")
    text = config.read_text(encoding="utf-8").replace("Wan2.1-T2V-Tiny", IMAGE_NAME)
    config.write_text(text, encoding="utf-8")
    (folder / "pairs").mkdir()
    for seed, (stem, caption) in enumerate(CAPTIONS.items()):
        picture(folder / "pairs" / f"{stem}.png", SIZES[stem], seed)
        (folder / "pairs" / f"{stem}.txt").write_text(f"{caption}\n", encoding="utf-8")
    weights = tiny_root / "wan_models" / IMAGE_NAME
    made = World(config, weights, folder / "pairs", folder / "clips")
    assert inference.main(made.words(made.clips)) == 0
    return made


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.mp4")
    }


def test_each_pair_becomes_a_clip_named_by_its_text(world: World) -> None:
    made = digests(world.clips)
    assert sorted(made) == [
        "a blue triangle moves left slowly on a light floor-0.mp4",
        "a green bar moves up_down slowly-0.mp4",
        "a red circle moves right quickly on a dark floor-0.mp4",
    ]
    assert len(set(made.values())) == 3
    for path in world.clips.glob("*.mp4"):
        assert iio.imread(path).shape == (17, 256, 256, 3)


def test_two_processes_write_what_one_writes_byte_for_byte(world: World, tmp_path: Path) -> None:
    line = world.words(tmp_path / "two", "--image_size", "aspect")
    assert run_on_ranks(2, inference.main, line) == [0, 0]
    assert inference.main(world.words(tmp_path / "one", "--image_size", "aspect")) == 0
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    told = [
        json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))["clips"]
        for name in ("one", "two")
    ]
    assert told[0] == told[1]


def test_a_clip_depends_on_its_image(world: World, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    picture(pairs / "boat.png", SIZES["boat"], seed=7)
    (pairs / "boat.txt").write_text(CAPTIONS["boat"], encoding="utf-8")
    line = world.words(tmp_path / "clips", "--data_path", str(pairs))
    assert inference.main(line) == 0
    ((name, digest),) = digests(tmp_path / "clips").items()
    assert digest != digests(world.clips)[name]


def test_what_was_done_to_each_image_is_said_once(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = world.words(tmp_path / "clips", "--num_samples", "2", "--num_output_frames", "2")
    assert inference.main(line) == 0
    told = capsys.readouterr().err
    for text in (
        "boat.png: 32 x 32 kept (height x width)",
        "cat.png: 64 x 96 scaled to 32 x 48, cropped to 32 x 32 (height x width)",
        "dog.png: 90 x 40 scaled to 72 x 32, cropped to 32 x 32 (height x width)",
    ):
        assert told.count(text) == 1, told
    assert len(digests(tmp_path / "clips")) == 6


def test_clips_may_take_the_aspect_ratio_of_their_images(world: World, tmp_path: Path) -> None:
    line = world.words(tmp_path / "clips", "--image_size", "aspect")
    assert inference.main(line) == 0
    manifest = json.loads((tmp_path / "clips" / "manifest.json").read_text(encoding="utf-8"))
    sizes = {clip["images"][0]: (clip["height"], clip["width"]) for clip in manifest["clips"]}
    assert [sizes[str(world.pairs / f"{stem}.png")] for stem in CAPTIONS] == [
        (32, 32),
        (32, 32),
        (48, 16),
    ]
    assert iio.imread(tmp_path / "clips" / f"{CAPTIONS['dog']}-0.mp4").shape[1:3] == (768, 256)


def test_only_clips_of_one_size_share_a_batch(world: World, tmp_path: Path) -> None:
    line = world.words(tmp_path, "--image_size", "aspect", "--num_samples", "3")
    args = inference.parser().parse_intermixed_args(line)
    jobs = inference.prepare(args).jobs
    cut = [[job.item.name for job in batch] for batch in inference.batches(jobs, 2)]
    assert cut == [["boat", "boat"], ["boat", "cat"], ["cat", "cat"], ["dog", "dog"], ["dog"]]


def test_extended_prompts_of_pairs_go_by_file_name(world: World, tmp_path: Path) -> None:
    for stem in CAPTIONS:
        path = tmp_path / "longer" / f"{stem}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{CAPTIONS['cat']} {stem}", encoding="utf-8")
    line = world.words(tmp_path, "--extended_prompt_path", str(tmp_path / "longer"))
    args = inference.parser().parse_intermixed_args(line)
    jobs = inference.prepare(args).jobs
    assert [(job.item.title, job.request.prompt) for job in jobs] == [
        (caption, f"{CAPTIONS['cat']} {stem}") for stem, caption in CAPTIONS.items()
    ]


def test_the_box_of_a_crop_list_is_what_the_model_sees(world: World, tmp_path: Path) -> None:
    whole = np.zeros((40, 60, 3), dtype=np.uint8)
    part = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    whole[4:36, 20:52] = part
    boxes = tmp_path / "boxes"
    (boxes / "1-1").mkdir(parents=True)
    iio.imwrite(boxes / "1-1" / "x.png", whole)
    row = {
        "file_name": "x.png",
        "caption": CAPTIONS["boat"],
        "origin_width": 60,
        "origin_height": 40,
        "target_crop": {"target_bbox": [20, 4, 52, 36], "target_ratio": "1-1"},
    }
    (boxes / "target_crop_info_1-1.json").write_text(json.dumps([row]), encoding="utf-8")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    iio.imwrite(pairs / "x.png", part)
    (pairs / "x.txt").write_text(CAPTIONS["boat"], encoding="utf-8")
    for name, data in (("a", boxes), ("b", pairs)):
        line = world.words(tmp_path / name, "--data_path", str(data), "--num_output_frames", "2")
        assert inference.main(line) == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


# ---- other models


@pytest.mark.parametrize(("shape", "size"), [("configured", (32, 32)), ("aspect", (48, 16))])
def test_a_causal_text_model_begins_its_clips_with_the_images(
    shape: str, size: tuple[int, int], world: World, tiny_root: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_root, "self_forcing_dmd")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    iio.imwrite(pairs / "x.png", np.full((150, 60, 3), (200, 40, 90), dtype=np.uint8))
    (pairs / "x.txt").write_text(CAPTIONS["boat"], encoding="utf-8")
    line = world.words(
        tmp_path / "clips",
        *("--config_path", str(config), "--data_path", str(pairs)),
        *("--checkpoint_path", str(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")),
        *("--image_size", shape),
    )
    assert inference.main([*line, "causal.given_first_frame=true"]) == 0
    (path,) = (tmp_path / "clips").glob("*.mp4")
    clip = inference.read_video(path)
    factor = clip.shape[2] // size[0]
    assert clip.shape[2:] == (factor * size[0], factor * size[1])
    first = clip[:, 0]
    color = torch.tensor([200.0, 40.0, 90.0]) / 255.0
    assert float((first.mean(dim=(1, 2)) - color).abs().max()) < 0.1


@pytest.fixture(scope="module")
def both_ends(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """The root of a first-last-frame model of random weights."""
    root = tmp_path_factory.mktemp("flf2v")
    folder = shutil.copytree(tiny_root / "wan_models" / IMAGE_NAME, root / IMAGE_NAME)
    sizes = replace(IMAGE_MINIATURE, model_type="flf2v")
    write_wan_config(sizes, folder / CONFIG)
    write_weights(build_wan(sizes).state_dict(), folder / WEIGHTS[1], {})
    return root


def test_a_first_last_frame_model_is_given_both_images(
    world: World, both_ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    picture(pairs / "x.png", (32, 32))
    (pairs / "x.txt").write_text(CAPTIONS["boat"], encoding="utf-8")
    weights, model = both_ends / IMAGE_NAME, f"model_root={both_ends}"
    changes = ("--data_path", str(pairs), "--checkpoint_path", str(weights), model)
    assert refusal(inference.main, world.words(tmp_path / "a", *changes), capsys) == (
        f"--i2v: {weights} takes a first and a <stem>_last image; there is no last one for x"
    )
    made = []
    for name, seed in (("a", 1), ("b", 2)):
        picture(pairs / "x_last.png", (32, 32), seed)
        assert inference.main(world.words(tmp_path / name, *changes)) == 0
        made += digests(tmp_path / name).values()
    assert made[0] != made[1]


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_begins_with_one_image_refuses_last_ones(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stem in ("x", "x_last"):
        picture(tmp_path / f"{stem}.png", (32, 32))
    (tmp_path / "x.txt").write_text(CAPTIONS["boat"], encoding="utf-8")
    line = world.words(tmp_path / "clips", "--data_path", str(tmp_path))
    assert refusal(inference.main, line, capsys) == (
        f"--i2v: {world.weights} takes one image for each clip; there is a first and a last one "
        "for x"
    )


@pytest.mark.usefixtures("no_weights")
def test_an_image_model_is_not_begun_without_images(
    world: World, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tiny_root / "data" / "tiny" / "prompts.txt"
    line = [w for w in world.words(tmp_path / "clips", "--data_path", str(prompts)) if w != "--i2v"]
    assert refusal(inference.main, line, capsys) == (
        f"--i2v: {world.weights} makes clips from images; add --i2v, and give a folder of images "
        "and texts as --data_path"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_whole_clip_text_model_is_not_given_images(
    world: World, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_root, "dmd")
    weights = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    line = world.words(
        tmp_path / "clips", "--config_path", str(config), "--checkpoint_path", str(weights)
    )
    assert refusal(inference.main, line, capsys) == (
        f"--i2v: {weights} makes whole clips from text alone; use an image-to-video model, or one "
        "with generator_type: causal"
    )
    assert not (tmp_path / "clips").exists()


# ---- bad input


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--initial_path", "x.png"),
            "--initial_path: with --i2v each clip begins with its own image",
        ),
        (("--vbench", "--save_with_index"), "--save_with_index: VBench finds clips by their "),
        (("--data_path", "nowhere"), "nowhere: no image prompts here; give a folder of images "),
    ],
)
def test_a_bad_combination_gives_one_line_and_no_folder(
    more: tuple[str, ...],
    message: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = world.words(tmp_path / "clips", *more)
    assert refusal(inference.main, line, capsys).startswith(message)
    assert not (tmp_path / "clips").exists()


@pytest.mark.usefixtures("no_weights")
def test_the_shape_of_images_matters_only_with_images(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [w for w in world.words(tmp_path, "--image_size", "aspect") if w != "--i2v"]
    assert refusal(inference.main, line, capsys) == (
        "--image_size aspect: has no effect without --i2v"
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("torn", ["x", "x_last"])
def test_a_torn_image_is_named_before_anything_is_made(
    torn: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "x.png", (64, 64))
    path = picture(tmp_path / f"{torn}.png", (64, 64))
    path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "x.txt").write_text(CAPTIONS["boat"], encoding="utf-8")
    line = world.words(tmp_path / "clips", "--data_path", str(tmp_path))
    assert refusal(inference.main, line, capsys).startswith(f"{path}: not readable as an image: ")
    assert not (tmp_path / "clips").exists()


@pytest.mark.usefixtures("no_weights")
def test_clips_of_an_image_that_has_changed_are_not_continued(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, clips = tmp_path / "pairs", tmp_path / "clips"
    pairs.mkdir()
    picture(pairs / "x.png", (32, 32), seed=1)
    (pairs / "x.txt").write_text("a", encoding="utf-8")
    line = world.words(clips, "--data_path", str(pairs))
    interrupted(line, clips, made="a-0.mp4")
    picture(pairs / "x.png", (32, 32), seed=2)
    message = refusal(inference.main, line, capsys)
    assert "a-0.mp4 is another clip than this call makes (images_sha256 was " in message


def interrupted(line: list[str], clips: Path, made: str) -> None:
    """What a call leaves that was stopped after one clip."""

    def run(*_: object) -> None:
        save_mp4(torch.zeros(3, 1, 32, 32), clips / made, fps=8.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "run", run)
        assert inference.main(line) == 0
