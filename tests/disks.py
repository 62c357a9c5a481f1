"""Disks that take no more, for tests: files that may not grow, and small file systems."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: to a writer this is a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def on_small_disk(code: str, folder: Path, size: str) -> str:
    """What Python code prints where `folder` (sys.argv[1]) is a file system of `size` bytes.

    Skips the test where that needs rights which are not there.
    """
    if shutil.which("unshare") is None or not _may_mount():
        pytest.skip("needs the right to mount a small file system")
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder} && exec {sys.executable} -c"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} "$0" "$1"', code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended_process() -> int:
    """The number of a process that is gone."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def _may_mount() -> bool:
    return subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0
