"""Students trained whole and as adapters, compared in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import compare_adapters


def row(rank: int, both: float) -> dict[str, float]:
    figures = {"rank": rank, "both": both, "adherence": 1.0, "validity": both, "diversity": 0.2}
    return {**figures, "seconds_per_step": 0.5, "checkpoint_mib": 2.0, "peak_mib": 600.0}


def test_the_table_has_a_line_per_rank_with_means_and_the_worst_seed() -> None:
    rows = [row(0, 0.9), row(8, 0.8), row(0, 0.7), row(8, 0.6)]
    _, _, whole, adapter = compare_adapters.table(rows).splitlines()
    assert whole.startswith("| all weights | 0.800 | 1.000 | 0.700 |")
    assert adapter.startswith("| rank 8 | 0.700 | 0.875 | 0.600 |")


def test_without_a_teacher_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run_folder", str(tmp_path / "none"), "--output_folder", str(tmp_path / "out")]
    assert compare_adapters.main(words) != 0
    assert "whole-seed0: stopped with status 2; run this again" in capsys.readouterr().err


@pytest.mark.slow
def test_students_are_trained_and_measured_once(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "quickstart"
    run.mkdir()
    (run / "wan_models").symlink_to(tiny_root / "wan_models")
    (run / "data").symlink_to(tiny_root / "data" / "tiny")
    out = tmp_path / "out"
    words = ["--run_folder", str(run), "--output_folder", str(out), "--ranks", "2"]
    words += ["--seeds", "0", "--clips", "4", "--steps", "2"]
    assert compare_adapters.main(words) == 0
    rows = json.loads((out / "rows.json").read_text(encoding="utf-8"))
    assert [found["rank"] for found in rows] == [compare_adapters.WHOLE, 2]
    assert rows[1]["checkpoint_mib"] < 0.5 * rows[0]["checkpoint_mib"]
    assert (out / "table.md").read_text(encoding="utf-8") in capsys.readouterr().out
    before = (out / "rows.json").stat().st_mtime_ns
    assert compare_adapters.main(words) == 0
    assert (out / "rows.json").stat().st_mtime_ns == before
