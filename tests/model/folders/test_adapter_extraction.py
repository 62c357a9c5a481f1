"""Adapters out of two models: exact where they can be, as good as can be elsewhere, and said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.folders import adapter_extraction
from model.folders.adapter_extraction import Extraction, Wanted, extract
from model.folders.adapter_files import AdapterFile
from model.wan.adapter_names import BLOCK_LAYERS
from tests.adapters import DEEP, layers_of, merged, random_factors
from tests.conftest import build_wan, random_value
from utils.errors import UserError
from utils.seeding import generator
from utils.weights import WeightFile, WeightsError, write_weights

CPU = torch.device("cpu")


def file_of(state: dict[str, Tensor], path: Path) -> WeightFile:
    write_weights(state, path, {})
    return WeightFile(path)


def base_of(tmp_path: Path) -> WeightFile:
    return file_of(dict(build_wan(DEEP).state_dict()), tmp_path / "base.safetensors")


def extracted(
    tmp_path: Path, student: dict[str, Tensor], wanted: Wanted, layout: str = "diffusers"
) -> Extraction:
    weights = file_of(student, tmp_path / "student.safetensors")
    return extract(weights, base_of(tmp_path), wanted, device=CPU, layout=layout)


def worst(student: dict[str, Tensor], adapter: AdapterFile) -> float:
    """The largest relative error of base + adapter, over the student's weights."""
    found = merged(build_wan(DEEP).state_dict(), adapter)
    errors = [(found[name] - value).norm() / value.norm() for name, value in student.items()]
    return float(max(errors))


def moved(scale: float = 0.1, *, everything: bool = False) -> dict[str, Tensor]:
    """The base with its matrices, or all of it, moved at full rank."""
    layers = layers_of(embeddings=True)
    return {
        name: value + scale * random_value(name, value.shape, seed=9)
        if everything or name.removesuffix(".weight") in layers
        else value
        for name, value in build_wan(DEEP).state_dict().items()
    }


def test_a_change_of_known_rank_is_found_exactly(tmp_path: Path) -> None:
    factors = random_factors(layers_of(embeddings=True), rank=3)
    student = merged(build_wan(DEEP).state_dict(), AdapterFile(factors))
    found = extracted(tmp_path, student, Wanted(rank=3))
    assert worst(student, found.adapter) < 1e-6
    assert found.error < 1e-6
    assert found.share_beside == 0.0
    assert {pair.rank for pair in found.adapter.factors.values()} == {3}


def test_at_full_rank_the_student_comes_back(tmp_path: Path) -> None:
    student = moved()
    assert worst(student, extracted(tmp_path, student, Wanted(rank=64)).adapter) < 1e-6


def test_the_error_is_that_of_the_singular_values_left_out(tmp_path: Path) -> None:
    student, base = moved(), build_wan(DEEP).state_dict()
    found = extracted(tmp_path, student, Wanted(rank=4))
    missed = changed = 0.0
    for layer, loss in found.layers.items():
        d = (student[f"{layer}.weight"] - base[f"{layer}.weight"]).double()
        squares = torch.linalg.svdvals(d).square()
        assert loss.error == pytest.approx(float((squares[4:].sum() / squares.sum()).sqrt()), 1e-4)
        missed, changed = missed + float(squares[4:].sum()), changed + float(squares.sum())
    assert found.error == pytest.approx(math.sqrt(missed / changed), 1e-4)
    assert 0.3 < found.error < 1.0


def test_both_factors_carry_half_of_the_size(tmp_path: Path) -> None:
    found = extracted(tmp_path, moved(), Wanted(rank=4))
    for a, b in found.adapter.factors.values():
        assert torch.allclose(a @ a.T, b.T @ b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.5, 0.1])
def test_an_error_may_be_asked_for_in_place_of_a_rank(bound: float, tmp_path: Path) -> None:
    found = extracted(tmp_path, moved(), Wanted(rank=None, max_error=bound))
    base = build_wan(DEEP).state_dict()
    for layer, loss in found.layers.items():
        assert loss.error <= bound
        d = (moved()[f"{layer}.weight"] - base[f"{layer}.weight"]).double()
        squares = torch.linalg.svdvals(d).square()
        one_less = float((squares[loss.rank - 1 :].sum() / squares.sum()).sqrt())
        assert one_less > bound  # with a rank less it would not do


