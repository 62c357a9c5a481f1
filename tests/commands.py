"""What the command-line tests share: what a failing command may print, and must not load."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from model.families.registry import known_families

ROOT = Path(__file__).resolve().parent.parent

Main = Callable[[Sequence[str]], int]


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Give back the log handlers that a command takes over."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if any network or encoder is loaded."""

    def loaded(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded before the input was checked")

    for family in known_families():
        for name in ("load_network", "random_network", "load_text_encoder", "load_codec"):
            monkeypatch.setattr(family, name, loaded)


def refusal(main: Main, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says about bad input: one line, exit status 2, nothing on stdout."""
    capsys.readouterr()
    status = main(words)
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def main_and_stderr(main: Main, words: Sequence[str]) -> tuple[int, str]:
    """A command's exit status and what it wrote to stderr; for a rank of its own."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = main(words)
    return status, text.getvalue()
