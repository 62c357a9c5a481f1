"""The first and the last lines of a command: how its threads wait, and what Ctrl-C does.

Imports nothing slow: a command calls `begin` before it imports torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

# How often an idle OpenMP thread looks for work before it sleeps. The usual 300 000 keep a core
# from the thread that has work when other processes want it too: docs/benchmarks.md has figures.
SPINS = "1000"
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # a user's own word counts

# Where torch's compiler keeps its graphs: by itself in a folder that the next boot empties.
COMPILED = "TORCHINDUCTOR_CACHE_DIR"

INTERRUPTED = 130  # exit status


def begin() -> None:
    """Prepare a command's process; called before torch is imported, and only by commands."""
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPINS
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault(COMPILED, os.path.join(home, "fewstep", "compiled"))
    # Who starts a command in the background may have it ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def run(main: Callable[[], int]) -> int:
    """A command's exit status; Ctrl-C that `main` does not handle itself is one line."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED


def _leave(signum: int, frame: FrameType | None) -> None:
    """End at once: an exception in the middle of an import is a page of others' code, or lost."""
    del signum, frame
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