def test_what_no_adapter_holds_is_counted(tmp_path: Path) -> None:
    student, base = moved(everything=True), build_wan(DEEP).state_dict()
    found = extracted(tmp_path, student, Wanted(rank=4))
    squares = {n: float((student[n] - base[n]).double().square().sum()) for n in base}
    held = {f"{layer}.weight" for layer in layers_of(embeddings=True)}
    beside = sum(value for name, value in squares.items() if name not in held)
    assert found.share_beside == pytest.approx(math.sqrt(beside / sum(squares.values())), 1e-5)
    assert 0.05 < found.share_beside < 0.95


def test_for_kohya_only_blocks_are_held_and_all_of_each(tmp_path: Path) -> None:
    base = build_wan(DEEP).state_dict()
    one = {"blocks.3.ffn.0.weight", "head.head.weight"}
    student = {name: moved()[name] if name in one else value for name, value in base.items()}
    found = extracted(tmp_path, student, Wanted(rank=4), layout="kohya")
    assert sorted(found.adapter.factors) == sorted(
        f"blocks.{i}.{part}" for i in range(12) for part in BLOCK_LAYERS
    )
    assert found.adapter.factors["blocks.0.ffn.0"].rank == 1
    assert found.share_beside > 0.1
    assert worst({"blocks.0.ffn.0.weight": base["blocks.0.ffn.0.weight"]}, found.adapter) == 0.0


# ---- large matrices


def spectrum(rows: int, columns: int) -> Tensor:
    """A matrix whose singular values fall like those of a distillation's change."""
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator(0, "u"))).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator(0, "v"))).Q
    return (u * (1.0 + torch.arange(columns)) ** -0.7) @ v.T


@pytest.mark.parametrize("rank", [8, 32])
def test_a_sketch_is_within_a_thousandth_of_the_best(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = spectrum(400, 300)
    squares = torch.linalg.svdvals(d.double()).square()
    best = float((squares[rank:].sum() / squares.sum()).sqrt())
    monkeypatch.setattr(adapter_extraction, "EXACT_UP_TO", 0)
    u, s, v = adapter_extraction._decomposed(d, Wanted(rank=rank), "layer")
    error = float((d - (u * s) @ v.T).norm() / d.norm())
    print(f"rank {rank}: {error:.6f}, best {best:.6f}")
    assert best <= error + 1e-6 and error < 1.001 * best


def test_a_sketch_finds_a_known_rank_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    d = spectrum(400, 300)[:, :5] @ spectrum(200, 5).T
    monkeypatch.setattr(adapter_extraction, "EXACT_UP_TO", 0)
    u, s, v = adapter_extraction._decomposed(d, Wanted(rank=5), "layer")
    assert float((d - (u * s) @ v.T).norm() / d.norm()) < 1e-6


def test_a_sketch_grows_until_the_error_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    d = spectrum(700, 600)
    monkeypatch.setattr(adapter_extraction, "EXACT_UP_TO", 0)
    exact = int(torch.linalg.svdvals(d).numel())
    wanted = Wanted(rank=None, max_error=0.32)
    u, s, v = adapter_extraction._decomposed(d, wanted, "layer")
    assert adapter_extraction.FIRST_RANK < len(s) < exact // 2
    error = float((d - (u * s) @ v.T).norm() / d.norm())
    assert 0.31 < error <= 0.32 + 1e-4


# ---- what is refused


def test_models_of_different_sizes_are_no_twins(tmp_path: Path) -> None:
    student = {n: v for n, v in build_wan(DEEP).state_dict().items() if "blocks.11" not in n}
    with pytest.raises(WeightsError, match=r"differ in name or shape: blocks\.11\."):
        extracted(tmp_path, student, Wanted())


def test_equal_models_have_nothing_to_extract(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no matrix differs; nothing to extract"):
        extracted(tmp_path, dict(build_wan(DEEP).state_dict()), Wanted())


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (Wanted(rank=4, max_error=0.1), "by its rank or by its error; give one"),
        (Wanted(rank=None), "by its rank or by its error; give one"),
        (Wanted(rank=0), "rank: must be at least 1, got 0"),
        (Wanted(rank=None, max_error=1.0), r"max_error: must lie within \(0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_wanted_is_refused(wanted: Wanted, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        wanted.check()
