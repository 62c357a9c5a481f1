"""The quickstart's page: explains itself, plots first, and says of each clip why it failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts import report
from tests.pages import Page, read_page
from tests.videos import make_video

ALL = {"adherence": 0.9, "validity": 0.95, "both_stderr": 0.02, "contrast": 0.6, "clips": 64}
ROWS: list[dict[str, Any]] = [
    {"sampler": "real_codec", "both": 1.0, "adherence": 1.0, "clips": 64},
    *(
        {**ALL, "sampler": name, "steps": steps, "cfg_scale": scale, "both": both, "seed": 7,
         "network_evaluations": steps * (1 if scale == 1.0 else 2)}
        for name, steps, scale, both in [
            ("teacher_euler", 50, 2.0, 0.96), ("teacher_euler", 4, 2.0, 0.02),
            ("teacher_euler", 4, 1.0, 0.01), ("teacher_solver2", 4, 2.0, 0.74),
            ("student", 4, 1.0, 0.97), ("student", 2, 1.0, 0.78),
        ]
    ),
]  # fmt: skip
SAMPLERS = ["real", "teacher 4 steps", "student 4 steps"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a quickstart leaves, in miniature."""
    clips = tmp_path / "evaluation" / "clips"
    index = {
        "captions": ["a red circle", "a <blue> bar"],
        "samplers": SAMPLERS,
        "faults": {
            "real": [[], []],
            "teacher 4 steps": [["the floor is flat"], ["speed: slowly instead of quickly", "b"]],
            "student 4 steps": [[], ["no shape is to be seen"]],
        },
    }
    for name in SAMPLERS:
        for i in range(2):
            make_video(clips / f"{name.replace(' ', '_')}-{i}.mp4", frames=3)
    (clips / "index.json").write_text(json.dumps(index))
    (tmp_path / "evaluation" / "rows.json").write_text(json.dumps(ROWS))
    stages = [{"stage": "teacher", "seconds": 60}, {"stage": "student", "seconds": 40}]
    (tmp_path / "timings.jsonl").write_text("".join(json.dumps(s) + "\n" for s in stages))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.yaml").write_text("steps: 900\n")
    (tmp_path / "student" / "metrics.jsonl").write_text('{"step": 1, "critic/loss": 0.5}\n')
    return tmp_path


@pytest.fixture
def page(folder: Path) -> Page:
    """The page that the command writes of it."""
    assert report.main(["--run_folder", str(folder)]) == 0
    return read_page((folder / "report.html").read_text(encoding="utf-8"))


def test_it_begins_with_the_result_and_a_plot_of_quality_over_passes(page: Page) -> None:
    assert "From 100 network passes per clip to 4" in page.text
    for words in ("96.0%", "2.0%", "97.0%", "with 4 passes instead of 100"):
        assert words in page.text
    plots = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert plots[0] == "share of clips that follow their caption and are valid, over network passes"
    assert "network passes per clip (logarithmic)" in page.text


def test_it_says_what_its_words_mean_and_names_samplers_in_words(page: Page) -> None:
    for word in ("adherence", "valid", "both"):
        assert f" {word} Share of clips" in page.text
    assert "teacher, second-order solver (UniPC)" in page.text
    assert "teacher_solver2" not in page.text
    assert "Here its floors keep 60% of a real floor's contrast." in page.text


def test_each_clip_has_a_tick_or_the_reason_why_it_failed(page: Page) -> None:
    assert page.count("video") == 6
    assert page.text.count("\u2713 passes") == 3
    assert page.text.count("\u2717") == 3
    assert "speed: slowly instead of quickly; b" in page.text
    assert "a <blue> bar" in page.text


def test_it_tells_seed_version_date_settings_and_what_to_do_next(page: Page) -> None:
    assert "seed 7" in page.text
    assert "version 0." in page.text
    assert "UTC" in page.text
    assert "steps: 900" in page.text
    assert "python demo.py" in page.text
    assert "docs/data.md" in page.text


def test_clips_that_nobody_judged_have_no_verdict(folder: Path) -> None:
    path = folder / "evaluation" / "clips" / "index.json"
    index = json.loads(path.read_text())
    del index["faults"]
    path.write_text(json.dumps(index))
    assert report.main(["--run_folder", str(folder)]) == 0
    page = read_page((folder / "report.html").read_text(encoding="utf-8"))
    assert "\u2713" not in page.text
    assert page.count("video") == 6


def test_a_moving_picture_for_a_readme_lies_beside_it(folder: Path, page: Page) -> None:
    del page
    with Image.open(folder / "clips.webp") as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
        assert image.size[0] > 3 * 128
    assert (folder / "clips.webp").stat().st_size < 1_000_000


def test_a_missing_index_of_clips_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "evaluation" / "clips" / "index.json"
    path.unlink()
    assert report.main(["--run_folder", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {path}: missing; let scripts/quickstart.sh finish first\n"
