"""How commands begin: how threads wait is settled before torch is there, and Ctrl-C is a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep import COMMANDS
from tests.sources import ROOT
from utils import start

FILES = {name: ROOT / f"{module.replace('.', '/')}.py" for name, module in COMMANDS.items()}
# Imports that take for ever, and say when they have begun.
SLOW = "import pathlib, time; pathlib.Path(r'{mark}').touch(); time.sleep(60)"


def python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter, with no word of a user but these."""
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TORCHINDUCTOR_CACHE_DIR"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


SHOW = (
    "import os, sys; from utils import start; start.begin(); "
    "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
)


def test_threads_are_told_to_sleep_soon_before_torch_is_imported() -> None:
    assert python(SHOW) == f"{start.SPINS} False"


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_a_user_s_own_word_about_threads_counts(setting: dict[str, str], kept: str) -> None:
    assert python(SHOW, **setting) == f"{kept} False"


@pytest.mark.parametrize(
    ("setting", "folder"),
    [
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/fewstep/compiled"),
        ({"HOME": "/me", "XDG_CACHE_HOME": ""}, "/me/.cache/fewstep/compiled"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_compiled_graphs_outlive_a_boot_unless_the_user_says_where(
    setting: dict[str, str], folder: str
) -> None:
    code = "import os; from utils import start; start.begin(); print(os.environ[start.COMPILED])"
    assert python(code, **setting) == folder


def test_importing_a_command_changes_nothing_of_the_process() -> None:
    code = (
        "import os, signal, train, scripts.make_tiny_world\n"
        "print('GOMP_SPINCOUNT' in os.environ,"
        " signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    assert python(code) == "False True"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_begins_before_torch_is_imported(name: str) -> None:
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    begun = next(i for i, line in enumerate(lines) if line == "    start.begin()")
    slow = [
        i
        for i, line in enumerate(lines)
        if line.startswith(("import torch", "from torch", "from model", "from trainer"))
    ]
    assert not [i for i in slow if i < begun]
    assert lines[-1] == "    sys.exit(start.run(main))"


def interrupted(words: list[str], mark: Path, folder: Path) -> subprocess.Popen[str]:
    """A process that was sent Ctrl-C while it imported torch."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(SLOW.format(mark=mark), encoding="utf-8")
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    return process


@pytest.mark.parametrize(
    "words",
    [
        ["train.py"],
        ["inference.py"],
        ["convert_checkpoint.py"],
        ["scripts/make_tiny_world.py"],
        ["scripts/validate_dataset.py"],
        ["-c", "import sys; sys.argv[0] = 'bin/fewstep-train'; import fewstep; fewstep.main()"],
    ],
    ids=lambda words: words[0],
)
def test_ctrl_c_during_the_imports_of_a_command_is_a_line(words: list[str], tmp_path: Path) -> None:
    process = interrupted([sys.executable, *words], tmp_path / "mark", tmp_path)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "stopped\n")


def test_ctrl_c_that_a_command_does_not_handle_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert start.run(main) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_command_s_exit_status_is_its_own() -> None:
    assert start.run(lambda: 2) == 2


def test_ctrl_c_stays_ignored_for_a_command_in_the_background() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from utils import start; start.begin()\n"
        "print(start.run(lambda: signal.getsignal(signal.SIGINT) is signal.SIG_IGN))"
    )
    assert python(code) == "True"
