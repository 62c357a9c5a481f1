"""inference.py for others to judge: VBench's file names, and a manifest that is always true."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import inference
from scripts.make_tiny_world import IMAGE_NAME, NAME
from tests.commands import no_weights, own_logging, refusal
from tests.disks import ended_process, largest_file
from tests.ranks import run_on_ranks
from tests.runs import write_config
from utils.media import manifest, video

__all__ = ["no_weights", "own_logging"]

PROMPTS = ("a red circle moves right", "a green bar moves up", "a blue triangle moves left")


@dataclass(frozen=True)
class World:
    """A text-to-video model, and short clips of it."""

    config: Path
    weights: Path
    folder: Path
    clips: Path  # of PROMPTS

    def words(self, output: Path, *more: str) -> list[str]:
        return [
            "--config_path", str(self.config), "--checkpoint_path", str(self.weights),
            "--data_path", str(self.folder / "prompts.txt"), "--output_folder", str(output),
            "--num_output_frames", "1", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    folder = tmp_path_factory.mktemp("manifest")
    write(folder / "prompts.txt", "\n".join(PROMPTS))
    config = write_config(folder, tiny_root, "dmd")
    made = World(config, tiny_root / "wan_models" / NAME, folder, folder / "clips")
    assert inference.main(made.words(made.clips)) == 0
    return made


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))


# ---- the manifest


def test_the_manifest_tells_each_clip_from_all_that_made_it(world: World) -> None:
    made = read(world.clips)
    assert made["complete"] is True
    assert made["clips"] == [
        {
            "file": f"{prompt}-0.mp4",
            "prompt": prompt,
            "conditioning_prompt": prompt,
            "seed": 0,
            "sample": 0,
            "height": 32,
            "width": 32,
            "images": [],
            "images_sha256": [],
            "sha256": sha256(world.clips / f"{prompt}-0.mp4"),
        }
        for prompt in PROMPTS
    ]
    assert names(world.clips) == sorted(clip["file"] for clip in made["clips"])


def test_the_manifest_tells_what_all_clips_share(world: World) -> None:
    made = read(world.clips)
    file = world.weights / "diffusion_pytorch_model.safetensors"
    expected = {
        "protocol": "original prompts",
        "vbench": False,
        "use_ema": False,
        "seed": 0,
        "fps": 16.0,
        "size": [32, 32],
        "frames": 1,
        "denoising_step_list": [1000, 750, 500, 250],
        "timestep_shift": 5.0,
        "weights": str(file),
        "weights_sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()},
    }
    assert {key: made[key] for key in expected} == expected
    (environment,) = made["made_by"]
    assert environment["code"] == manifest.code_revision()
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["device"] == "cpu"


def test_several_processes_write_the_manifest_of_one(world: World, tmp_path: Path) -> None:
    assert run_on_ranks(3, inference.main, world.words(tmp_path / "clips")) == [0, 0, 0]
    assert read(tmp_path / "clips") == read(world.clips)


def test_an_interrupted_run_leaves_a_manifest_that_says_so_and_is_finished_by_the_next(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, make, calls = tmp_path / "clips", inference.make, [0]

    def stopped(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        make(*arguments)

    monkeypatch.setattr(inference, "make", stopped)
    assert inference.main(world.words(clips)) == 130
    assert read(clips)["complete"] is False
    assert names(clips) == [f"{PROMPTS[0]}-0.mp4"]
    assert inference.main(world.words(clips)) == 0
    assert read(clips) == read(world.clips)


def test_code_that_changed_between_two_calls_is_told_beside_the_first(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = tmp_path / "clips"
    codes = [{"revision": revision, "dirty": False} for revision in "abc"]
    for code, samples in ((codes[0], "1"), (codes[1], "2"), (codes[2], "2")):
        monkeypatch.setattr(manifest, "code_revision", lambda code=code: code)
        assert inference.main(world.words(clips, "--num_samples", samples)) == 0
    made_by = [environment["code"] for environment in read(clips)["made_by"]]
    assert made_by == codes[:2]  # the third call had nothing to make


def test_clips_of_an_earlier_call_with_more_samples_stay_in_the_manifest(
    world: World, tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    assert inference.main(world.words(clips, "--num_samples", "2")) == 0
    assert inference.main(world.words(clips)) == 0
    assert sorted(clip["file"] for clip in read(clips)["clips"]) == names(clips)
    assert len(names(clips)) == 6


@pytest.mark.usefixtures("no_weights")
def test_numbered_clips_are_not_taken_for_those_of_other_prompts(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, clips = write(tmp_path / "p.txt", "a red circle"), tmp_path / "clips"
    line = world.words(clips, "--data_path", str(data), "--save_with_index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "run", lambda *_: (clips / "0-0_regular.mp4").touch())
        assert inference.main(line) == 0
    write(data, "a blue circle")
    assert refusal(inference.main, line, capsys) == (
        f"--output_folder {clips}: 0-0_regular.mp4 is another clip than this call makes (prompt "
        "was 'a red circle', is 'a blue circle'; conditioning_prompt was 'a red circle', is "
        "'a blue circle'); use another folder"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_clip_that_nobody_knows_is_not_taken_for_ones_own(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{PROMPTS[1]}-0.mp4").touch()
    assert refusal(inference.main, world.words(tmp_path), capsys) == (
        f"--output_folder {tmp_path}: {PROMPTS[1]}-0.mp4 is another clip than this call makes "
        "(manifest.json does not know it); use another folder"
    )


@pytest.mark.usefixtures("no_weights")
def test_clips_of_weights_that_were_replaced_are_not_continued(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "own.safetensors"
    content = (world.weights / "diffusion_pytorch_model.safetensors").read_bytes()
    weights.write_bytes(content)
    line = world.words(tmp_path / "clips", "--checkpoint_path", str(weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "run", lambda *_: None)
        assert inference.main(line) == 0
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refusal(inference.main, line, capsys) == (
        f"--output_folder {tmp_path / 'clips'}: holds clips of other weights: {weights} has "
        "changed since; use another folder"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_torn_manifest_is_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text('{"clips": [', encoding="utf-8")
    said = refusal(inference.main, world.words(tmp_path), capsys)
    assert said.startswith(f"{tmp_path / 'manifest.json'}: not a manifest of clips: ")


def claim_nothing(folder: Path) -> str:
    """On one rank: what it is told of a folder that only the main rank has looked at."""
    from utils.cli import USER_ERRORS
    from utils.distributed import distributed_session
    from utils.errors import words

    with distributed_session(timeout_s=60.0) as session:
        try:
            manifest.claim_folder(folder, {}, [folder / "absent.pt"], [], session)
        except USER_ERRORS as error:
            return words(error) or ""
    return ""


def test_every_rank_is_told_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    told = run_on_ranks(2, claim_nothing, tmp_path)
    assert told[0] == told[1]
    assert "absent.pt" in told[0]


# ---- clips that are not what was written


def copied(world: World, folder: Path) -> Path:
    """The finished clips of a call, for a test that harms them."""
    return Path(shutil.copytree(world.clips, folder / "clips"))


def older(clips: Path) -> None:
    """Let a manifest be as versions wrote it that hashed no clips."""
    made = read(clips)
    made["clips"] = [{k: v for k, v in clip.items() if k != "sha256"} for clip in made["clips"]]
    write(clips / "manifest.json", made)


def made_again(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What calls said of the clips that they made again."""
    ending = "; it is made again"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith(ending)]
    return [line.partition("clip_files: ")[2].removesuffix(ending) for line in lines]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("no_weights")
