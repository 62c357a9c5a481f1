"""The benchmark's command: its rows, its plain version, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import benchmark
from scripts.benchmarking import rows, training, yardstick
from scripts.benchmarking.meters import Clock
from tests.commands import own_logging, refusal
from tests.runs import built
from trainer.config import load
from trainer.run import resolve

__all__ = ["own_logging"]

CONSTANT = [
    word
    for role in ("generator", "critic")
    for word in (f"{role}.schedule=constant", f"{role}.warmup_updates=0")
]
LIKE_PLAIN = [*CONSTANT, "ema.start_step=0"]
ROLLOUT_OPTIONS = "its causal rollout has no options"
FEW = ["--timed_steps", "2", "--warmup_steps", "1", "--device", "cpu"]


def measured(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[list[Any], list[str]]:
    """The JSON lines and the table's lines that a call prints."""
    assert benchmark.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    return (
        [json.loads(line) for line in lines if line.startswith("{")],
        [line for line in lines if line.startswith("| ")],
    )


@pytest.mark.parametrize(
    "method", ["dmd", pytest.param("self_forcing_dmd", marks=pytest.mark.slow)]
)
def test_a_training_step_is_timed_beside_the_same_mathematics(
    method: str, configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config_path", str(configs[method]), *FEW, *LIKE_PLAIN]
    (row,), table = measured(words, capsys)
    assert (row["mode"], row["method"], row["ranks"], row["rounds"]) == ("train", method, 1, 2)
    assert row["plain_difference"] < 1e-5
    for key in ("step_s", "plain_s", "plain_ratio", "peak_gib", "model_tflop", "save_stall_s"):
        assert row[key] > 0.0
    assert 0.0 < row["mfu"] < 1.0
    assert row["data_wait_s"] < row["step_s"]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("method", ["dmd", "self_forcing_dmd"])
def test_a_clip_is_timed_beside_the_same_mathematics(
    method: str, configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inference", "--config_path", str(configs[method]), *FEW]
    (row,), table = measured(words, capsys)
    assert (row["mode"], row["method"], row["samples"]) == ("inference", method, 1)
    assert row["plain_difference"] < 1e-5
    assert row["first_frame_s"] > 0.0
    assert row["fps"] * row["first_frame_s"] <= 17  # a clip has as many frames
    assert len(table) == 3


@pytest.mark.slow
def test_what_the_plain_version_does_not_compute_is_timed_alone_and_said(
    configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config_path", str(configs["sid"]), *FEW, "--no_save", "--parts"]
    assert benchmark.main(words) == 0
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[0])
    assert row["notes"] == ["no plain version: it knows DMD alone, without options"]
    assert row["plain_s"] is row["save_stall_s"] is None
    assert "| critic backward | " in out


@pytest.mark.parametrize(
    ("method", "overrides", "why"),
    [
        ("dmd", [], "its learning rates are constant"),
        ("dmd", [*CONSTANT], "its average moves from the start"),
        ("dmd", [*LIKE_PLAIN, "accumulation=2"], "it takes one micro-batch"),
        ("dmd", [*LIKE_PLAIN, "loss.critic_pull=0.1"], "it knows DMD alone, without options"),
        ("dmd", [*LIKE_PLAIN, "loss.reuse_rollout=true"], "it knows DMD alone, without options"),
        ("dmd", [*LIKE_PLAIN, "teacher.storage=fp8"], "its teacher is not rounded to 8 bits"),
        ("self_forcing_dmd", [*LIKE_PLAIN, "causal.last_step_only=true"], ROLLOUT_OPTIONS),
        ("self_forcing_dmd", LIKE_PLAIN, None),
        ("dmd", LIKE_PLAIN, None),
    ],
)  # fmt: skip
def test_the_plain_version_knows_what_it_does_not_compute(
    method: str, overrides: list[str], why: str | None, configs: dict[str, Path]
) -> None:
    assert yardstick.unlike(resolve(load(configs[method], overrides)), 1) == why


def test_the_plain_version_is_one_process(configs: dict[str, Path]) -> None:
    run = resolve(load(configs["dmd"], LIKE_PLAIN))
    assert yardstick.unlike(run, 2) == "it is one process"


@pytest.mark.parametrize("muon", [[], ["generator.muon_lr=0.01", "critic.muon_lr=0.02"]])
@pytest.mark.parametrize("method", ["dmd", "self_forcing_dmd"])
def test_losses_and_weights_stay_those_of_the_plain_version(
    method: str, muon: list[str], configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs[method], tmp_path, *LIKE_PLAIN, *muon) as trainer:
        plain = yardstick.PlainTraining(trainer)
        rounds = training.Rounds(warmup=1, timed=3, plain=True, save=False)
        found = training.time_steps(trainer, rounds, plain)
        assert len(found.losses) == 6  # every second step moves the generator too
        assert found.difference is not None
        assert found.difference < 1e-5
        names = [name for name, _ in plain.plain.generator.named_parameters()]
        average = dict(zip(names, plain.plain.average, strict=True))
        for name, shadow in trainer.ema.shadow.items():
            torch.testing.assert_close(shadow, average[name], rtol=1e-3, atol=1e-5)


def test_a_plain_version_with_other_weights_is_told_apart(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, *LIKE_PLAIN) as trainer:
        plain = yardstick.PlainTraining(trainer)
        with torch.no_grad():
            plain.plain.critic.head.head.bias.add_(0.01)
        rounds = training.Rounds(warmup=0, timed=1, plain=True, save=False)
        difference = training.time_steps(trainer, rounds, plain).difference
        assert difference is not None
        assert difference > 1e-4


def test_the_time_of_a_step_weighs_kinds_of_steps_as_often_as_they_come() -> None:
    clock = Clock(torch.device("cpu"))
    found = training.Measured(clock, clock, kinds=[2, 1, 1, 2, 1, 1])
    assert found.step_s([3.0, 1.0, 1.0, 3.0, 1.0, 9.0]) == pytest.approx((2 * 3.0 + 4 * 1.0) / 6)


def test_what_was_not_measured_is_a_dash() -> None:
    assert rows.number(None) == "-"
    assert rows.number(0.0123456) == "0.0123"
    assert rows.number(0.5, ".1%") == "50.0%"


def test_attention_kernels_are_timed_and_one_is_chosen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (found,), table = measured(["attention", "--shape", "tiny", "--device", "cpu"], capsys)
    assert (found["tokens"], found["heads"], found["head_dim"]) == (20, 4, 32)
    times = found["forward_and_backward_ms"]
    assert found["fastest"] == min(times, key=times.get)
    assert "flash2" in found["unusable"]
    assert {"sdpa", "math"} <= set(times)
    ways = found["masked"]["forward_and_backward_ms"]
    assert len(table) == 2 + len(found["forward_ms"]) + 2 + len(ways)


def test_both_ways_of_masking_are_timed_where_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    (found,), table = measured(["attention", "--shape", "tiny", "--device", "cpu"], capsys)
    masked = found["masked"]
    assert masked["frames"] == 2 * 5  # a clean video and a noisy one
    assert masked["blocks_call"] == found["fastest"]
    assert masked["fastest"] == "blocks"
    assert set(masked["forward_ms"]) == {"blocks"}
    assert masked["unusable"]["flex"].startswith("it is compiled for CUDA")
    (row,) = [line for line in table if line.startswith("| blocks | ")]
    assert float(row.split("|")[3]) == pytest.approx(
        masked["forward_and_backward_ms"]["blocks"], abs=1e-3
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--shape", "tiny", "14B", "--device", "cpu"],
            "--shape: 14B at 480 x 832 x 81 takes hours a step on a CPU, and more memory than most "
            "have; use --shape tiny small, a CUDA device, or --force",
        ),
        (
            ["attention", "--config_path", "a.yaml"],
            "attention: kernels are timed at --shape, not at a configuration",
        ),
        (["--shape", "tiny", "--timed_steps", "0"], "--timed_steps: must be at least 1, got 0"),
        (["--shape", "tiny", "--warmup_steps", "-1"], "--warmup_steps: must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is_made(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(benchmark.main, words, capsys) == message


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(benchmark.main, ["--shape", "tiny", "--device", "cuda"], capsys)
    assert message == "--device: cuda was asked for, but torch sees no CUDA device; use cpu"


@pytest.mark.slow
def test_shapes_need_no_folder_and_leave_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (row,), _ = measured(["--shape", "tiny", *FEW, "batch_size=4", "--no_save"], capsys)
    assert (row["name"], row["samples"], row["parameters"]) == ("tiny", 4, 1232064)
    assert row["plain_difference"] < 1e-5
    (clip,), _ = measured(["inference", "--shape", "tiny", *FEW], capsys)
    assert clip["fps"] > 0.0
    assert list(tmp_path.iterdir()) == []
