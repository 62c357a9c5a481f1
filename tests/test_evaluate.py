"""The evaluation measures each row once, however often it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import evaluate, report
from tests.runs import run, write_config
from trainer.config import load
from utils.config import ConfigError
from utils.tiny_world import metrics as shapes_metrics

ROWS = 20  # real clips, 16 of the teacher, 3 of the student


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> list[str]:
    """The command line, without an output folder, for a teacher and a student of one step."""
    base = tmp_path_factory.mktemp("evaluated")
    words = ["--clips", "4", "--seed", "3"]
    for role, method in (("teacher", "diffusion"), ("student", "dmd")):
        config = write_config(base, tiny_root, method)
        run(config, base / role, "steps=1")
        words += [f"--{role}_config", str(config), f"--{role}_path", str(base / role)]
    return words


class Interruption:
    """Stands in for the measure of quality, and is interrupted at its n-th call."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.quality = shapes_metrics.quality

    def __call__(self, *arguments: Any) -> dict[str, float]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.quality(*arguments)


@pytest.mark.slow
def test_rows_survive_any_number_of_interruptions_and_are_measured_once(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes_metrics, "REFERENCE_CLIPS", 96)
    words = [*line, "--output_folder", str(tmp_path / "evaluation")]
    path = tmp_path / "evaluation" / "rows.json"
    kept = []
    for calls in (9, 1, 3):  # the first call of each is for real clips, which are not kept
        with monkeypatch.context() as patch:
            patch.setattr(shapes_metrics, "quality", Interruption(calls))
            assert evaluate.main(words) == 130
        kept.append(json.loads(path.read_text(encoding="utf-8")))
    assert [len(rows) for rows in kept] == [8, 8, 10]
    with pytest.raises(ConfigError, match="no row of student in 4 steps; let scripts"):
        report.summarise(tmp_path)
    assert evaluate.main(words) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == ROWS
    assert rows[1:11] == kept[-1]
    assert report.summarise(tmp_path)["rows"][0]["sampler"] == "real_codec"


def test_a_missing_student_is_told_before_the_teacher_is_loaded(
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "load_generator", lambda *_: pytest.fail("weights were read"))
    words = [*line, "--output_folder", str(tmp_path), "--student_path", str(tmp_path / "none")]
    assert evaluate.main(words) == 2
    assert f"error: {tmp_path / 'none'}: no weights here" in capsys.readouterr().err


@pytest.mark.slow
def test_models_for_which_images_are_optional_are_measured_both_ways(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes_metrics, "REFERENCE_CLIPS", 96)
    rows = [evaluate.Row("teacher_euler", 2, 2.0), evaluate.Row("student", 4, 1.0)]
    monkeypatch.setattr(evaluate, "table_rows", lambda _: rows)
    monkeypatch.setattr(evaluate, "shown_rows", lambda _: [])
    model = ("generator.model=Wan2.2-TI2V-Tiny", "latent_shape=[48,5,2,2]")
    words = ["--clips", "2", "--output_folder", str(tmp_path / "evaluation"), *model]
    for role, method in (("teacher", "diffusion"), ("student", "dmd")):
        config = write_config(tmp_path, tiny_root, method)
        data = f"data.path={tiny_root}/data/tiny/latents_16"
        run(config, tmp_path / role, *model, data, "steps=1", "batch_size=2")
        words += [f"--{role}_config", str(config), f"--{role}_path", str(tmp_path / role)]
    found = []
    for more in ((), ("--i2v",), ()):
        assert evaluate.main([*words, *more]) == 0
        text = (tmp_path / "evaluation" / "rows.json").read_text(encoding="utf-8")
        found.append(json.loads(text))
    text_alone, begun, again = found
    assert [row.get("first_frame_db") is not None for row in text_alone] == [False] * 3
    assert [row.get("first_frame_db") is not None for row in begun] == [True] * 3
    # An untrained model's first frames are those of the images all the same.
    ceiling = begun[0]["first_frame_db"]
    assert all(row["first_frame_db"] == pytest.approx(ceiling, abs=0.5) for row in begun)
    assert [row.get("i2v") for row in again[1:]] == [None, None]


def test_a_student_of_two_steps_is_measured_in_no_more(tiny_root: Path, tmp_path: Path) -> None:
    words = ["denoising_step_list=[1000,500]", "first_block_step_list=[1000,750,500,250]"]
    config = load(write_config(tmp_path, tiny_root, "self_forcing_dmd"), words)
    rows = evaluate.possible_rows({"teacher": config, "student": config})
    students = [row for row in rows if row.sampler == "student"]
    assert [row.steps for row in students] == [2, 1]
    source: Any = SimpleNamespace(network=None)
    counts = [
        evaluate.pipeline_for(row, config, source, 1.0).network_evaluations(5) for row in students
    ]
    assert counts == [4 + 2 + 2 + 2, 1 + 1 + 1 + 2]  # and two passes to remember
