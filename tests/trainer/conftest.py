"""The configuration files that trainer tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import CONFIGS, write_config


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> dict[str, Path]:
    """The config files of tests.runs.CONFIGS."""
    folder = tmp_path_factory.mktemp("configs")
    return {name: write_config(folder, tiny_root, name) for name in CONFIGS}
