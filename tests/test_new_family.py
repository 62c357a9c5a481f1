"""A family of models that is one folder: all commands serve it, and no other file knows of it.

The toy has a denoiser that is no transformer, strides of 2 and 4, six channels and a text encoder
and a codec of its own. See tests/new_family/ and CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import convert_checkpoint
import inference
import train
from model.families.registry import check_model, find_model, open_model
from model.folders.loading import Placement
from scripts import compute_vae_latent, create_lmdb_14b_shards, precompute_prompts
from tests.commands import ROOT, refusal
from tests.ranks import run_on_ranks
from tests.runs import assert_same_end, cut_after, read_state, rows, step_folder
from tests.toy import HOME, NAME, SHAPE, at_home, make_data, make_toy, write_config
from tests.videos import make_video
from utils.data.captioned_clips import read_encoded_clips
from utils.media.video import frame_rate, read_frames
from utils.weights import WeightFile, WeightsError, check_fits


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a toy and its data, while the toy's folder is in model/families/."""
    folder = tmp_path_factory.mktemp("toy")
    with at_home():
        make_toy(folder / NAME)
        make_data(folder / "data")
        yield folder


@pytest.fixture(scope="module")
def trained(root: Path) -> dict[str, Path]:
    """The log directory of a run of each method."""
    logdirs = {}
    for method in ("diffusion", "dmd", "gan"):
        logdirs[method] = root / "runs" / method
        words = ["--config_path", str(write_config(root, method))]
        assert train.main([*words, "--logdir", str(logdirs[method])]) == 0
    return logdirs


def test_the_documented_pieces_are_of_the_family_that_is_tried_here() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## A new model family in one folder\n")
    section = section.partition("\n## ")[0]
    pieces = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    files = [dense(file.read_text(encoding="utf-8")) for file in Path(HOME, "toy").glob("*.py")]
    assert len(pieces) == 5
    assert [p for p in pieces if not any(dense(p) in file for file in files)] == []


def dense(code: str) -> str:
    """Code without what a formatter decides: white space, and commas before a bracket."""
    return re.sub(r",(?=\))", "", re.sub(r"\s+", "", code))


def test_it_is_found_by_being_there(root: Path) -> None:
    model = find_model(root, NAME)
    assert (type(model).__name__, model.family) == ("Toy", "the toy")
    assert model.latent.pixel_frames(SHAPE[1]) == 9
    assert model.latent.pixel_size(*SHAPE[2:]) == (16, 24)
    check_model(model)


@pytest.mark.parametrize("method", ["diffusion", "dmd", "gan"])
def test_it_is_trained_and_shown(method: str, trained: dict[str, Path]) -> None:
    logdir = trained[method]
    steps = [row["step"] for row in rows(logdir)]
    assert steps == [1, 2, 3, 4]
    assert (logdir / "samples" / "step_000004.png").is_file()
    before, after = (read_state(step_folder(logdir, step)) for step in (2, 4))
    name = "roles.generator.blocks.0.near.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("method", ["diffusion", "dmd", "gan"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    method: str, trained: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    logdir = cut_after(trained[method], tmp_path / "run", 2)
    words = ["--config_path", str(root / f"{method}.yaml"), "--logdir", str(logdir)]
    assert train.main(words) == 0
    assert_same_end(trained[method], logdir, 4)


