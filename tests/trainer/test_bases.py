"""Networks that roles share: which adapters are on in which role, and of what rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.folders.adapter_files import LowRank
from model.folders.adapter_writing import write_adapter
from tests.trainer.test_plan import small_run
from trainer.bases import Base, bases
from trainer.plan_trace import planned
from utils.config import ConfigError
from utils.metering import Meter

RANKS = ("generator.adapter.rank=8", "critic.adapter.rank=4")
LAYER = "blocks.0.self_attn.q"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """An adapter of rank 2 of one layer, as one network has it."""
    path = tmp_path / "style.safetensors"
    write_adapter(path, {LAYER: LowRank(torch.ones(2, 64), torch.ones(64, 2))}, layout="comfyui")
    return path


def base_of(folder: Path, *words: str, planning: bool = False) -> Base:
    run = small_run(folder, "tiny", *RANKS, *words)
    (base,) = bases(planned(run, Meter()) if planning else run)
    return base


def test_adapters_are_on_in_the_roles_that_list_them_and_a_role_s_own_comes_last(
    style: Path, tmp_path: Path
) -> None:
    base = base_of(tmp_path, f"generator.adapters=['{style}']", f"teacher.adapters=['{style}:0.5']")
    assert base.names("generator") == ("added0", "generator")
    assert base.names("critic") == ("critic",)
    assert base.names("teacher") == ("added1",)


def test_an_adapter_of_one_network_is_put_on_the_expert_that_it_is_for(
    style: Path, tmp_path: Path
) -> None:
    base = base_of(tmp_path, f"generator.adapters=['high={style}:0.5']")
    rank_of = base.ranks()["added0"]
    assert rank_of(f"high.{LAYER}") == 2
    assert rank_of(f"low.{LAYER}") is rank_of(LAYER) is None


def test_a_plan_takes_an_adapter_that_is_not_here_to_be_as_those_that_are_trained(
    tmp_path: Path,
) -> None:
    words = ("generator.adapters=['high=nowhere/run']",)
    rank_of = base_of(tmp_path, *words, planning=True).ranks()["added0"]
    assert rank_of(f"high.{LAYER}") == 8
    assert rank_of(f"low.{LAYER}") is None
    with pytest.raises(ValueError, match="nowhere/run"):
        base_of(tmp_path, *words).ranks()


def test_a_plan_without_adapters_that_are_trained_refuses_one_that_is_not_here(
    tmp_path: Path,
) -> None:
    run = planned(small_run(tmp_path, "tiny", "teacher.adapters=['nowhere.safetensors']"), Meter())
    base = next(base for base in bases(run) if base.roles == ("teacher",))
    with pytest.raises(ConfigError, match=r"adapter nowhere.safetensors:1: it is not here"):
        base.ranks()
