"""What all commands share: log format, and errors that tell a user what to mend in a line."""

from __future__ import annotations

import logging
import os
import sys

from utils.config import ConfigError
from utils.weights import WeightsError

# What a user can mend. Everything else is a bug and keeps its traceback.
USER_ERRORS = (ConfigError, WeightsError, OSError, ValueError)


def start_logging(*, main_rank: bool = True) -> None:
    """Log to stderr; ranks other than the main one speak only of warnings."""
    logging.basicConfig(
        level=logging.INFO if main_rank else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("httpx", "torch.distributed", "matplotlib", "werkzeug"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def fail(error: Exception, *, own: bool = False) -> int:
    """Print one line per problem, once for all ranks; returns the exit status 2.

    own: of this rank alone, such as a full disk: then it speaks, whichever it is.
    """
    if own or os.environ.get("RANK", "0") == "0":
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return 2


def stopped(log: logging.Logger) -> int:
    """Say how to go on after Ctrl-C; returns the exit status 130."""
    log.warning("stopped; run the same command again to continue")
    return 130
