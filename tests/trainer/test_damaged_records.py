"""Records that cannot be read are replaced, counted and told; they end no run, up to a limit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

from tests.ranks import run_on_ranks
from tests.runs import built, rows, run
from trainer.base import Trainer
from trainer.batches import Skipped
from trainer.damage import DamagedDataError, DamageLog
from utils.data.dataset import DataOrder
from utils.distributed import Session
from utils.errors import UserError

SHORT = ("steps=4", "batch_size=4", "seed=3")


@pytest.fixture
def data(tiny_root: Path, tmp_path: Path) -> Path:
    """Latents that a test may harm."""
    return Path(shutil.copytree(tiny_root / "data" / "tiny" / "latents", tmp_path / "data"))


def at(data: Path, *more: str) -> tuple[str, ...]:
    return (*SHORT, f"data.path={data}", *more)


def drawn(draw: int) -> int:
    """The record of a draw."""
    return DataOrder([range(64)], 4, seed=3)[draw]


def harm(data: Path, *records: int, part: str = "latents", value: bytes | None = b"torn") -> None:
    """Let a part of some records hold what it cannot, or nothing."""
    (shard,) = (path.parent for path in data.rglob("data.mdb"))
    with lmdb.open(str(shard), map_size=2**30, lock=False) as env, env.begin(write=True) as change:
        for record in records:
            key = f"{part}_{record}_data".encode()
            if value is None:
                change.delete(key)
            else:
                change.put(key, value)


def told(logdir: Path) -> list[dict[str, Any]]:
    text = (logdir / "damaged.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def not_finite() -> bytes:
    return torch.full((16 * 5 * 4 * 4,), torch.inf, dtype=torch.float16).numpy().tobytes()


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("latents", b"torn", "'latents_{n}_data' has 4 bytes, expected "),
        ("latents", None, "record {n} has no 'latents_{n}_data'"),
        ("latents", not_finite(), "record {n}: its latents hold values that are not finite"),
        ("prompts", b"\xff\xfe", "'prompts_{n}_data' is not UTF-8 at byte 0"),
    ],
)
def test_a_damaged_record_is_replaced_told_and_counted(
    part: str, value: bytes | None, reason: str, data: Path, configs: dict[str, Path],
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bad = drawn(5)
    harm(data, bad, part=part, value=value)
    with caplog.at_level(logging.WARNING, logger="trainer.damage"):
        run(configs["diffusion"], tmp_path / "run", *at(data))
    (line,) = told(tmp_path / "run")
    assert (line["step"], line["draw"], line["record"]) == (2, 5, bad)
    assert line["replacement"] != bad
    assert reason.format(n=bad) in line["reason"]
    said = f"record {bad} is damaged and was replaced by record {line['replacement']}: "
    lines = [record.message for record in caplog.records if record.name == "trainer.damage"]
    assert [said in line for line in lines] == [True]
    counted = [row.get("data/damaged") for row in rows(tmp_path / "run")]
    assert counted == [None, 1.0, 1.0, 1.0]


def test_whole_data_says_nothing(data: Path, configs: dict[str, Path], tmp_path: Path) -> None:
    run(configs["diffusion"], tmp_path / "run", *at(data))
    assert not (tmp_path / "run" / "damaged.jsonl").exists()
    assert not any("data/damaged" in row for row in rows(tmp_path / "run"))


def test_a_resumed_run_replaces_and_counts_as_one_that_was_never_stopped(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    harm(data, drawn(1), drawn(9), drawn(14))
    run(configs["diffusion"], tmp_path / "straight", *at(data))
    words = at(data, "save_every=2")
    with built(configs["diffusion"], tmp_path / "resumed", *words) as trainer:
        stop_in_step_4(trainer)
    with (tmp_path / "resumed" / "damaged.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"step": 2, "rec')
    run(configs["diffusion"], tmp_path / "resumed", *words)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert told(tmp_path / "resumed") == told(tmp_path / "straight")
    assert [line["record"] for line in told(tmp_path / "straight")] == [
        drawn(1), drawn(9), drawn(14),
    ]  # fmt: skip


def stop_in_step_4(trainer: Trainer) -> None:
    """As a kill would, after the fourth step was trained and before it is saved."""

    log = trainer.log_metrics

    def stop() -> None:
        log()
        if trainer.state.step == 4:
            raise KeyboardInterrupt

    trainer.log_metrics = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_too_many_damaged_records_stop_a_run_with_a_line(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    harm(data, drawn(1), drawn(9))
    with pytest.raises(UserError) as caught:
        run(configs["diffusion"], tmp_path / "run", *at(data, "data.max_damaged=1"))
    text = str(caught.value)
    assert text.startswith(
        "step 3: 2 records of the data are damaged, more than data.max_damaged=1: "
    )
    assert f"'latents_{drawn(9)}_data' has 4 bytes" in text
    assert text.endswith("mend the data, or raise data.max_damaged and start again")
    assert len(text.splitlines()) == 1
    del caught
    run(configs["diffusion"], tmp_path / "run", *at(data, "data.max_damaged=2"))
    run(configs["diffusion"], tmp_path / "straight", *at(data))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_limit_below_zero_is_refused(configs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_damaged: must be at least 0, got -1"):
        run(configs["dmd"], tmp_path, "data.max_damaged=-1")


def test_data_of_which_nothing_is_left_is_told(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    harm(data, *range(64))
    with pytest.raises(
        UserError, match=r"no record could be read in place of record \d+, \d+ were"
    ):
        run(configs["diffusion"], tmp_path / "run", *at(data))


def test_a_shard_that_is_cut_off_while_a_run_reads_it_is_lines_and_no_dead_process(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    (path,) = data.rglob("data.mdb")
    with built(configs["diffusion"], tmp_path / "run", *at(data)) as trainer:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 3)
        trainer.train()
    lines = told(tmp_path / "run")
    assert lines
    assert all("is not readable: cut off, data.mdb has " in line["reason"] for line in lines)


def test_a_shard_that_is_removed_while_a_run_reads_it_is_read_on(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs["diffusion"], tmp_path / "kept", *at(data))
    with built(configs["diffusion"], tmp_path / "run", *at(data)) as trainer:
        shutil.rmtree(data)
        trainer.train()
    assert rows(tmp_path / "run") == rows(tmp_path / "kept")


# ---- several ranks


def losses_on_rank(config: Path, logdir: Path, words: Sequence[str]) -> None:
    run(config, logdir, *words)


def test_what_one_rank_cannot_read_changes_nothing_for_the_other(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    harm(data, drawn(3), drawn(10))  # of the second rank, and of the second as well
    run_on_ranks(2, losses_on_rank, configs["diffusion"], tmp_path / "two", at(data))
    run(configs["diffusion"], tmp_path / "one", *at(data))
    assert told(tmp_path / "two") == told(tmp_path / "one")
    for two, one in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def refused_on_rank(config: Path, logdir: Path, words: Sequence[str]) -> str:
    with pytest.raises(UserError) as caught:
        run(config, logdir, *words)
    return str(caught.value)


def test_every_rank_stops_in_the_same_step_where_too_much_is_damaged(
    data: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    harm(data, drawn(3), drawn(8))  # one of each rank
    words = at(data, "data.max_damaged=1")
    first, second = run_on_ranks(2, refused_on_rank, configs["diffusion"], tmp_path / "run", words)
    assert first == second
    assert first.startswith("step 3: 2 records of the data are damaged, more than ")


class Group(Session):
    """Two ranks of one group, of which the other has skipped something else."""

    def gather(self, value: list[Skipped]) -> list[list[Skipped]]:  # type: ignore[override]
        return [value, [Skipped(0, 1, 2, "torn")]]


def test_ranks_that_share_a_sample_must_skip_alike(tmp_path: Path) -> None:
    session = Group(0, 2, torch.device("cpu"), group=2)
    log = DamageLog(session, tmp_path, 10)
    log.share(1, [Skipped(0, 1, 2, "torn in other words")])
    with pytest.raises(DamagedDataError, match="ranks 0 to 1 share their samples, but records"):
        log.share(1, [])


def test_a_log_that_cannot_be_written_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = DamageLog(Session(0, 1, torch.device("cpu")), tmp_path / "gone", 10)
    with caplog.at_level(logging.WARNING, logger="trainer.damage"):
        log.share(1, [Skipped(0, 1, 2, "torn")])
    assert caplog.messages[1] == f"{tmp_path}/gone/damaged.jsonl: No such file or directory"
    assert log.values() == {"data/damaged": 1.0}


# ---- the start


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="trainer.fingerprint"):
        yield caplog


def test_damage_that_is_there_at_the_start_is_told_and_ends_nothing(
    data: Path, configs: dict[str, Path], tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    harm(data, 0, part="prompts", value=b"\xff")
    harm(data, 63)
    shown = ("validation.every=2", "validation.count=1")
    run(configs["diffusion"], tmp_path / "run", *at(data, *shown))
    said = [line for line in quiet.messages if line.startswith("data.path: ")]
    assert said[0] == "data.path: the captions of 1 records are damaged: 0; training skips them"
    assert said[1].startswith("data.path: record 0 is damaged: ")
    assert said[2].startswith("data.path: record 63 is damaged: ")