def test_whole_clips_are_not_made_again_whether_or_not_their_hashes_are_known(
    world: World, tmp_path: Path
) -> None:
    clips = copied(world, tmp_path)
    older(clips)
    for _ in range(2):
        assert inference.main(world.words(clips)) == 0
        assert read(clips) == read(world.clips)


@pytest.mark.parametrize("known", [True, False])
def test_a_clip_that_was_cut_off_is_made_again_and_told(
    known: bool, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = copied(world, tmp_path)
    if not known:
        older(clips)
    torn = clips / f"{PROMPTS[1]}-0.mp4"
    torn.write_bytes(torn.read_bytes()[:500])
    assert inference.main(world.words(clips)) == 0
    (line,) = made_again(capsys)
    assert line.startswith(f"{torn}: has changed since" if known else f"{torn}: not readable as")
    assert read(clips) == read(world.clips)
    assert sha256(torn) == sha256(world.clips / torn.name)


def test_a_clip_with_one_bit_flipped_is_made_again_and_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = copied(world, tmp_path)
    changed = clips / f"{PROMPTS[2]}-0.mp4"
    flipped(changed)
    was, is_ = (sha256(folder / changed.name)[:12] for folder in (world.clips, clips))
    assert inference.main(world.words(clips)) == 0
    assert made_again(capsys) == [
        f"{changed}: has changed since it was written (its SHA-256 was {was}..., is {is_}...)"
    ]
    assert sha256(changed) == sha256(world.clips / changed.name)


def test_every_rank_makes_again_what_the_main_one_found_damaged(
    world: World, tmp_path: Path
) -> None:
    clips = copied(world, tmp_path)
    for prompt in PROMPTS:
        flipped(clips / f"{prompt}-0.mp4")
    assert run_on_ranks(2, inference.main, world.words(clips)) == [0, 0]
    assert read(clips) == read(world.clips)
    assert [sha256(clips / name) for name in names(clips)] == [
        sha256(world.clips / name) for name in names(clips)
    ]


def stopped_after(count: int, line: list[str], ending: BaseException) -> int:
    """The status of a call that is stopped after it wrote `count` clips."""
    save, calls = inference.save_mp4, [0]

    def some(*arguments: Any, **words: Any) -> str:
        if calls[0] == count:
            raise ending
        calls[0] += 1
        return save(*arguments, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "save_mp4", some)
        return inference.main(line)


def test_the_hashes_of_clips_outlive_a_call_that_was_stopped(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    assert stopped_after(2, world.words(clips), KeyboardInterrupt()) == 130
    flipped(clips / f"{PROMPTS[0]}-0.mp4")
    with (clips / "written.0.jsonl").open("ab") as notes:
        notes.write(b'{"file": "torn')
    assert inference.main(world.words(clips)) == 0
    (line,) = made_again(capsys)
    assert line.startswith(f"{clips / f'{PROMPTS[0]}-0.mp4'}: has changed since")
    assert read(clips) == read(world.clips)
    assert not list(clips.glob("written.*"))


def test_a_disk_that_fills_up_ends_a_call_with_a_line_and_the_next_one_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, save, calls = tmp_path / "clips", inference.save_mp4, [0]

    def filling(*arguments: Any, **words: Any) -> str:
        calls[0] += 1
        with largest_file(2**10) if calls[0] == 2 else contextlib.nullcontext():
            return save(*arguments, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "save_mp4", filling)
        assert inference.main(world.words(clips)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: {clips / f'{PROMPTS[1]}-0.mp4'}: file too large; ")
    assert names(clips) == [f"{PROMPTS[0]}-0.mp4"]
    assert not list(clips.glob(".*"))
    assert inference.main(world.words(clips)) == 0
    assert read(clips) == read(world.clips)


def test_what_a_kill_left_half_written_is_gone_after_the_next_call(
    world: World, tmp_path: Path
) -> None:
    out, gone = tmp_path / "out", ended_process()
    (out / "videos").mkdir(parents=True)
    parts = [
        out / "videos" / f".{PROMPTS[0]}-0.mp4.{gone}.part.mp4",
        out / f".other prompt-0.mp4.{gone}.part.mp4",
        out / f".manifest.json.{gone}.part.json",
    ]
    for path in parts:
        path.touch()
    assert inference.main(world.words(out, "--vbench", "--num_samples", "1")) == 0
    assert not any(path.exists() for path in parts)
    assert len(list((out / "videos").iterdir())) == len(PROMPTS)


def test_no_half_clip_lies_beside_those_that_vbench_judges(world: World, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    def look(path: Path, *_: object, **__: object) -> None:
        seen.append(path)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "check_clip", look)
        assert inference.main(world.words(out, "--vbench", "--num_samples", "1")) == 130
    assert [path.parent for path in seen] == [out]
    assert list((out / "videos").iterdir()) == []


# ---- VBench


def vbench(world: World, output: Path, *more: str) -> dict[str, int]:
    """How many clips of each prompt are planned."""
    line = world.words(output, "--vbench", *more)
    args = inference.parser().parse_intermixed_args(line)
    jobs = inference.prepare(args).jobs
    assert all(job.file.parent == output / "videos" for job in jobs)
    count: dict[str, int] = {}
    for job in jobs:
        number = count.setdefault(job.item.title, 0)
        assert job.file.name == f"{job.item.title}-{number}.mp4"
        assert (job.request.sample, job.request.seed) == (number, 0)
        count[job.item.title] += 1
    return count


def test_vbench_finds_five_clips_of_each_prompt_under_its_whole_text(
    world: World, tmp_path: Path
) -> None:
    long = "a red circle, " * 15 + 'and "a" cat?'
    assert len(long) > 200
    data = write(tmp_path / "all_dimension.txt", f"{PROMPTS[0]}.\n\n{long}\n")
    assert vbench(world, tmp_path, "--data_path", str(data)) == {f"{PROMPTS[0]}.": 5, long: 5}


def test_vbench_finds_25_clips_where_its_filter_takes_some_out(
    world: World, tmp_path: Path
) -> None:
    info = [
        {"prompt_en": PROMPTS[0], "dimension": ["temporal_flickering"]},
        {"prompt_en": PROMPTS[1], "dimension": ["color"]},
        {"prompt_en": PROMPTS[1], "dimension": ["temporal_flickering"]},
        {"prompt_en": PROMPTS[2], "dimension": ["scene", "overall_consistency"]},
    ]
    data = str(write(tmp_path / "VBench_full_info.json", info))
    assert list(vbench(world, tmp_path, "--data_path", data).values()) == [25, 25, 5]
    few = vbench(world, tmp_path, "--data_path", data, "--num_samples", "2")
    assert list(few.values()) == [2, 2, 2]


def test_a_vbench_folder_holds_clips_alone(world: World, tmp_path: Path) -> None:
    longer = write(tmp_path / "longer.txt", "\n".join(f"{prompt} slowly" for prompt in PROMPTS))
    line = world.words(
        tmp_path / "out", "--vbench", "--num_samples", "2", "--extended_prompt_path", str(longer)
    )
    assert inference.main(line) == 0
    made = read(tmp_path / "out")
    expected = sorted(f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2))
    assert sorted(path.name for path in (tmp_path / "out" / "videos").iterdir()) == expected
    assert sorted(clip["file"] for clip in made["clips"]) == [f"videos/{n}" for n in expected]
    assert (made["protocol"], made["vbench"]) == ("extended prompts", True)
    assert [(clip["prompt"], clip["conditioning_prompt"]) for clip in made["clips"][::2]] == [
        (prompt, f"{prompt} slowly") for prompt in PROMPTS
    ]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a cat and/or a dog", "holds '/' or a control character, which no file name can"),
        (" ".join(["word"] * 3000), "makes a file name of more than 230 bytes"),
    ],
)
def test_a_prompt_that_vbench_could_not_find_is_refused(
    prompt: str, fault: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "p.txt", prompt)
    line = world.words(tmp_path / "clips", "--vbench", "--data_path", str(data))
    said = refusal(inference.main, line, capsys)
    assert said.startswith(f"--vbench: the prompt '{prompt[:60]}")
    assert f"{fault}, so VBench could not find its clips; give short prompts" in said


def test_a_prompt_of_3000_words_and_blank_lines_are_no_trouble_otherwise(
    world: World, tmp_path: Path
) -> None:
    words = " ".join(["red"] * 3000)
    data = write(tmp_path / "p.txt", f"\n{words}\n \n{PROMPTS[0]}\n\n")
    line = world.words(tmp_path / "clips", "--data_path", str(data))
    assert inference.main(line) == 0
    assert names(tmp_path / "clips") == [f"{PROMPTS[0]}-0.mp4", f"{words[:100].strip()}-0.mp4"]
    assert read(tmp_path / "clips")["clips"][0]["conditioning_prompt"] == words


def test_images_that_are_named_by_their_prompts_are_read_for_vbench(
    world: World, tmp_path: Path
) -> None:
    import imageio.v3 as iio
    import numpy as np

    iio.imwrite(tmp_path / f"{PROMPTS[0]}.jpg", np.zeros((32, 32, 3), dtype=np.uint8))
    model = world.weights.parent / IMAGE_NAME
    more = ("--i2v", "--data_path", str(tmp_path), "--checkpoint_path", str(model))
    more = (*more, f"generator.model={IMAGE_NAME}")
    assert vbench(world, tmp_path / "out", *more) == {PROMPTS[0]: 5}
