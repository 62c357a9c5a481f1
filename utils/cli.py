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


def fail(error: Exception) -> int:
    """Print one line per problem, once for all ranks; returns the exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return 2
