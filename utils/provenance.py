"""Where figures come from: the commit, the machine, the time."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

from utils.shipped import ROOT
from utils.version import VERSION

GIT_S = 5.0  # a repository on a dead disk must not hold up a run


def commit(folder: Path = ROOT) -> str | None:
    """The short name of a checkout's commit, with `+` where files differ from it; None = no git."""
    if not (folder / ".git").exists():
        return None
    words = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=GIT_S, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def version() -> str:
    """The version of this package, and its commit in a checkout."""
    found = commit()
    return VERSION if found is None else f"{VERSION} ({found})"


def machine() -> str:
    """The machine in words, without its name."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def stamp(seconds: float | None = None) -> str:
    """A time in UTC, as people read it; None = now."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
