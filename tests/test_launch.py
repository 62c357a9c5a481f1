"""The launchers: what they tell torchrun, what they refuse, and what they do in a Slurm job."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import this_host
from tests.runs import rows, run, step_folder
from tests.sources import ROOT
from utils import checkpoint

TORCHRUN = ROOT / "scripts" / "launch_torchrun.sh"
SLURM = ROOT / "scripts" / "launch_slurm.sh"
HERE = socket.gethostname()
Done = subprocess.CompletedProcess[str]


def launch(*words: str, **variables: str) -> Done:
    """The launcher with these words and variables, and no others of its own."""
    return subprocess.run(
        ["bash", str(TORCHRUN), *words],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def own_address() -> str:
    """An address of this machine that others could reach, or skip the test."""
    address = this_host.reach("192.0.2.1", 9)
    if not address or address.startswith("127."):
        pytest.skip("this machine has no network")
    return address


# ---- by hand


def test_one_host_needs_no_variables_and_all_words_reach_train_py() -> None:
    done = launch("--config_path", "a b.yaml", "--no_save", "steps=2", DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[words.index("--standalone") + 1 :] == [
        str(ROOT / "train.py"), "--config_path", "a b.yaml", "--no_save", "steps=2",
    ]  # fmt: skip
    assert "--max_restarts 0" in done.stdout


def test_several_hosts_are_told_where_they_meet_and_which_of_them_it_is() -> None:
    address = own_address()
    done = launch("x", NNODES="2:4", RDZV_HOST=address, RDZV_CONF="a=1", DRY_RUN="1")
    assert f"--rdzv_backend c10d --rdzv_endpoint {address}:29400 --rdzv_id fewstep" in done.stdout
    assert f"--rdzv_conf is_host=true\\,a=1 --local_addr {address}" in done.stdout
    assert "--nnodes 2:4" in done.stdout
    assert "--max_restarts 3" in done.stdout


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"NNODES": "0"}, "NNODES=0: must be a whole number from 1 to 100000"),
        ({"NNODES": "two"}, "NNODES=two: must be a whole number from 1 to 100000"),
        ({"NNODES": "3:2"}, "NNODES=3:2: MIN must not exceed MAX"),
        ({"NNODES": "1:2:3"}, "NNODES=1:2:3: must be a number of hosts, or MIN:MAX"),
        (
            {"NNODES": "2"},
            "RDZV_HOST is not set: NNODES=2 hosts must know where to meet; give the name or "
            "address of one of them, the same on all",
        ),
        ({"RDZV_PORT": "70000"}, "RDZV_PORT=70000: must be a whole number from 1 to 65535"),
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE=all: must be a whole number from 1 to 1024"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: must be a whole number from 0 to 100000"),
        ({"STOP_S": "1.5"}, "STOP_S=1.5: must be a whole number from 1 to 100000"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python: no such program"),
        (
            {"NNODES": "2", "RDZV_HOST": "::1"},
            f"RDZV_HOST=::1: is ::1 on {HERE}, which other hosts cannot reach; give the address "
            f"of a network that they share",
        ),
    ],
)
def test_variables_that_make_no_sense_are_refused(variables: dict[str, str], told: str) -> None:
    done = launch("x", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")


def test_a_host_that_nobody_knows_is_named() -> None:
    done = launch("x", NNODES="2", RDZV_HOST="no-such-host.invalid")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: RDZV_HOST=no-such-host.invalid: cannot be resolved on {HERE} ("
    )


def test_an_address_of_another_host_is_refused_as_this_ones() -> None:
    done = launch("x", NNODES="2", RDZV_HOST=own_address(), NODE_ADDR="192.0.2.200")
    assert done.stderr == f"error: NODE_ADDR=192.0.2.200: is no address of {HERE}\n"


@pytest.mark.parametrize("script", [TORCHRUN, SLURM])
def test_help_tells_usage_and_every_variable_and_no_words_are_an_error(script: Path) -> None:
    def said(*words: str) -> Done:
        line = ["bash", str(script), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)

    shown = said("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage: " in shown.stdout
    assert all(f"  {name} " in shown.stdout for name in ("RDZV_HOST", "STOP_S"))
    assert "set -" not in shown.stdout
    nothing = said()
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("error: no words for train.py: give at least --config_path ")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_launchers_pass_shellcheck() -> None:
    words = ["shellcheck", str(TORCHRUN), str(SLURM)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


# ---- in a Slurm job

SRUN = """#!/usr/bin/env bash
echo "srun $* RDZV_HOST=$RDZV_HOST NNODES=$NNODES RDZV_ID=$RDZV_ID RDZV_PORT=$RDZV_PORT" >>"$RECORD"
while [[ $1 == --* ]]; do shift; done
"$@" &
child=$!
trap 'kill -TERM $child' TERM
while :; do wait $child; status=$?; kill -0 $child 2>/dev/null || exit $status; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$RECORD"
case "$1 $2" in
    "show hostnames") printf 'node7\\nnode8\\n' ;;
    "show job") echo "JobId=$3 JobState=$JOB_STATE Reason=None" ;;
    requeue*) exit "${REQUEUE_STATUS:-0}" ;;