@pytest.mark.parametrize("method", ["diffusion", "dmd"])
def test_inference_makes_clips_of_its_size(
    method: str, trained: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    words = ["--config_path", str(root / f"{method}.yaml")]
    words += ["--checkpoint_path", str(trained[method]), "--use_ema"]
    words += ["--data_path", str(root / "data" / "prompts.txt")]
    assert inference.main([*words, "--output_folder", str(tmp_path / "out")]) == 0
    clips = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(clips) == 6
    frames = list(read_frames(clips[0]))
    assert (len(frames), frames[0].shape[0]) == (9, 3)
    height, width = frames[0].shape[1:]
    assert height * 24 == width * 16
    assert frame_rate(clips[0]) == 12.0


def test_videos_become_its_data(root: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "videos" / "a.mp4", frames=20, fps=24, size=(32, 48))
    (tmp_path / "videos" / "a.txt").write_text("a red bar", encoding="utf-8")
    words = ["--input_video_folder", str(tmp_path / "videos"), "--model_root", str(root)]
    words += ["--output_latent_folder", str(tmp_path / "latents"), "--model_name", NAME]
    size = ["--height", "16", "--width", "24", "--num_frames", "9"]
    assert compute_vae_latent.main([*words, *size]) == 0
    (clip,) = read_encoded_clips(tmp_path / "latents" / "a.pt")
    assert (tuple(clip.latents.shape), clip.fps) == (SHAPE, 12.0)
    words = ["--data_path", str(tmp_path / "latents"), "--lmdb_path", str(tmp_path / "shards")]
    assert create_lmdb_14b_shards.main(words) == 0
    config = str(write_config(root, "diffusion"))
    words = ["--config_path", config, "--logdir", str(tmp_path / "run")]
    assert train.main([*words, f"data.path={tmp_path}/shards", "steps=1"]) == 0


def test_a_clip_that_its_latents_do_not_hold_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input_video_folder", str(tmp_path), "--output_latent_folder", str(tmp_path / "l")]
    words += ["--model_root", str(root), "--model_name", NAME]
    wrong = ["--height", "16", "--width", "24", "--num_frames", "10"]
    message = refusal(compute_vae_latent.main, [*words, *wrong], capsys)
    assert message == "--num_frames: must be 1 + 2 k, as 41, got 10"
    wrong = ["--height", "16", "--width", "26", "--num_frames", "9"]
    message = refusal(compute_vae_latent.main, [*words, *wrong], capsys)
    assert message == "16 x 26: both sides must be multiples of 4 up to 8192"


def test_prompts_are_encoded_ahead(trained: dict[str, Path], root: Path, tmp_path: Path) -> None:
    config, store = str(root / "dmd.yaml"), tmp_path / "store"
    words = ["--config_path", config, "--output_path", str(store)]
    assert precompute_prompts.main(words) == 0
    words = ["--config_path", config, "--logdir", str(tmp_path / "run")]
    assert train.main([*words, f"data.text_embeddings={store}"]) == 0
    ahead, then = (read_state(step_folder(run, 4)) for run in (tmp_path / "run", trained["dmd"]))
    name = "roles.generator.blocks.0.near.weight"
    assert torch.equal(ahead[name], then[name])


def test_its_weights_become_a_file_and_serve(
    trained: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "toy.safetensors"
    words = ["--input_path", str(trained["dmd"]), "--output_path", str(file)]
    assert convert_checkpoint.main(words) == 0
    state = read_state(step_folder(trained["dmd"], 4))
    written = WeightFile(file)
    assert written.shapes()
    for name in written.shapes():
        assert torch.equal(written.read(name), state[f"roles.generator.{name}"]), name
    model = open_model(root / NAME)
    network = model.load_network(model.find_weights(file), Placement(torch.device("cpu")), what="x")
    check_fits(network.model, written, what="the toy")


def test_a_folder_of_it_is_written_and_opened(
    trained: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    words = ["--input_path", str(trained["dmd"]), "--output_path", str(tmp_path / "out")]
    words += ["--layout", "official", "--model_folder", str(root / NAME)]
    assert convert_checkpoint.main(words) == 0
    model = open_model(tmp_path / "out")
    check_model(model)
    assert model.architecture == open_model(root / NAME).architecture


def test_layouts_and_names_that_it_does_not_have_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = root / NAME
    words = ["--input_path", str(model), "--output_path"]
    message = refusal(
        convert_checkpoint.main, [*words, str(tmp_path / "out"), "--layout", "diffusers"], capsys
    )
    assert message == f"--layout diffusers: {model} is of the toy, whose folders can be official"
    file = str(tmp_path / "out.pt")
    message = refusal(convert_checkpoint.main, [*words, file, "--naming", "reference"], capsys)
    assert message == "--naming reference: the weights are of the toy, whose names can be official"
    assert not list(tmp_path.iterdir())


def test_weights_of_another_family_are_refused(root: Path, tiny_root: Path) -> None:
    toy, wan = open_model(root / NAME), open_model(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    for model, other in ((toy, wan), (wan, toy)):
        with pytest.raises(WeightsError, match="does not fit generator"):
            model.check_weights(other.find_weights(), what="generator")


def test_an_incomplete_folder_says_what_it_lacks(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / NAME, tmp_path / "broken")
    (folder / "codec.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing codec\.safetensors"):
        check_model(open_model(folder))


def test_data_of_another_shape_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config_path", str(write_config(root, "diffusion"))]
    words += ["--logdir", str(tmp_path / "run"), "latent_shape=[6,5,4,4]"]
    message = refusal(train.main, words, capsys)
    assert "latent_shape: is [6, 5, 4, 4], but the latents in" in message


def train_at_home(words: list[str]) -> int:
    """train.py on a rank, a process of its own that does not know the toy yet."""
    with at_home():
        return train.main(words)


@pytest.mark.slow
def test_two_ranks_train_it_in_shards_as_one_does(
    trained: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    words = ["--config_path", str(root / "dmd.yaml"), "--logdir", str(tmp_path / "run")]
    assert run_on_ranks(2, train_at_home, words) == [0, 0]
    one, two = (read_state(step_folder(run, 4)) for run in (trained["dmd"], tmp_path / "run"))
    for name in (name for name in one if name.startswith("roles.")):
        assert torch.allclose(one[name], two[name], atol=1e-4), name


SERVE = """
import sys
from model import families
families.__path__.append(sys.argv.pop(1))
import demo
sys.exit(demo.main())
"""


def asked(url: str, body: object = None) -> bytes:
    """What the demo answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return bytes(reply.read())


@pytest.mark.slow
def test_the_demo_shows_it(trained: dict[str, Path], root: Path, tmp_path: Path) -> None:
    words = ["--config_path", str(root / "dmd.yaml"), "--checkpoint_path", str(trained["dmd"])]
    command = [sys.executable, "-c", SERVE, HOME, *words, "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            job = json.loads(asked(f"{found[0]}/api/jobs", {"prompt": "a red bar", "seed": 3}))
            deadline = time.monotonic() + 120
            while job["state"] not in ("done", "failed") and time.monotonic() < deadline:
                time.sleep(0.2)
                job = json.loads(asked(f"{found[0]}/api/jobs/{job['id']}"))
            assert job["state"] == "done", job
            (tmp_path / "clip.mp4").write_bytes(asked(f"{found[0]}/api/jobs/{job['id']}/video"))
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        finally:
            process.kill()
    assert len(list(read_frames(tmp_path / "clip.mp4"))) == 9
