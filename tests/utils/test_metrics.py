"""Metrics of a run: means over steps, and the rows of metrics.jsonl."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils import metrics as module
from utils.distributed import Session
from utils.metrics import JsonLines, Metrics, read_metrics, uses_wandb

ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))


def rows(path: Path) -> list[dict[str, float]]:
    return list(read_metrics(path))


def test_metrics_are_means_since_the_last_read() -> None:
    metrics = Metrics(ALONE)
    metrics.add("critic", {"loss": torch.tensor(1.0)})
    metrics.add("critic", {"loss": torch.tensor(3.0)})
    assert metrics.read()["critic/loss"] == 2.0


def test_each_metric_is_averaged_over_its_own_count() -> None:
    metrics = Metrics(ALONE)
    for value in (1.0, 3.0):
        metrics.add("critic", {"loss": torch.tensor(value)})
    metrics.add("generator", {"loss": torch.tensor(7.0)})
    values = metrics.read()
    assert (values["critic/loss"], values["generator/loss"]) == (2.0, 7.0)


def test_reading_starts_afresh() -> None:
    metrics = Metrics(ALONE)
    metrics.add("critic", {"loss": torch.tensor(1.0)})
    metrics.read()
    assert list(metrics.read()) == ["seconds_per_step"]


def test_adding_does_not_change_the_tensor_that_was_given() -> None:
    metrics, loss = Metrics(ALONE), torch.tensor(1.0)
    metrics.add("critic", {"loss": loss})
    metrics.add("critic", {"loss": loss})
    assert loss == 1.0


def test_half_precision_metrics_are_averaged_in_single_precision() -> None:
    metrics = Metrics(ALONE)
    for value in (1.0, 2.0, 2.0):
        metrics.add("critic", {"loss": torch.tensor(value, dtype=torch.bfloat16)})
    assert metrics.read()["critic/loss"] == pytest.approx(5.0 / 3.0, abs=1e-6)


def test_time_is_divided_by_the_steps_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    metrics = Metrics(ALONE)
    for _ in range(10):
        metrics.count_step()
    assert metrics.read() == {"seconds_per_step": 3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_and_left_out(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(ALONE)
    metrics.add("critic", {"loss": torch.tensor(1.0), "gap": torch.tensor(value)})
    assert metrics.read().keys() == {"critic/loss", "seconds_per_step"}
    assert caplog.messages == ["critic/gap not finite, and left out"]


def test_cleared_metrics_are_forgotten() -> None:
    metrics = Metrics(ALONE)
    metrics.add("critic", {"loss": torch.tensor(1.0)})
    metrics.clear()
    assert metrics.read().keys() == {"seconds_per_step"}


def test_rows_of_steps_that_will_be_done_again_are_removed(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl", resumed_at=0)
    for step in (1, 2, 3):
        tracker.log(step, {})
    tracker.rewind(1)
    tracker.log(2, {"again": 1.0})
    assert rows(tracker.path) == [{"step": 1}, {"step": 2, "again": 1.0}]


def test_each_log_is_one_row(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl", resumed_at=0)
    tracker.log(1, {"critic/loss": 0.5})
    tracker.log(2, {"critic/loss": 0.25})
    assert rows(tracker.path) == [
        {"step": 1, "critic/loss": 0.5},
        {"step": 2, "critic/loss": 0.25},
    ]


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    JsonLines(path, resumed_at=2).log(3, {"again": 1.0})
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1.0}]


def test_a_last_line_cut_by_a_crash_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "cri')
    assert rows(path) == [{"step": 1}]


def test_after_a_cut_line_the_next_row_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "cri')
    JsonLines(path, resumed_at=1).log(2, {"critic/loss": 1.0})
    assert rows(path) == [{"step": 1}, {"step": 2, "critic/loss": 1.0}]


def test_time_that_is_paused_is_not_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 13.0, 20.0])  # begun, paused, resumed, read
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    metrics = Metrics(ALONE)
    for _ in range(2):
        metrics.count_step()
    with metrics.paused():
        pass
    assert metrics.read()["seconds_per_step"] == (20.0 - 3.0) / 2


# ---- whether Weights & Biases is used


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty home of a user who never heard of W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def decision(
    caplog: pytest.LogCaptureFixture, asked: bool | None, *, disabled: bool = False
) -> tuple[bool, str]:
    caplog.clear()
    with caplog.at_level("INFO"):
        chosen = uses_wandb(asked, disabled=disabled)
    (line,) = caplog.messages
    return chosen, line.removeprefix("Weights & Biases: ")


OFF = "; logging.wandb=true turns it on"
ON = "; --disable-wandb turns it off"


def test_without_a_login_and_unless_asked_there_is_no_wandb(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = f"off, since you are not logged in (wandb login){OFF}"
    assert decision(caplog, None) == (False, said)
    assert decision(caplog, True) == (True, f"on, since logging.wandb=true{ON}")


@pytest.mark.parametrize(
    ("server", "known"), [(None, True), ("https://wandb.mine.org", False), ("nonsense", False)]
)
def test_a_login_at_the_server_in_use_turns_wandb_on(
    server: str | None,
    known: bool,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (home / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (home / ".netrc").chmod(0o600)
    if server is not None:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert decision(caplog, None)[0] is known
    assert decision(caplog, False) == (False, f"off, since logging.wandb=false{OFF}")
    assert decision(caplog, True, disabled=True) == (False, f"off, since --disable-wandb{OFF}")


@pytest.mark.parametrize(
    ("name", "value", "chosen"),
    [
        ("WANDB_API_KEY", "secret", True),
        ("WANDB_MODE", "offline", True),
        ("WANDB_MODE", "disabled", False),
    ],
)
def test_the_environment_decides_where_nothing_was_asked_and_shows_no_key(
    name: str,
    value: str,
    chosen: bool,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(name, value)
    found, line = decision(caplog, None)
    assert found is chosen
    assert name in line
    assert "secret" not in line


def test_a_login_file_that_is_broken_is_no_login(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / ".netrc").write_text("machine")
    assert decision(caplog, None)[0] is False


# ---- damaged lines, and disks that take no more


@pytest.mark.parametrize("line", [b"{}", b"\xff\xfe\x00", b"[1]", b'{"step": "x"}', b"3", b'{"st'])
def test_a_line_that_is_no_row_is_skipped_told_and_removed(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with caplog.at_level(logging.WARNING, logger="utils.metrics"):
        JsonLines(path, resumed_at=2)
    assert caplog.messages == [f"{path}: 1 lines are no metrics, and are removed"]
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_rows_that_a_disk_does_not_take_wait_and_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonLines(path, resumed_at=0)
    with caplog.at_level(logging.WARNING, logger="utils.metrics"):
        tracker.log(1, {})
        tracker.log(2, {})
    told = "no such file or directory; metrics wait in memory until it takes them"
    assert caplog.messages == [f"{path}: {told}"]
    path.parent.mkdir()
    tracker.log(3, {})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_half_a_row_is_taken_back_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path, resumed_at=0)
    tracker.log(1, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        tracker.log(2, {"critic/loss": 0.5})
        assert path.read_text() == '{"step": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_rows_that_are_lost_at_the_end_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = JsonLines(tmp_path / "gone" / "metrics.jsonl", resumed_at=0)
    tracker.log(1, {})
    with caplog.at_level(logging.WARNING, logger="utils.metrics"):
        tracker.close()
    assert "1 rows are lost: " in caplog.messages[-1]