esac
"""
# In the launcher's place: it waits to be stopped, as long as SECONDS_LEFT, then ends with STATUS.
TRAINER = """
trap 'echo saved >>"$RECORD"; exit 1' TERM
echo "begun $*" >>"$RECORD"
for _ in $(seq "$((SECONDS_LEFT * 20))"); do sleep 0.05; done
exit "$STATUS"
"""


class Cluster:
    """A Slurm that runs what it is told on this machine, and writes it down."""

    def __init__(self, folder: Path, launcher: str) -> None:
        self.record, programs = folder / "record", folder / "bin"
        (folder / "scripts").mkdir()
        (folder / "scripts" / "launch_torchrun.sh").write_text(launcher, encoding="utf-8")
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text, encoding="utf-8")
            (programs / name).chmod(0o755)
        self.variables = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_SUBMIT_DIR": str(folder),
            "SECONDS_LEFT": "0",
            "STATUS": "0",
            "JOB_STATE": "RUNNING",
        }

    def submit(
        self, *words: str, when: Callable[[], bool] | None = None, send: int = 0, **more: str
    ) -> Done:
        """Run the batch script; once `when` holds it gets the signal `send`, and its steps none."""
        job = subprocess.Popen(
            ["bash", str(SLURM), *words],
            env={**self.variables, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until = time.monotonic() + 60.0
            while when is not None and not when():
                assert time.monotonic() < until, "the job does not begin"
                time.sleep(0.05)
            if when is not None:
                job.send_signal(send)
            out, err = job.communicate(timeout=120)
        finally:
            job.kill()
        return subprocess.CompletedProcess(words, job.returncode, out, err)

    def lines(self) -> list[str]:
        """What was done, in order."""
        return self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []

    def begun(self) -> bool:
        """Whether a launcher runs."""
        return any(line.startswith("begun") for line in self.lines())


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, TRAINER)


def test_a_job_starts_one_launcher_per_host_which_meet_at_the_first(cluster: Cluster) -> None:
    done = cluster.submit("--config_path", "c.yaml")
    assert (done.returncode, done.stderr) == (0, "done\n")
    launcher = Path(cluster.variables["SLURM_SUBMIT_DIR"]) / "scripts" / "launch_torchrun.sh"
    assert cluster.lines() == [
        "scontrol show hostnames node[7-8]",
        f"srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=0 bash {launcher} --config_path "
        f"c.yaml RDZV_HOST=node7 NNODES=2 RDZV_ID=fewstep-12345-0 RDZV_PORT=22345",
        "begun --config_path c.yaml",
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_runs_out_of_time_saves_and_is_queued_again(
    number: signal.Signals, cluster: Cluster
) -> None:
    done = cluster.submit("x", when=cluster.begun, send=number, SECONDS_LEFT="60")
    assert cluster.lines()[-1] == "scontrol requeue 12345"
    assert cluster.lines().count("saved") == 1
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{number.name}: saving after the current step", "stopped, and queued again",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "variables",
    [{"JOB_STATE": "CANCELLED"}, {"REQUEUE": "0"}],
    ids=["cancelled", "not wanted"],
)
def test_a_job_that_nobody_wants_again_saves_and_is_not_queued(
    variables: dict[str, str], cluster: Cluster
) -> None:
    line = {"SECONDS_LEFT": "60", **variables}
    done = cluster.submit("x", when=cluster.begun, send=signal.SIGTERM, **line)
    assert "saved" in cluster.lines()
    assert "scontrol requeue 12345" not in cluster.lines()
    assert done.stderr.endswith("stopped; submit the same job again to continue\n")


def test_a_job_that_fails_by_itself_is_not_queued_again(cluster: Cluster) -> None:
    done = cluster.submit("x", STATUS="7")
    assert done.returncode == 7
    assert "error: the run failed with status 7, and is not queued again" in done.stderr
    assert "scontrol requeue 12345" not in cluster.lines()


def test_a_requeue_that_slurm_refuses_is_told(cluster: Cluster) -> None:
    line = {"SECONDS_LEFT": "60", "REQUEUE_STATUS": "1"}
    done = cluster.submit("x", when=cluster.begun, send=signal.SIGUSR1, **line)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: job 12345 cannot be queued again; submit the same job again to continue"
    )


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_NNODES", "SLURM_JOB_NODELIST"])
def test_outside_of_a_job_the_missing_variable_is_named(name: str, cluster: Cluster) -> None:
    done = cluster.submit("x", **{name: ""})
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {name} is not set: submit this with sbatch, or use scripts/launch_torchrun.sh by "
        f"hand\n"
    )


def test_a_job_that_was_submitted_elsewhere_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.submit("x", SLURM_SUBMIT_DIR=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert done.stderr.endswith("no such file; submit from the repository's root\n")


@pytest.mark.slow
def test_a_real_run_is_stopped_by_slurm_queued_and_ends_as_the_unstopped_run(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """Through srun, the launcher and torchrun to two ranks, and again."""
    cluster = Cluster(tmp_path, f'exec bash {TORCHRUN} "$@"')
    logdir, settings = tmp_path / "run", ("steps=120", "save_every=1000")
    line = ["--config_path", str(configs["dmd"]), "--logdir", str(logdir), *settings]
    more = {"SLURM_NNODES": "1", "NPROC_PER_NODE": "2", "PYTHON": sys.executable}
    more |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}

    def trains() -> bool:
        return (logdir / "metrics.jsonl").is_file() and len(rows(logdir)) >= 2

    done = cluster.submit(*line, when=trains, send=signal.SIGUSR1, **more)
    assert cluster.lines()[-1] == "scontrol requeue 12345", done.stderr
    saved = checkpoint.latest(logdir / "checkpoints")
    assert saved is not None
    assert 2 <= checkpoint.step_of(saved) < 120
    done = cluster.submit(*line, SLURM_RESTART_COUNT="1", **more)
    assert done.returncode == 0, done.stderr
    assert f"resumed {saved}" in done.stderr
    assert step_folder(logdir, 120).is_dir()
    whole = run(configs["dmd"], tmp_path / "whole", *settings)
    for row, expected in zip(rows(logdir), rows(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
