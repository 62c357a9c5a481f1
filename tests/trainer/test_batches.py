"""What is read of records, and reading ahead."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.runs import built, rows, run
from trainer.batches import BatchLoader
from utils.data.dataset import RawItem
from utils.data.shards import Shard

SHORT = ("steps=2", "batch_size=2")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """What shards are asked for, beside captions."""
    found: set[str] = set()
    for name in ("latents", "trajectory", "image"):
        before = getattr(Shard, name)

        def watched(shard: Shard, row: int, *, name: str = name, before: Any = before) -> Any:
            found.add(name)
            return before(shard, row)

        monkeypatch.setattr(Shard, name, watched)
    yield found


@pytest.mark.parametrize(
    ("method", "data", "overrides", "parts"),
    [
        ("dmd", "latents", (), set()),
        ("dmd_gan", "latents", (), {"latents"}),
        ("ode", "ode_pairs", (), {"trajectory"}),
        ("self_forcing_dmd", "latents", ("causal.given_first_frame=true",), {"latents"}),
    ],
)
def test_only_what_a_method_uses_is_read(
    method: str,
    data: str,
    overrides: tuple[str, ...],
    parts: set[str],
    read: set[str],
    configs: dict[str, Path],
    tiny_root: Path,
    tmp_path: Path,
) -> None:
    path = f"data.path={tiny_root / 'data' / 'tiny' / data}"
    with built(configs[method], tmp_path, *SHORT, path, *overrides) as trainer:
        read.clear()  # the fingerprint has looked at samples
        trainer.train()
    assert read == parts


def test_what_is_read_ahead_is_what_is_then_asked_for(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reading ahead changes no number: the same run without it logs the same."""
    settings = ("steps=3", "batch_size=4", "accumulation=2")
    asked: list[tuple[int, ...]] = []
    before = BatchLoader._read

    def watched(loader: BatchLoader, draws: Sequence[int]) -> list[RawItem]:
        asked.append(tuple(draws))
        return before(loader, draws)

    monkeypatch.setattr(BatchLoader, "_read", watched)
    run(configs["dmd_gan"], tmp_path / "ahead", *settings)
    assert len(asked) == len(set(asked))  # nothing is read twice
    monkeypatch.setattr(BatchLoader, "prefetch", lambda *_: None)
    run(configs["dmd_gan"], tmp_path / "alone", *settings)
    assert rows(tmp_path / "ahead") == rows(tmp_path / "alone")


def test_a_damaged_record_that_is_read_ahead_is_told_when_its_turn_comes(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise ValueError("record 7 is damaged")

    with built(configs["dmd_gan"], tmp_path, *SHORT) as trainer:
        monkeypatch.setattr(Shard, "latents", damaged)
        with pytest.raises(ValueError, match="record 7 is damaged"):
            trainer.train()
        del trainer
    assert not (tmp_path / "checkpoints").exists()
    gc.collect()  # the traceback holds the data in a cycle; LMDB opens a folder only once
    monkeypatch.undo()
    run(configs["dmd_gan"], tmp_path, *SHORT)
