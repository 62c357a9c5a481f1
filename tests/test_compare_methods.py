"""The comparison of methods: what leads to what, and one recipe from pairs to page in miniature."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scripts import benchmark_rollout, compare_methods
from tests.commands import refusal
from tests.runs import run, write_config


def test_a_recipe_names_what_it_starts_from_first() -> None:
    assert compare_methods.needed(["consistency_dmd", "ode_dmd"]) == [
        "causal_diffusion", "consistency", "consistency_dmd", "ode", "ode_dmd",
    ]  # fmt: skip


def test_every_method_has_a_shipped_configuration() -> None:
    assert compare_methods.METHODS.keys() <= compare_methods.STAGES.keys()
    comparison = compare_methods.Comparison(compare_methods.parser().parse_args([]))
    assert all(comparison.config_path(name).is_file() for name in compare_methods.STAGES)


@pytest.fixture(scope="module")
def run_folder(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quickstart leaves, as far as the comparison reads it; the teacher took one step."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "wan_models").symlink_to(tiny_root / "wan_models")
    shutil.copytree(tiny_root / "data" / "tiny", folder / "data")
    config = write_config(folder, tiny_root, "diffusion")
    run(config, folder / "teacher", "steps=1")
    return folder


@pytest.mark.slow
def test_a_recipe_is_trained_measured_and_shown_and_a_second_call_trains_nothing(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--run_folder", str(run_folder), "--output_folder", str(tmp_path), "--methods", "ode_dmd",
        "--clips", "4", "--pairs", "8", "--steps", "2",
    ]  # fmt: skip
    assert compare_methods.main(words) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in rows] == [
        "teacher, 50 steps",
        "ODE regression, then self-forcing DMD",
    ]
    assert rows[1]["network_evaluations"] == 14  # blocks of 1, 2 and 2 frames: 3 x 4 + 2
    assert rows[1]["train_seconds"] > 0.0
    assert rows[1]["seconds_to_first"] > 0.0
    assert "ODE regression, then self-forcing DMD" in (tmp_path / "methods.html").read_text(
        encoding="utf-8"
    )
    assert (tmp_path / "methods.png").is_file()
    assert [line.split()[1] for line in rows[1]["commands"]] == [
        "scripts/generate_ode_pairs.py", "train.py", "convert_checkpoint.py", "train.py",
    ]  # fmt: skip
    timings = (tmp_path / "timings.json").read_bytes()
    assert compare_methods.main(words) == 0
    assert (tmp_path / "timings.json").read_bytes() == timings
    capsys.readouterr()
    assert refusal(compare_methods.main, [*words, "--seed", "7"], capsys) == (
        f"--output_folder {tmp_path}: holds runs of other settings (seed was 0, is 7); "
        f"use another folder"
    )


def test_an_unknown_method_is_answered_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output_folder", str(tmp_path), "--methods", "dmd", "dmd2"]
    assert refusal(compare_methods.main, words, capsys) == (
        f"--methods: ['dmd2'] unknown, choose of {', '.join(compare_methods.METHODS)}"
    )


def test_without_a_teacher_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run_folder", str(tmp_path / "none"), "--output_folder", str(tmp_path / "out")]
    assert "Wan2.1-T2V-Tiny" in refusal(compare_methods.main, words, capsys)


@pytest.mark.slow
def test_the_rollout_benchmark_prints_a_row_per_kind_of_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert benchmark_rollout.main(["--latent_shape", "16", "7", "4", "4"]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[0] for line in table] == [
        f"| {variant}" for variant in benchmark_rollout.VARIANTS
    ]
