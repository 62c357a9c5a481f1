"""The mesh of ranks belongs to a run: its process groups are made once, for all networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import built
from utils.parallel import build_mesh


def test_all_networks_share_one_mesh(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def noting(*args: Any) -> Any:
        made.append(build_mesh(*args))
        return made[-1]

    monkeypatch.setattr("trainer.build.build_mesh", noting)
    bf16 = "mixed_precision=true"  # which has even a single process shard its networks
    with built(configs["dmd_gan"], tmp_path / "run", bf16) as trainer:
        assert len(made) == 1
        for role in ("generator", "critic"):
            for weight in trainer.roles[role].network.parameters():
                assert weight.device_mesh == made[0]  # type: ignore[attr-defined]
