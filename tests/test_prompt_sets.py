"""The prompts that are shipped: as many, as long and as varied as prompts/README.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from utils.data.prompts import PromptItem, read_image_prompts, read_prompts, with_extended
from utils.media.given_frames import picture_size

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
SETS = {"tiny.txt": 6, "showcase.txt": 24, "short.txt": 24, "extended.txt": 24, "training": 48}


def every_text() -> list[str]:
    items = [item for name in SETS for item in read_prompts(PROMPTS / name)]
    return [item.text for item in [*items, *read_image_prompts(PROMPTS / "i2v")]]


@pytest.mark.parametrize(("name", "count"), SETS.items())
def test_a_set_has_the_size_that_its_table_tells(name: str, count: int) -> None:
    assert len(read_prompts(PROMPTS / name)) == count
    table = (PROMPTS / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"`{name}/?`.*\b{count}\b", table)


def test_no_prompt_is_shipped_twice() -> None:
    texts = every_text()
    assert len(set(texts)) == len(texts)


def test_extended_prompts_are_60_to_120_words_about_subject_motion_camera_and_light() -> None:
    pairs = with_extended(
        read_prompts(PROMPTS / "short.txt"), PROMPTS / "extended.txt", PROMPTS / "short.txt"
    )
    counts = [len(pair.text.split()) for pair in pairs]
    print(f"words of extended prompts: {min(counts)} to {max(counts)}")
    assert min(counts) >= 60 and max(counts) <= 120
    assert all(len(pair.title.split()) < 12 for pair in pairs)
    for pair in pairs:
        assert related(pair), pair.title
        assert re.search(r"camera|view", pair.text), pair.title
        assert re.search(r"light|lit|sun|glow|lamp", pair.text, re.IGNORECASE), pair.title


def related(pair: PromptItem) -> bool:
    """Whether a pair's texts share a word that says something."""
    stems = {word[:4] for word in pair.title.lower().split() if len(word) > 3}
    return any(word[:4] in stems for word in re.findall(r"[a-z]+", pair.text.lower()))


def test_training_captions_are_long_enough_for_the_usual_filter_and_of_all_subjects() -> None:
    items = read_prompts(PROMPTS / "training")
    lengths = [len(item.text) for item in items]
    print(f"characters of training captions: {min(lengths)} to {max(lengths)}")
    assert min(lengths) >= 300
    assert {item.name.rpartition("_")[0] for item in items} == {
        "people", "animals", "nature", "city", "sport", "food", "machines", "abstract",
    }  # fmt: skip


def test_images_are_small_of_three_shapes_and_described_with_motion() -> None:
    items = read_image_prompts(PROMPTS / "i2v")
    sizes = [picture_size(item.image) for item in items if item.image is not None]
    assert sorted(sizes) == [(480, 832), (480, 832), (480, 832), (640, 640), (832, 480)]
    for item in items:
        assert item.image is not None
        assert item.image.path.stat().st_size < 60_000, item.name
        assert len(item.text.split()) >= 30, item.name
