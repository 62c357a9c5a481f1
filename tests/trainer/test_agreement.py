"""Ranks that would not train the same run say so at once: which of them, and what differs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import train
from tests.commands import main_and_stderr
from tests.ranks import run_on_ranks
from trainer import agreement, logdir
from trainer.agreement import check_same, differences, named_ranks
from utils.config import ConfigError
from utils.distributed import distributed_session

ALL = "error: ranks disagree; start all with the same code, command line and data: "
Said = tuple[int, str]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("aaab", "key: a, but b on rank 3 (host h3)"),
        ("abbb", "key: b, but a on rank 0 (host h0)"),
        ("aabb", "key: a, but b on ranks 2-3 (hosts h2, h3)"),
        ("abab", "key: a, but b on ranks 1, 3 (hosts h1, h3)"),
        ("aabc", "key: a, but b on rank 2 (host h2), c on rank 3 (host h3)"),
        ("ab", "key: a, but b on rank 1 (host h1)"),
        ("a-", "key: a, but absent on rank 1 (host h1)"),
    ],
)
def test_the_fewer_are_named_and_of_equal_halves_those_without_rank_0(
    values: str, told: str
) -> None:
    facts = [{"key": value, "same": "x"} if value != "-" else {"same": "x"} for value in values]
    assert list(differences(facts, [f"h{rank}" for rank in range(len(values))])) == [told]


def test_many_ranks_are_named_by_their_spans() -> None:
    hosts = [f"h{rank // 8}" for rank in range(32)]
    assert named_ranks([*range(8, 16), 17], hosts) == "ranks 8-15, 17 (hosts h1, h2)"


# ---- on real ranks


def train_with(lines: Sequence[list[str]]) -> Said:
    """Train with the command line that is this rank's own."""
    return main_and_stderr(train.main, lines[int(os.environ["RANK"])])


def words(config: Path, folder: Path, *more: str) -> list[str]:
    return ["--config_path", str(config), "--logdir", str(folder), "--disable-wandb", *more]


def told(answers: list[Said]) -> str:
    """What ranks say that all fail: one of them speaks."""
    assert [status for status, _ in answers] == [2] * len(answers)
    (text,) = [text for _, text in answers if text]
    return text


def test_a_rank_with_another_setting_or_flag_is_named_with_both_values(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    usual = words(configs["dmd"], tmp_path / "run")
    other = words(configs["dmd"], tmp_path / "run", "critic.lr=0.5", "batch_size=6", "--no_save")
    text = told(run_on_ranks(3, train_with, [usual, other, usual]))
    here = f"on rank 1 (host {os.uname().nodename})"
    assert text == (
        f"{ALL}--no_save: False, but True {here}; batch_size: 4, but 6 {here}; "
        f"critic.lr: 0.001, but 0.5 {here}\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_rank_with_another_log_directory_is_named(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    lines = [words(configs["dmd"], tmp_path / name) for name in "ab"]
    text = told(run_on_ranks(2, train_with, lines))
    assert f"--logdir: {tmp_path / 'a'}, but {tmp_path / 'b'} on rank 1" in text


def train_on_own_data(config: Path, folder: Path, copies: Sequence[Path]) -> Said:
    """Train on data that lies under the same name everywhere, and is another on each rank."""
    os.chdir(copies[int(os.environ["RANK"])])
    return main_and_stderr(train.main, words(config, folder, "data.path=prompts.txt"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda text: text.replace("red", "green"), "data.path, captions: "),
        (lambda text: text + "one more\n", "data.path, number of records: 288, but 289 on rank 1 "),
    ],
)
def test_a_rank_with_other_data_is_named(
    change: object, what: str, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    assert callable(change)
    copies = [tmp_path / "0", tmp_path / "1"]
    text = (tiny_root / "data" / "tiny" / "prompts.txt").read_text(encoding="utf-8")
    for copy, content in zip(copies, (text, change(text)), strict=True):
        copy.mkdir()
        (copy / "prompts.txt").write_text(content, encoding="utf-8")
    answers = run_on_ranks(2, train_on_own_data, configs["dmd"], tmp_path / "run", copies)
    assert told(answers).startswith(f"{ALL}data.path, ")
    assert what in told(answers)


def train_own_code(line: list[str], root: Path) -> Said:
    """Train as if rank 1 had been started from another checkout."""
    if os.environ["RANK"] == "1":
        agreement.shipped.ROOT = root
    return main_and_stderr(train.main, line)


def test_a_rank_with_other_code_is_named_with_the_file(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "checkout"
    for name in agreement.PACKAGES:
        shutil.copytree(agreement.shipped.ROOT / name, root / name)
    shutil.copy(agreement.shipped.ROOT / "train.py", root)
    (root / "model" / "dmd.py").write_text("# mended on one host alone\n", encoding="utf-8")
    (root / "model" / "new.py").touch()
    line = words(configs["dmd"], tmp_path / "run")
    text = told(run_on_ranks(2, train_own_code, line, root))
    assert text.startswith(f"{ALL}model/dmd.py: ")
    assert "model/new.py: absent, but " in text
    assert text.count("on rank 1 (host ") == 2


def train_apart(line: list[str], folder: Path) -> Said:
    """Train where rank 1 sees an empty folder in the place of the log directory."""
    logdir.SHARED_S = 0.3
    if os.environ["RANK"] == "1":
        seen = logdir._appears
        logdir._appears = lambda path: seen(folder / "elsewhere" / path.name)
    return main_and_stderr(train.main, line)


def test_a_rank_that_does_not_share_the_log_directory_is_named(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    line = words(configs["dmd"], tmp_path / "run", "steps=1")
    here = os.uname().nodename
    assert told(run_on_ranks(2, train_apart, line, tmp_path)) == (
        f"error: --logdir {tmp_path / 'run'}: rank 1 (host {here}) cannot see what rank 0 (host "
        f"{here}) writes there; checkpoints need a folder that all hosts share\n"
    )
    alone = run_on_ranks(2, train_apart, [*line, "--no_save"], tmp_path)
    assert [status for status, _ in alone] == [0, 0]
    assert not list((tmp_path / "run").glob(".shared.*"))


def read_differently() -> list[str]:
    """What ranks raise of which one alone fails to read."""
    said = []
    with distributed_session(timeout_s=20.0) as session:
        for failing in ([1], [0, 1]):

            def read(failing: list[int] = failing) -> None:
                if session.rank in failing:
                    raise ConfigError("torn")

            try:
                session.together(read)
            except ConfigError as error:
                said.append(f"own: {error}")
            except ValueError as error:
                said.append(str(error))
        check_same({"alike": "1"}, session)
    return said


def test_what_one_rank_meets_is_raised_on_all_with_its_number() -> None:
    assert run_on_ranks(2, read_differently) == [["rank 1: torn", "own: torn"]] * 2
