"""report.html of a log directory: what it says of runs in every state, and of damaged files."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from scripts import report
from tests.pages import Page, read_page
from tests.runs import built, run
from utils.web.report.records import Event, read_run, spread_out
from utils.web.report.run import run_page, write_report

ROWS = [
    {
        "step": step,
        "generator/loss": 0.5 - step / 1e3,
        "critic/loss": 0.4,
        "generator/grad_norm": 1.0,
        "generator/lr": 1e-4,
        "seconds_per_step": 2.0,
        "peak_memory_gib": 10.0,
    }
    for step in range(10, 101, 10)
]
ALARM = {
    "name": "critic_lags",
    "since": 50,
    "seen": "the critic stands <still>",
    "advice": "raise its rate",
}


def probe(step: int, **more: Any) -> dict[str, Any]:
    """A line of health.jsonl."""
    figures = {"motion": 0.03, "chroma": 0.07, "critic_lag": 1.1, "drift": None}
    return {"step": step, "score": 0.8, "figures": figures, "alarms": [], "rose": [], "fell": [],
            **more}  # fmt: skip


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """A run of 200 steps that is at step 100, with probes, two starts and an alarm."""
    folder = tmp_path / "my <run>"
    (folder / "health").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines(ROWS))
    health = [probe(50, rose=["critic_lags"], alarms=[ALARM]), probe(100, alarms=[ALARM])]
    (folder / "health.jsonl").write_text(lines(health))
    reference = {"figures": {"motion": 0.034, "chroma": 0.07}}
    (folder / "health" / "reference.json").write_text(json.dumps(reference))
    facts = {"version": "0.1.0 (abc1234)", "machine": "x86_64", "device": "H100", "layout": "full"}
    history = [
        Event("start", 0, 1e9, settings={"steps": 150, "loss.cfg_scale": 5.0}, facts=facts),
        Event("end", 60, 1e9 + 500, how="stopped", words="stopped after step 60"),
        Event("start", 60, 1e9 + 900, settings={"steps": 200, "loss.cfg_scale": 5.0}, facts=facts),
    ]
    (folder / "history.jsonl").write_text(lines([asdict(event) for event in history]))
    return folder


def page_of(folder: Path) -> Page:
    return read_page(run_page(read_run(folder)))


def test_a_running_run_tells_step_speed_and_time_left(logdir: Path) -> None:
    text = page_of(logdir).text
    assert "my <run>" in text
    assert "running" in text
    assert "100 of 200" in text
    assert "2 s per step" in text
    assert "time left 3 min for 100 steps" in text
    assert "health 0.80" in text


def test_alarms_say_what_was_seen_since_when_and_what_helps(logdir: Path) -> None:
    text = page_of(logdir).text
    assert "critic lags since step 50" in text
    assert "the critic stands <still>." in text
    assert "What usually helps: raise its rate" in text
    assert "All rises and falls" in text


def test_curves_have_a_plot_for_each_kind_of_metric_and_figure(logdir: Path) -> None:
    page = page_of(logdir)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert "loss" in labels
    assert "norm of the gradient before clipping" in labels
    assert "learning rate" in labels
    assert "seconds per step" in labels
    assert "peak memory, GiB" in labels
    assert "motion: mean change from frame to frame" in labels
    assert not [label for label in labels if label and label.startswith("drift")]


def test_settings_that_changed_when_the_run_went_on_are_told(logdir: Path) -> None:
    text = page_of(logdir).text
    assert "at setting was is step 60 steps 150 200" in text
    assert "loss.cfg_scale" in text
    assert "0.1.0 (abc1234)" in text


def test_without_a_plan_the_page_says_how_to_compare_and_with_one_it_does(logdir: Path) -> None:
    assert "--plan_json LOGDIR/plan.json" in page_of(logdir).text
    plan = {"gpu": "H100", "gpus": 8, "memory_bytes": 8 * 2**30, "step_seconds": 1.5}
    (logdir / "plan.json").write_text(json.dumps(plan))
    text = page_of(logdir).text
    assert "planned for 8 x H100 measured" in text
    assert "seconds per step 1.5 2" in text
    assert "memory per GPU, GiB 8 10" in text


@pytest.mark.parametrize(
    ("how", "words"), [("finished", ""), ("failed", "disk full"), ("stopped", "after step 7")]
)
def test_a_run_that_ended_says_how(how: str, words: str, logdir: Path) -> None:
    with (logdir / "history.jsonl").open("a") as file:
        file.write(json.dumps(asdict(Event("end", 100, 2e9, how=how, words=words))) + "\n")
    text = page_of(logdir).text
    assert how in text
    assert words in text
    assert "running" not in text.partition("Alarms")[0]


def test_a_log_directory_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(ROWS))
    (tmp_path / "config.yaml").write_text("steps: 100\n")
    text = page_of(tmp_path).text
    assert "unknown" in text
    assert "Health is not probed in this run" in text
    assert "steps: 100" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 10, "a": 1}\n{"st'),
        ("metrics.jsonl", '{}\n{"step": 10, "a": 1}\n'),
        ("health.jsonl", '{}\nx\n{"step": 10, "figures": {}}\n'),
        ("history.jsonl", '{"kind": 1}\n[]\n{'),
        ("health/reference.json", "["),
        ("plan.json", "nothing"),
    ],
)
def test_damaged_files_leave_a_page(name: str, content: str, logdir: Path) -> None:
    (logdir / name).write_text(content)
    assert page_of(logdir).count("section") > 0


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--logdir", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert said == f"error: {tmp_path}: no log directory of a run (it has no metrics.jsonl)"


def test_of_many_probes_the_first_the_last_and_some_between_are_shown() -> None:
    assert spread_out([1, 2, 3], 5) == [1, 2, 3]
    assert spread_out(list(range(101)), 5) == [0, 25, 50, 75, 100]


# ---- of real runs


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Path]) -> Path:
    """A finished run with probes."""
    words = ("steps=4", "health.every=2", "health.count=2", "sampling.steps=2", "save_every=2")
    return run(configs["dmd"], tmp_path_factory.mktemp("page") / "run", *words)


def test_a_finished_run_leaves_its_page_with_playing_clips_beside_the_teachers(real: Path) -> None:
    page = read_page((real / "report.html").read_text(encoding="utf-8"))
    text = page.text
    assert "finished" in text
    assert "4 of 4" in text
    assert page.count("video") == 2 * 3  # two prompts; the teacher's and two probes
    first = next(attrs for tag, attrs in page.tags if tag == "video")
    assert {"autoplay", "loop", "muted", "playsinline"} <= first.keys()
    assert "a " in text  # prompts


def test_the_page_can_be_rebuilt_by_command(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real, copy)
    (copy / "report.html").unlink()
    assert report.main(["--logdir", str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    assert read_page((copy / "report.html").read_text(encoding="utf-8")).count("video") == 6


def test_a_resumed_run_notes_both_starts_and_what_changed(
    real: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real, copy)
    run(configs["dmd"], copy, "steps=5", "health.every=2", "health.count=2", "save_every=2")
    found = read_run(copy)
    kinds = [(event.kind, event.step, event.how) for event in found.history]
    assert kinds == [("start", 0, ""), ("end", 4, "finished"), ("start", 4, ""),
                     ("end", 5, "finished")]  # fmt: skip
    assert "steps 4 5" in page_of(copy).text


def test_a_run_that_fails_says_why_on_its_page(configs: dict[str, Path], tmp_path: Path) -> None:
    with built(configs["dmd"], tmp_path, "steps=2") as trainer:

        def fail() -> None:
            raise RuntimeError("no more <memory>")

        object.__setattr__(trainer, "log_metrics", fail)
        with pytest.raises(RuntimeError, match="no more"):
            trainer.train()
    text = page_of(tmp_path).text
    assert "failed" in text
    assert "no more <memory>" in text


def test_a_page_that_cannot_be_written_is_said_and_kills_no_run(
    configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)  # a folder in its place
    (tmp_path / "run" / "report.html" / "x").touch()
    run(configs["dmd"], tmp_path / "run", "steps=1", "batch_size=2")
    assert [line for line in caplog.messages if line.startswith("report.html: ")]


def test_runs_are_laid_side_by_side(
    real: Path, logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "both.html"
    words = ["--compare", str(real), str(logdir), "--output_path", str(output)]
    assert report.main(words) == 0
    assert capsys.readouterr().out.strip() == str(output)
    page = read_page(output.read_text(encoding="utf-8"))
    assert "run and my <run>" in page.text
    assert "Settings that differ" in page.text
    assert "loss.cfg_scale" in page.text
    assert "critic lags" in page.text
    assert page.count("video") >= 4
    assert write_report(logdir).is_file()


@pytest.mark.parametrize("words", [[], ["--logdir", "a", "--compare", "b"]])
def test_one_of_its_three_pages_must_be_asked_for(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.main(words)
    assert "--logdir" in capsys.readouterr().err
