"""JSON files that are read back as what was written, or named if they cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from utils.config import ConfigError
from utils.records import read_manifest, read_mapping, read_records, read_rows


@dataclass(frozen=True)
class Basket:
    DESCRIBES: ClassVar[str] = "fruit"

    count: int
    names: list[str]
    weight_kg: float = 1.0


def test_a_manifest_is_read_as_its_dataclass(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, Basket) is None
    (tmp_path / "manifest.json").write_text('{"count": 2, "names": ["a", "b"], "weight_kg": 3}')
    assert read_manifest(tmp_path, Basket) == Basket(2, ["a", "b"], 3)


@dataclass(frozen=True)
class Choice:
    DESCRIBES: ClassVar[str] = "choices"

    kind: Literal["large", "small"]
    limit: float | None = None
    side: Literal["left", "right"] | None = None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"kind": "large", "limit": 2, "side": null}', Choice("large", 2)),
        ('{"kind": "small", "side": "left"}', Choice("small", None, "left")),
        ('{"kind": "medium"}', "'kind' is 'medium'"),
        ('{"kind": "small", "limit": "2"}', "'limit' is '2'"),
        ('{"kind": "small", "side": "up"}', "'side' is 'up'"),
    ],
)
def test_a_field_may_be_one_of_several_values_or_nothing(
    text: str, found: Choice | str, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    if isinstance(found, Choice):
        assert read_manifest(tmp_path, Choice) == found
    else:
        with pytest.raises(ConfigError, match=found):
            read_manifest(tmp_path, Choice)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "Expecting property name"),
        ("[" * 100000, "maximum recursion depth"),
        ("[]", "holds a list, not a dict"),
        ('{"count": "2", "names": []}', "'count' is '2'"),
        ('{"count": 2, "names": ["a", 3]}', "'names' is ['a', 3]"),
        ('{"count": 2}', "missing 1 required positional argument: 'names'"),
        ('{"count": 2, "names": [], "colour": 1}', "got an unexpected keyword argument 'colour'"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_fault(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_manifest(tmp_path, Basket)
    assert str(caught.value).startswith(
        f"{tmp_path}/manifest.json: not a manifest of fruit: {fault}"
    )


def test_rows_are_mappings_and_records_are_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert read_rows(path, "rows") == read_records(path, Basket, "baskets") == []
    path.write_text('[{"count": 2, "names": []}]')
    assert read_rows(path, "rows") == [{"count": 2, "names": []}]
    assert read_records(path, Basket, "baskets") == [Basket(2, [])]


@pytest.mark.parametrize("text", ["[{", "{}", "[3]", '"text"'])
def test_damaged_rows_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ConfigError, match=r"rows.json: not rows: "):
        read_rows(tmp_path / "rows.json", "rows")


def test_a_list_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"a.json: not timings: holds a list, not a dict"):
        read_mapping(tmp_path / "a.json", "timings")
