"""Trackers of others: whatever they do, a run neither stops nor waits, and says once what is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ranks import run_on_ranks
from tests.runs import rows, run
from utils import trackers
from utils.errors import NotFoundError
from utils.metrics import Tracker, uses_wandb
from utils.trackers import FAILURES, Apart, TensorBoard, WandB, check_tensorboard


class Kept:
    """A tracker that keeps what it is given, as soon as it may go on."""

    def __init__(self, *, fails: bool = False) -> None:
        self.rows: list[int] = []
        self.may = threading.Event()
        self.may.set()
        self.fails = fails
        self.closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.may.wait(30.0)
        if self.fails:
            raise ConnectionError("no route")
        self.rows.append(step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.rows.append(step)

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row <= step]

    def close(self) -> None:
        self.closed = True


def test_what_is_tracked_arrives_in_order_and_is_closed(tmp_path: Path) -> None:
    kept = Kept()
    apart = Apart("kept", lambda: kept)
    for step in range(50):
        apart.log(step, {})
    apart.rewind(10)
    apart.picture(11, "samples", tmp_path)
    apart.close()
    assert (kept.rows, kept.closed) == ([*range(11), 11], True)


def test_a_row_is_what_it_was_when_it_was_given() -> None:
    seen: list[dict[str, float]] = []
    kept = Kept()
    kept.may.clear()
    kept.log = lambda step, values: (kept.may.wait(30.0), seen.append(dict(values)))  # type: ignore[assignment,method-assign,func-returns-value]
    apart, values = Apart("kept", lambda: kept), {"loss": 1.0}
    apart.log(1, values)
    values["loss"] = 2.0
    kept.may.set()
    apart.close()
    assert seen == [{"loss": 1.0}]


def test_a_tracker_that_fails_is_told_once_and_switched_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    apart = Apart("Web", lambda: Kept(fails=True))
    for step in range(FAILURES + 3):
        apart.log(step, {})
    apart.close()
    assert apart.failures == FAILURES
    assert caplog.messages == [
        "Web failed, and training goes on: ConnectionError: no route",
        "Web is switched off for this start: ConnectionError: no route; metrics.jsonl has all "
        "figures",
    ]


def test_a_tracker_that_cannot_be_made_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Tracker:
        raise OSError("no such service")

    apart = Apart("Web", broken)
    apart.log(1, {})
    apart.close()
    assert [m.partition(";")[0] for m in caplog.messages] == [
        "Web is switched off for this start: OSError: no such service"
    ]


def test_a_tracker_that_hangs_stalls_neither_the_run_nor_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "WAITING", 3)
    kept = Kept()
    kept.may.clear()
    apart = Apart("Web", lambda: kept, closed_within_s=0.2)
    begun = time.monotonic()
    for step in range(10):
        apart.log(step, {})
    apart.close()
    assert time.monotonic() - begun < 10.0
    assert apart.dropped in (6, 7)  # three wait, and one may be under way
    assert [m.partition(":")[0].partition(",")[0] for m in caplog.messages] == [
        "Web does not keep up",
        "Web does not answer within 0.2 s",
    ]
    kept.may.set()


# ---- W&B


class Server:
    """What stands in the place of the library: online there is nobody."""

    class Error(Exception):
        pass

    def __init__(self, reached: bool) -> None:
        self.reached = reached
        self.begun: list[dict[str, Any]] = []
        self.errors = SimpleNamespace(Error=self.Error)

    def teardown(self) -> None:
        self.torn_down = True

    def Settings(self, **words: Any) -> Any:  # noqa: N802, its name
        return SimpleNamespace(**words)

    def init(self, **words: Any) -> Any:
        self.begun.append(words)
        if not self.reached and words["mode"] not in ("offline", "disabled"):
            raise self.Error("timed out")
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    server = Server(reached=False)
    monkeypatch.setitem(sys.modules, "wandb", server)
    return server


def wandb_run(folder: Path, mode: trackers.Mode | None = None) -> WandB:
    return WandB(project="p", folder=folder, name="n", identity="abc", config={}, mode=mode)


def test_without_an_answer_wandb_goes_on_offline_under_the_same_identity(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb_run(tmp_path)
    assert [(one["mode"], one["id"], one["resume"]) for one in server.begun] == [
        (None, "abc", "allow"), ("offline", "abc", "allow"),
    ]  # fmt: skip
    assert server.begun[0]["settings"].init_timeout == trackers.INIT_S
    (line,) = caplog.messages
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*` sends the run later" in line


def test_the_mode_of_wandb_is_as_configured(server: Server, tmp_path: Path) -> None:
    wandb_run(tmp_path, "offline")
    assert [one["mode"] for one in server.begun] == ["offline"]


@pytest.mark.parametrize(("mode", "used"), [("offline", True), ("disabled", False)])
def test_a_configured_mode_decides_whether_there_is_wandb(
    mode: str, used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert uses_wandb(None, disabled=False, mode=mode) is used
    assert f"since logging.wandb_mode={mode}; " in caplog.text


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network on which W&B is not."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    yield


@pytest.mark.slow
def test_without_a_network_a_run_starts_at_once_and_its_steps_lie_on_the_disk(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "INIT_S", 3.0)
    apart = Apart("Weights & Biases", lambda: wandb_run(tmp_path))
    begun = time.monotonic()
    apart.log(1, {"loss": 1.0})
    assert time.monotonic() - begun < 1.0
    apart.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def track_until_it_dies(folder: Path) -> list[str]:
    """Names of files that an offline run leaves whose process is killed; in a process of its own,
    since the library says goodbye to its own process when Python ends."""
    os.environ.pop("WANDB_SERVICE", None)  # another test's
    make = partial(wandb_run, folder, "offline")
    apart = Apart("Weights & Biases", make, closed_within_s=20.0)
    apart.log(1, {"loss": 1.0})
    until = time.monotonic() + 60.0
    while not list(folder.glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < until:
        time.sleep(0.1)
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    own = [int(line.split()[0]) for line in listed.splitlines() if "wandb" in line]
    assert own, listed
    for pid in own:
        os.kill(pid, signal.SIGKILL)
    for step in range(2, 30):
        apart.log(step, {"loss": 1.0})
    apart.close()
    return [path.name for path in folder.glob("wandb/offline-run-*/*.wandb")]


@pytest.mark.slow
def test_a_wandb_process_that_dies_ends_no_run(tmp_path: Path) -> None:
    (found,) = run_on_ranks(1, track_until_it_dies, tmp_path)
    assert found == ["run-abc.wandb"]


# ---- TensorBoard


def test_tensorboard_that_is_not_installed_is_an_error_before_weights_are_read(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(NotFoundError, match=r"pip install 'fewstep\[tensorboard\]'"):
        run(configs["diffusion"], tmp_path / "run", "logging.tensorboard=true")
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_tensorboard()
    first = TensorBoard(tmp_path, resumed_at=0)
    for step in (1, 2, 3):
        first.log(step, {"critic/loss": float(step)})
    first.rewind(1)
    first.log(2, {"critic/loss": 20.0})
    first.close()
    again = TensorBoard(tmp_path, resumed_at=2)
    again.log(3, {"critic/loss": 30.0})
    again.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("critic/loss")]
    assert found == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_a_run_with_tensorboard_writes_its_losses(configs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(configs["diffusion"], tmp_path, "logging.tensorboard=true", "steps=1")
    assert len(rows(tmp_path)) == 1
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
