"""What all commands share: log format, and errors that tell a user what to mend in a line."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from utils.board import spoken
from utils.config import ConfigError
from utils.distributed import Launch
from utils.errors import UserError, words
from utils.version import VERSION

STOPPED = "stopped; run the same command again to continue"
# What `fail` looks at. It tells what a user can mend, and raises the rest again.
USER_ERRORS = (UserError, OSError, RuntimeError)


class CommandParser(argparse.ArgumentParser):
    """A command line whose errors are one line each, like all others."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words and where help is; exit status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line to which a command adds its own flags."""
    result = CommandParser(description=description)
    result.add_argument("--version", action="version", version=f"Fewstep {VERSION}")
    return result


def start_logging(*, main_rank: bool | None = None) -> None:
    """Log to stderr; ranks other than the main one (None = ask the launcher) only warn."""
    if main_rank is None:
        main_rank = Launch.here().rank == 0
    logging.basicConfig(
        level=logging.INFO if main_rank else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("httpx", "torch.distributed", "matplotlib", "werkzeug"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def fail(error: Exception) -> int:
    """Print one line per problem; returns the exit status 2.

    The main rank speaks for all that fail with the same words; a rank that fails alone, or with
    other words, says so with its number. A rank that only lost one that failed is silent on that
    one's host; where one was killed or another host is gone, a rank of each host names it. Raises
    `error` again if no user can mend it, so that a bug keeps its traceback.
    """
    launch, text = Launch.here(), words(error)
    if text is None:
        text = launch.lost_rank(error)
        if text is None:
            raise error
        quiet = not text
    else:
        quiet = launch.told_by_main(text)
    if not quiet:
        for line in text.splitlines():
            print(f"error: {spoken(launch.rank, line)}", file=sys.stderr)
    return 2


def stopped(log: logging.Logger) -> int:
    """Say how to go on after Ctrl-C; returns the exit status 130."""
    log.warning(STOPPED)
    return 130


def interruptible(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command that Ctrl-C ends with one line and the exit status 130, wherever it is."""

    @functools.wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except KeyboardInterrupt:
            print(STOPPED, file=sys.stderr)
            return 130

    return command


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ConfigError with a line for each argument that is less than it may be; None is not."""
    problems = [
        f"--{name}: must be at least {bound}, got {getattr(args, name)}"
        for name, bound in least.items()
        if getattr(args, name) is not None and getattr(args, name) < bound
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def path_word(word: str) -> Path:
    """A word of the command line as a path. An empty one, as of an unset variable, is none."""
    if not word:
        raise argparse.ArgumentTypeError("must be a path, got an empty word")
    return Path(word)
