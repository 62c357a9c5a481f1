"""Ranks that end when the launcher that started them is gone, however that ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux' prctl: which signal a process gets when its parent has died


def end_with_launcher() -> None:
    """Let torchrun's end stop this rank as SIGTERM does: a run finishes its step, saves and ends.

    torchrun stops its ranks itself, but for a SIGKILL of its own; they would train on unseen.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died meanwhile, and nobody will tell
        os.kill(os.getpid(), signal.SIGTERM)
