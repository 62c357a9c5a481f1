"""Which errors are a user's: their words, and who among several ranks speaks."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.commands import main_and_stderr
from tests.ranks import run_on_ranks
from utils import distributed
from utils.cli import USER_ERRORS, fail
from utils.config import ConfigError
from utils.data.shards import DamagedRecordError
from utils.distributed import distributed_session
from utils.errors import ExistsError, NotFoundError, UserError, words
from utils.weights import WeightsError

Said = tuple[int, str]


@pytest.mark.parametrize("kind", [ConfigError, WeightsError, DamagedRecordError, NotFoundError])
def test_errors_for_users_are_of_one_class_and_still_value_errors(kind: type[UserError]) -> None:
    assert issubclass(kind, UserError)
    assert issubclass(kind, ValueError)
    assert words(kind("steps: must be at least 1")) == "steps: must be at least 1"


def test_missing_and_existing_files_are_still_what_python_calls_them() -> None:
    assert issubclass(NotFoundError, FileNotFoundError)
    assert issubclass(ExistsError, FileExistsError)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "a/b: no space left on device; make room, then run the same command again"),
        (errno.ENOENT, "a/b: no such file or directory"),
        (
            errno.EACCES,
            "a/b: permission denied; choose a place where you may do that, or ask for the right",
        ),
    ],
)
def test_what_the_file_system_refuses_a_user_is_told_with_what_to_do(
    number: int, said: str
) -> None:
    assert words(OSError(number, os.strerror(number), "a/b")) == said


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("too many values to unpack"),
        RuntimeError("shapes do not match"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError("no number"),
    ],
)
def test_a_bug_is_raised_again(bug: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert words(bug) is None
    with pytest.raises(type(bug)) as caught:
        fail(bug)
    assert caught.value is bug
    assert capsys.readouterr().err == ""


def test_each_problem_gets_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(ConfigError("first\nsecond")) == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"


# ---- several ranks


def failing(said: list[str | None]) -> Said:
    """Fail with the words of this rank, or return."""
    distributed.TOLD_S = 1.0
    text = said[int(os.environ["RANK"])]
    return main_and_stderr(lambda _: 0 if text is None else fail(UserError(text)), [])


def test_ranks_that_fail_alike_say_so_once() -> None:
    assert run_on_ranks(3, failing, ["full"] * 3) == [(2, "error: full\n"), (2, ""), (2, "")]


def test_a_rank_that_fails_alone_says_so_with_its_number() -> None:
    assert run_on_ranks(2, failing, [None, "full"]) == [(0, ""), (2, "error: rank 1: full\n")]


def test_a_rank_that_fails_with_other_words_says_its_own() -> None:
    assert run_on_ranks(2, failing, ["full", "torn\nworn"]) == [
        (2, "error: full\n"),
        (2, "error: rank 1: torn\nerror: rank 1: worn\n"),
    ]


def losing(failing_rank: int, told: bool) -> Said:
    """A rank goes while the other waits for it in a collective."""
    distributed.TOLD_S = 0.5

    def body(_: object) -> int:
        with distributed_session(timeout_s=20.0) as session:
            try:
                if session.rank == failing_rank:
                    raise UserError("disk full") if told else ZeroDivisionError
                time.sleep(0.2)
                session.mean(torch.zeros(1))
            except USER_ERRORS as error:
                return fail(error)
            except ZeroDivisionError:
                return 1
        return 0

    return main_and_stderr(body, [])


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_rank_that_loses_one_that_told_why_it_failed_is_silent(failing_rank: int) -> None:
    statuses, texts = zip(*run_on_ranks(2, losing, failing_rank, True), strict=True)
    assert statuses == (2, 2)
    assert sorted(texts) == ["", f"error: {'rank 1: ' * failing_rank}disk full\n"]


def lost_in_silence() -> str:
    """What a rank raises that loses one that said nothing."""
    try:
        losing(0, False)
    except RuntimeError as error:
        return type(error).__name__
    return ""


def test_a_rank_that_loses_one_in_silence_keeps_its_traceback() -> None:
    assert run_on_ranks(2, lost_in_silence)[1] == "RuntimeError"


def on_main(kind: str) -> str:
    """What a rank gets to hear of a task of the main one's."""

    def task() -> None:
        assert dist.get_rank() == 0
        if kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")
        if kind == "bug":
            raise ZeroDivisionError

    with distributed_session(timeout_s=20.0) as session:
        try:
            session.on_main(task)
        except Exception as error:
            return f"{type(error).__name__}: {words(error)}"
    return "done"


@pytest.mark.parametrize(
    ("kind", "heard"),
    [
        ("fine", ["done", "done"]),
        ("full", ["OSError: there: no space left on ", "UserError: there: no space left on "]),
        ("bug", ["ZeroDivisionError: None", "UserError: rank 0 failed: ZeroDivisionError"]),
    ],
)
def test_what_the_main_rank_fails_to_do_every_rank_raises(kind: str, heard: list[str]) -> None:
    found = run_on_ranks(2, on_main, kind)
    assert all(text.startswith(start) for text, start in zip(found, heard, strict=True)), found
