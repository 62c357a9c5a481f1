"""Two hosts meet, train, and lose one of them: the other goes on from the last checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts import Host, two_hosts, why_not
from tests.runs import rows, run, step_folder
from tests.sources import ROOT

STEPS, SAVED = 60, 6
SETTINGS = (f"steps={STEPS}", "save_every=2")
LAUNCHER = str(ROOT / "scripts" / "launch_torchrun.sh")


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def uninterrupted(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process, to which nothing happens."""
    return run(configs["diffusion"], tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


def variables(meeting: Host) -> dict[str, str]:
    """What both hosts are told."""
    return {
        "NNODES": "1:2",
        "RDZV_HOST": meeting.address,
        "RDZV_CONF": "last_call_timeout=10",
        "NPROC_PER_NODE": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def train_words(config: Path, logdir: Path) -> list[str]:
    line = ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb"]
    return ["bash", LAUNCHER, *line, *SETTINGS]


def assert_same_losses(logdir: Path, uninterrupted: Path) -> None:
    assert len(rows(logdir)) == STEPS
    for row, expected in zip(rows(logdir), rows(uninterrupted), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def wait_for(there: Callable[[], bool], what: str, said: Path, limit_s: float = 120.0) -> None:
    until = time.monotonic() + limit_s
    while not there():
        assert time.monotonic() < until, f"{what}: not within {limit_s} s\n{said.read_text()}"
        time.sleep(0.1)


def kill(host: Host) -> None:
    host.kill()


def cut(host: Host) -> None:
    """Nothing gets through any more, and no connection is closed."""
    host.do("ip", "link", "set", "cable", "down")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "lose", "silent_s"), [(4, kill, 10), (6, cut, 40)], ids=["killed", "cut off"]
)
def test_the_host_that_is_left_names_the_other_and_ends_with_the_losses_of_an_uninterrupted_run(
    version: int,
    lose: Callable[[Host], None],
    silent_s: int,
    uninterrupted: Path,
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    logdir, said = tmp_path / "run", [tmp_path / "a.txt", tmp_path / "b.txt"]
    line = train_words(configs["diffusion"], logdir)
    with two_hosts(version) as hosts:
        runs = [
            host.start(line, text, variables(hosts[0]))
            for host, text in zip(hosts, said, strict=True)
        ]
        wait_for(step_folder(logdir, SAVED).exists, f"step {SAVED}", said[0])
        lost_at, clock = len(rows(logdir)), time.monotonic()
        lose(hosts[1])
        named = f"rank 1 (host host-b) has shown no life for {silent_s} s"
        wait_for(lambda: named in said[0].read_text(), "host-b is named", said[0], 70.0)
        assert time.monotonic() - clock < 60.0
        try:
            status = runs[0].wait(200.0)
        except subprocess.TimeoutExpired:
            pytest.fail(f"host-a does not end\n{said[0].read_text()}")
        if lose is cut:
            assert "the store that ranks share does not answer" in said[1].read_text()
    text = said[0].read_text()
    assert status == 0, text
    assert "over 2 ranks" in text
    assert "over 1 ranks" in text
    resumed = re.findall(r"resumed .*step_(\d+)", text)
    assert len(resumed) == 1
    assert SAVED <= int(resumed[0]) <= lost_at + 1 < STEPS
    assert_same_losses(logdir, uninterrupted)


@pytest.mark.slow
def test_a_host_that_is_killed_and_started_again_joins_the_one_that_waits_for_it(
    uninterrupted: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir, said = tmp_path / "run", [tmp_path / name for name in ("a.txt", "b.txt", "again.txt")]
    line = train_words(configs["diffusion"], logdir)
    with two_hosts(4) as hosts:
        both = {**variables(hosts[0]), "NNODES": "2"}
        first = hosts[0].start(line, said[0], both)
        hosts[1].start(line, said[1], both)
        wait_for(step_folder(logdir, SAVED).exists, f"step {SAVED}", said[0])
        hosts[1].kill()
        second = hosts[1].start(line, said[2], both)
        try:
            statuses = [first.wait(200.0), second.wait(30.0)]
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run does not end\n{said[0].read_text()}\n{said[2].read_text()}")
    text = said[0].read_text()
    assert statuses == [0, 0], text
    assert text.count("over 2 ranks") == 2
    assert len(re.findall(r"resumed .*step_(\d+)", text)) == 1
    assert_same_losses(logdir, uninterrupted)
