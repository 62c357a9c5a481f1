"""Adapters named on command lines, and weights merged with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.folders.adapter_files import AdapterFile, LowRank
from model.folders.adapter_words import AdapterWord, Merged, Rounded, adapter_word, read_adapters
from model.folders.adapter_writing import write_adapter
from tests.adapters import DEEP, layers_of, merged, random_factors
from tests.conftest import build_wan
from tests.runs import unequal
from utils.errors import NotFoundError, UserError
from utils.seeding import generator
from utils.weights import WeightFile, WeightsError, write_weights

Q = "blocks.0.self_attn.q"


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """few.safetensors in the present folder."""
    write_adapter(tmp_path / "few.safetensors", random_factors([Q]))
    monkeypatch.chdir(tmp_path)
    return Path("few.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> WeightFile:
    path = tmp_path / "base.safetensors"
    write_weights(build_wan(DEEP).state_dict(), path, {})
    return WeightFile(path)


# ---- words


@pytest.mark.parametrize(
    ("word", "strength", "expert"),
    [
        ("few.safetensors", 1.0, None),
        ("few.safetensors:0.7", 0.7, None),
        ("few.safetensors:-1", -1.0, None),
        ("high=few.safetensors", 1.0, "high"),
        ("low=few.safetensors:1e-1", 0.1, "low"),
    ],
)
def test_a_word_is_a_path_a_strength_and_an_expert(
    word: str, strength: float, expert: str | None, few: Path
) -> None:
    assert adapter_word(word) == AdapterWord(few, strength, expert)
    assert adapter_word(str(adapter_word(word))) == adapter_word(word)


@pytest.mark.parametrize("name", ["a:0.5", "high=a", "a:b"])
def test_a_path_that_is_there_is_a_path_whatever_its_name(name: str, few: Path) -> None:
    Path(name).mkdir()
    assert adapter_word(name) == AdapterWord(Path(name))
    assert adapter_word(f"{name}:0.5") == AdapterWord(Path(name), 0.5)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("absent.safetensors:0.5", "there is no absent.safetensors; the form is PATH"),
        ("few.safetensors:strong", "there is no few.safetensors:strong; the form is PATH"),
        ("middle=few.safetensors", "there is no middle=few.safetensors; the form is PATH"),
        ("high=:1", "there is no path; the form is PATH"),
        ("few.safetensors:inf", "the strength must be finite"),
        ("", "there is no path"),
    ],
)
def test_a_word_that_names_no_adapter_is_told(word: str, reason: str, few: Path) -> None:
    with pytest.raises(UserError, match=reason):
        adapter_word(word)


def test_a_missing_adapter_is_a_missing_file(few: Path) -> None:
    with pytest.raises(NotFoundError):
        adapter_word("absent")


def test_an_adapter_is_read_with_its_strength_and_expert(few: Path) -> None:
    adapter = adapter_word("low=few.safetensors:0.5").read()
    assert torch.equal(adapter.factors[f"low.{Q}"].b, 0.5 * random_factors([Q])[Q].b)


def test_of_a_folder_of_both_experts_one_may_be_taken(tmp_path: Path) -> None:
    pair = random_factors([Q])[Q]
    write_adapter(tmp_path / "both", {f"high.{Q}": pair, f"low.{Q}": pair})
    write_adapter(tmp_path / "one", {f"high.{Q}": pair})
    assert list(adapter_word(f"low={tmp_path / 'both'}").read().factors) == [f"low.{Q}"]
    with pytest.raises(WeightsError, match="holds no adapter of the low-noise expert"):
        adapter_word(f"low={tmp_path / 'one'}").read()


def test_adapters_are_checked_against_their_base(few: Path, base: WeightFile) -> None:
    found = read_adapters([adapter_word(f"{few}:0.5"), AdapterWord(few)], base, what="the base")
    assert [word.strength for word, _ in found] == [0.5, 1.0]
    write_adapter(Path("other.safetensors"), {"blocks.99.ffn.0": random_factors([Q])[Q]})
    with pytest.raises(WeightsError, match=r"not in the base: blocks\.99\.ffn"):
        read_adapters([AdapterWord(Path("other.safetensors"))], base, what="the base")


# ---- merging


def test_merged_weights_are_the_sum_and_the_rest_stays(base: WeightFile) -> None:
    one = AdapterFile(random_factors(layers_of(embeddings=True), seed=1))
    two = AdapterFile(random_factors([Q], seed=2), {f"{Q}.bias": torch.ones(32)})
    weights = Merged(base, [one, two.scaled(0.7)])
    expected = merged(build_wan(DEEP).state_dict(), one, two.scaled(0.7))
    assert weights.shapes() == base.shapes()
    for name, value in expected.items():
        assert torch.allclose(weights.read(name), value, rtol=0, atol=1e-6), name
        part = weights.read(name, slice(1, 3))
        assert torch.allclose(part, value[1:3], rtol=0, atol=1e-6), name


def test_an_adapter_of_zeros_changes_no_bit(base: WeightFile) -> None:
    factors = {n: LowRank(a, 0.0 * b) for n, (a, b) in random_factors(layers_of()).items()}
    weights = Merged(base, [AdapterFile(factors)])
    found = {name: weights.read(name) for name in base.shapes()}
    assert unequal(found, {name: base.read(name) for name in base.shapes()}) == []


def test_what_nothing_is_added_to_keeps_its_dtype(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    write_weights({n: v.bfloat16() for n, v in build_wan(DEEP).state_dict().items()}, path, {})
    weights = Merged(WeightFile(path), [AdapterFile(random_factors([Q]))])
    assert weights.read(f"{Q}.weight").dtype == torch.float32
    assert weights.read("head.head.weight").dtype == torch.bfloat16


# Measured at width 1536 and rank 64, of a base that is stored in bf16 (docs/lora.md).
@pytest.mark.parametrize(
    ("size", "share"), [(0.1, 0.017), (0.01, 0.17), (0.003, 0.49), (0.001, 0.80)]
)
def test_rounding_to_bf16_loses_most_of_a_small_change(
    size: float, share: float, tmp_path: Path
) -> None:
    draws = generator(0, "bf16")
    stored = torch.randn(1536, 1536, generator=draws).bfloat16()
    a = torch.randn(64, 1536, generator=draws)
    b = torch.randn(1536, 64, generator=draws)
    b *= size * stored.float().norm() / (b @ a).norm()
    write_weights({f"{Q}.weight": stored}, tmp_path / "base.safetensors", {})
    base = WeightFile(tmp_path / "base.safetensors")
    weights = Merged(base, [AdapterFile({Q: LowRank(a, b)})], rounding=torch.bfloat16)
    weights.read(f"{Q}.weight")
    print(f"{100 * size:g} % of the weights: {100 * weights.lost[f'{Q}.weight']:.1f} % lost")
    assert weights.lost[f"{Q}.weight"] == pytest.approx(share, rel=0.2)


def test_nothing_is_lost_in_fp32(base: WeightFile) -> None:
    weights = Merged(base, [AdapterFile(random_factors([Q]))], rounding=torch.float32)
    weights.read(f"{Q}.weight")
    assert weights.lost == {}


def test_rounded_weights_are_what_the_dtype_holds(base: WeightFile) -> None:
    value = base.read("head.head.weight")
    rounded = Rounded(base, torch.bfloat16)
    assert rounded.shapes() == base.shapes()
    assert torch.equal(rounded.read("head.head.weight"), value.bfloat16().float())
