"""What scripts say about numbers and files that cannot be, and how Ctrl-C ends them: in a line."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from scripts import (
    benchmark,
    benchmark_rollout,
    benchmark_saving,
    benchmark_threads,
    compare_adapters,
    compare_methods,
    compute_vae_latent,
    create_lmdb_14b_shards,
    evaluate,
    generate_ode_pairs,
    make_tiny_world,
    precompute_prompts,
    report,
    this_host,
    validate_dataset,
)
from tests.commands import own_logging, refusal

__all__ = ["own_logging"]

EVALUATE = (
    "--teacher_config", "a.yaml", "--teacher_path", "a", "--student_config", "b.yaml",
    "--student_path", "b", "--output_folder", "out",
)  # fmt: skip
PAIRS = ("--config_path", "a", "--checkpoint_path", "b", "--caption_path", "c")
MINIMAL: dict[ModuleType, tuple[str, ...]] = {
    benchmark: ("--config_path", "a.yaml"),
    benchmark_rollout: (),
    benchmark_saving: (),
    benchmark_threads: (),
    compare_adapters: ("--output_folder", "out"),
    compare_methods: ("--output_folder", "out"),
    compute_vae_latent: ("--input_video_folder", "v", "--output_latent_folder", "out"),
    create_lmdb_14b_shards: ("--data_path", "d", "--lmdb_path", "out"),
    evaluate: EVALUATE,
    generate_ode_pairs: (*PAIRS, "--output_folder", "out"),
    make_tiny_world: (),
    precompute_prompts: ("--config_path", "a.yaml", "--output_path", "out"),
    report: ("--run_folder", "runs"),
    this_host: ("--rdzv_host", "host", "--port", "1"),
    validate_dataset: ("--data_path", "d"),
}
FIRST_CALL = {  # what each calls early, once its arguments are read
    benchmark: "load",
    benchmark_rollout: "check",
    benchmark_saving: "check_at_least",
    benchmark_threads: "measure",
    compare_adapters: "check_at_least",
    compare_methods: "check_at_least",
    compute_vae_latent: "find_vae",
    create_lmdb_14b_shards: "plan",
    evaluate: "load",
    generate_ode_pairs: "load",
    make_tiny_world: "make_folder",
    precompute_prompts: "load",
    report: "summarise",
    this_host: "describe",
    validate_dataset: "shard_paths",
}
SCRIPTS = [pytest.param(script, id=script.__name__) for script in MINIMAL]


def test_every_script_is_among_them() -> None:
    names = {path.stem for path in Path(evaluate.__file__).parent.glob("*.py")}
    assert {script.__name__.removeprefix("scripts.") for script in MINIMAL} == names
    assert FIRST_CALL.keys() == MINIMAL.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_ends_a_script_with_one_line_and_status_130(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, FIRST_CALL[script], interrupted)
    assert script.main(list(MINIMAL[script])) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line == "stopped; run the same command again to continue"


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (benchmark, ("--timed_steps", "0"), "--timed_steps: must be at least 1, got 0"),
        (
            benchmark_rollout,
            ("--num_frame_per_block", "0"),
            "--num_frame_per_block: must be at least 1, got 0",
        ),
        (
            benchmark_rollout,
            ("--latent_shape", "16", "0", "4", "5"),
            "--latent_shape: must be 16 channels, frames, a height and a width in multiples of "
            "2 and 2, got [16, 0, 4, 5]",
        ),
        (benchmark_saving, ("--saves", "0"), "--saves: must be at least 1, got 0"),
        (compare_adapters, ("--clips", "0"), "--clips: must be at least 2, got 0"),
        (compare_methods, ("--clips", "0"), "--clips: must be at least 2, got 0"),
        (compare_methods, ("--pairs", "0"), "--pairs: must be at least 1, got 0"),
        (compare_methods, ("--steps", "0"), "--steps: must be at least 1, got 0"),
        (evaluate, ("--clips", "0"), "--clips: must be at least 2, got 0"),
        (evaluate, ("--solver2_shift", "nan"), "--solver2_shift: must be above 0, got nan"),
        (evaluate, ("--solver2_shift", "0"), "--solver2_shift: must be above 0, got 0.0"),
        (make_tiny_world, ("--clips", "0"), "--clips: must be at least 1, got 0"),
        (validate_dataset, ("--listed", "-1"), "--listed: must be at least 0, got -1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_is_made(
    script: ModuleType,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(script.main, [*MINIMAL[script], *words], capsys) == message
    assert list(tmp_path.iterdir()) == []


def test_a_rollout_whose_frames_do_not_fall_into_blocks_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--latent_shape", "16", "5", "4", "4", "--num_frame_per_block", "3"]
    assert "num_frame_per_block" in refusal(benchmark_rollout.main, words, capsys)


@pytest.mark.parametrize("text", ["[{", "{}", "[1]"])
def test_a_corrupt_rows_file_is_named_before_weights_are_read(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    monkeypatch.setattr(evaluate, "load", lambda *_: None)
    for script in (compare_methods, evaluate):
        words = [*MINIMAL[script], "--output_folder", str(tmp_path)]
        message = refusal(script.main, words, capsys)
        assert message.startswith(
            f"{path}: not rows that were measured; remove it to measure them again: "
        )
    assert path.read_text() == text


def test_corrupt_timings_end_a_comparison_with_a_line(tmp_path: Path) -> None:
    args = compare_methods.parser().parse_args(["--output_folder", str(tmp_path)])
    (tmp_path / "timings.json").write_text("[")
    with pytest.raises(ValueError, match=r"timings.json: not timings of runs: "):
        compare_methods.train(compare_methods.Comparison(args), [])


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("evaluation/rows.json", "[{", "Expecting property name"),
        ("evaluation/rows.json", '[{"sampler": "student"}]', "a row lacks adherence, both, clips"),
        ("timings.jsonl", '{"stage": "a", "seconds": 1}\n{"stage"', "line 2: Expecting ':'"),
    ],
)
def test_a_report_names_the_file_that_is_corrupt(
    name: str, text: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"adherence": 1.0, "both": 1.0, "clips": 4}
    rows = [
        {**row, "sampler": "teacher_euler", "steps": 50},
        {**row, "sampler": "teacher_euler", "steps": 4},
        {**row, "sampler": "student", "steps": 4},
    ]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / name).write_text(text)
    message = refusal(report.main, ["--run_folder", str(tmp_path)], capsys)
    assert message.startswith(f"{tmp_path / name}: not ")
    assert fault in message
