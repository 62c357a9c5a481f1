"""Prompts from lists, folders, tables and pairs: all are found, or an error says what is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.data.prompts import (
    Picture,
    PromptItem,
    merged,
    read_image_prompts,
    read_prompts,
    with_extended,
)

VBENCH = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a bird", "dimension": ["object_class", "color"], "auxiliary_info": {"x": 1}},
]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def draw(path: Path, size: tuple[int, int] = (8, 12)) -> Path:
    """An image file of `size`, height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(path)
    return path


def texts(items: list[PromptItem]) -> list[str]:
    return [item.text for item in items]


# ---- lists and folders


def test_a_list_gives_one_prompt_per_line_named_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "MovieGenVideoBench.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a \u732b \n".encode())
    assert read_prompts(path) == [PromptItem("a cat", "a cat"), PromptItem("a \u732b", "a \u732b")]


def test_a_folder_gives_one_prompt_per_file_with_its_name(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "a dog\non two lines\n")
    write(tmp_path / "a.txt", "a cat")
    write(tmp_path / "c.txt", " \n")
    items = read_prompts(tmp_path)
    assert [(item.name, item.text) for item in items] == [
        ("a", "a cat"),
        ("b", "a dog\non two lines"),
    ]


def test_a_prompt_of_3000_words_is_one_prompt(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(3000))
    assert texts(read_prompts(write(tmp_path / "p.txt", f"{words}\nshort"))) == [words, "short"]
    assert texts(read_prompts(write(tmp_path / "p.csv", f"prompt\n{words}\n"))) == [words]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder of prompts"):
        read_prompts(tmp_path / "absent")


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv"])
def test_a_file_that_is_not_utf8_is_named_with_the_byte(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"p{suffix}: not UTF-8 at byte 3; save it as UTF-8"):
        read_prompts(path)


# ---- tables


def test_the_full_info_of_vbench_gives_prompts_and_dimensions(tmp_path: Path) -> None:
    items = read_prompts(write(tmp_path / "VBench_full_info.json", VBENCH))
    assert [(item.title, item.dimensions) for item in items] == [
        ("In a still frame, a stop sign", ("temporal_flickering",)),
        ("a bird", ("object_class", "color")),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", ["a cat", "a dog"]),
        ("p.json", [{"prompt": "a cat"}, {"caption": "a dog"}]),
        ("p.jsonl", '{"text": "a cat"}\n\n"a dog"\n'),
        ("p.csv", 'id,prompt\n1,a cat\n2,"a dog"\n'),
        ("p.TSV", "prompt\tid\na cat\t1\na dog\t2\n"),
    ],
)
def test_tables_of_any_kind_give_their_prompts(name: str, content: Any, tmp_path: Path) -> None:
    assert texts(read_prompts(write(tmp_path / name, content))) == ["a cat", "a dog"]


def test_a_quoted_cell_may_hold_commas_and_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'prompt,dimension\n"a cat,\nasleep",color\n')
    (item,) = read_prompts(path)
    assert (item.text, item.dimensions) == ("a cat,\nasleep", ("color",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.json",
            [{"words": "a cat", "id": 1}],
            "entry 1 has no prompt; its keys are ['id', 'words'], a prompt is looked for under "
            "prompt_en, prompt, caption, text",
        ),
        (
            "p.json",
            {"prompts": ["a cat"]},
            "holds a mapping of ['prompts'], expected a list of prompts, or of mappings with one "
            "of prompt_en, prompt, caption, text",
        ),
        ("p.json", [["a cat"]], "entry 1 is neither a text nor a mapping: ['a cat']"),
        ("p.json", ["a cat", " "], "entry 2: 'prompt' must be a text, got ' '"),
        ("p.json", [{"prompt": 3}], "entry 1: 'prompt' must be a text, got 3"),
        ("p.json", '["a \\ud83d"]', "entry 1: 'prompt' has half a character at 2: 'a \\ud83d'"),
        ("p.json", [{"prompt": "a cat", "dimension": 3}], "entry 1: 'dimension' is no list, but 3"),
        ("p.json", [], "holds no prompt"),
        ("p.json", "[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        ("p.json", "a cat", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("p.jsonl", '"a cat"\na dog', "line 2 is not JSON: Expecting value: line 1 column 1"),
        ("p.csv", "", "holds no prompt"),
        ("p.csv", "id,words\n1,a cat\n", "entry 1 has no prompt; its keys are ['id', 'words']"),
        ("p.csv", f"prompt\n{'a' * 200_000}\n", "not readable as a table: field larger than"),
    ],
)
def test_a_table_without_prompts_says_what_it_holds(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}: {message}")


# ---- extended prompts


def test_extended_prompts_condition_and_short_ones_name(tmp_path: Path) -> None:
    short, longer = tmp_path / "short.txt", write(tmp_path / "long.txt", "a long cat\na long dog\n")
    items = with_extended([PromptItem("cat", "cat"), PromptItem("dog", "dog")], longer, short)
    assert [(item.title, item.text) for item in items] == [
        ("cat", "a long cat"),
        ("dog", "a long dog"),
    ]


def test_extended_prompts_of_a_folder_go_by_file_name(tmp_path: Path) -> None:
    for name in ("b", "a", "more"):
        write(tmp_path / "long" / f"{name}.txt", f"a long {name}")
    items = [PromptItem("cat", "cat", "a"), PromptItem("dog", "dog", "b")]
    made = with_extended(items, tmp_path / "long", tmp_path / "short")
    assert [(item.title, item.text) for item in made] == [("cat", "a long a"), ("dog", "a long b")]


def test_extended_prompts_that_do_not_match_are_refused(tmp_path: Path) -> None:
    items = [PromptItem("cat", "cat", "a"), PromptItem("dog", "dog", "b")]
    one = write(tmp_path / "one.txt", "a long cat\n\n")
    with pytest.raises(ValueError, match=r"one.txt has 1 prompts, p.txt has 2; they must match"):
        with_extended(items, one, Path("p.txt"))
    write(tmp_path / "long" / "a.txt", "a long cat")
    write(tmp_path / "long" / "b.txt", " ")
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 files of short, or has them empty: b$"):
        with_extended(items, tmp_path / "long", Path("short"))


# ---- pairs


def test_pairs_are_images_and_texts_of_one_stem_in_the_order_of_names(tmp_path: Path) -> None:
    boat, cat = draw(tmp_path / "boat.JPG"), draw(tmp_path / "a.cat.png")
    last = draw(tmp_path / "boat_last.png")
    write(tmp_path / "boat.txt", "a boat sails\n")
    write(tmp_path / "a.cat.txt", "a cat looks up")
    write(tmp_path / "README.md", "not a prompt")
    assert read_image_prompts(tmp_path) == [
        PromptItem("a cat looks up", "a cat looks up", "a.cat", Picture(cat)),
        PromptItem("a boat sails", "a boat sails", "boat", Picture(boat), Picture(last)),
    ]


def test_an_image_whose_own_name_ends_like_a_last_one_may_have_a_text(tmp_path: Path) -> None:
    for stem in ("the", "the_last"):
        draw(tmp_path / f"{stem}.png")
        write(tmp_path / f"{stem}.txt", stem)
    items = read_image_prompts(tmp_path)
    assert [(item.text, len(item.pictures)) for item in items] == [("the", 1), ("the_last", 1)]


def test_all_that_has_no_partner_is_listed_at_once(tmp_path: Path) -> None:
    for stem in ("alone", "lost_last", "pair", "blank"):
        draw(tmp_path / f"{stem}.png")
    for stem, text in {"pair": "a pair", "gone": "a text", "blank": " \n"}.items():
        write(tmp_path / f"{stem}.txt", text)
    with pytest.raises(ValueError) as caught:
        read_image_prompts(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: not all are pairs of an image and a text: 2 images without a .txt (alone, "
        "lost_last); 1 texts without an image (gone); 1 empty texts (blank)"
    )


def test_two_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.jpg and a.png would share one text; keep one"):
        read_image_prompts(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images \(.bmp, "):
        read_image_prompts(tmp_path)
    with pytest.raises(FileNotFoundError, match="no image prompts here; give a folder of images"):
        read_image_prompts(tmp_path / "absent")


def test_images_are_named_by_their_prompts_only_if_told(tmp_path: Path) -> None:
    path = draw(tmp_path / "a bird on a branch.jpg")
    (item,) = read_image_prompts(tmp_path, named_by_prompt=True)
    assert (item.title, item.image) == ("a bird on a branch", Picture(path))
    with pytest.raises(ValueError, match=r"1 images without a \.txt"):
        read_image_prompts(tmp_path)


def test_a_table_names_images_that_lie_beside_it(tmp_path: Path) -> None:
    bird = draw(tmp_path / "bird.jpg")
    text = "a bird, zooms in"
    row = {"prompt_en": text, "image_name": "bird.jpg", "dimension": ["camera_motion"]}
    path = write(tmp_path / "info.json", [row])
    assert read_image_prompts(path) == [
        PromptItem(text, text, "bird", Picture(bird), dimensions=("camera_motion",))
    ]
    bird.unlink()
    with pytest.raises(ValueError, match=r"1 of its 1 images are missing: .*bird.jpg"):
        read_image_prompts(path)


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "info.json", VBENCH)
    with pytest.raises(ValueError, match="names no images; it needs a column image_name or image"):
        read_image_prompts(path)


# ---- crop lists


def crop_list(folder: Path, **entry: object) -> Path:
    """A folder with one image of 20 x 30 and a list of one entry."""
    draw(folder / "16-9" / "bird.jpg", (20, 30))
    row = {"file_name": "bird.jpg", "caption": "a bird", "type": "animal", **entry}
    write(folder / "target_crop_info_16-9.json", [row])
    return folder


def test_a_crop_list_gives_captions_images_and_boxes(tmp_path: Path) -> None:
    crop = {"target_bbox": [2, 1, 18, 10], "target_ratio": "16-9"}
    folder = crop_list(tmp_path, origin_width=30, origin_height=20, target_crop=crop)
    picture = Picture(tmp_path / "16-9" / "bird.jpg", (2, 1, 18, 10), (20, 30))
    assert read_image_prompts(folder) == [PromptItem("a bird", "a bird", "bird", picture)]


def test_a_crop_list_may_leave_images_whole(tmp_path: Path) -> None:
    (item,) = read_image_prompts(crop_list(tmp_path))
    assert item.image == Picture(tmp_path / "16-9" / "bird.jpg")


@pytest.mark.parametrize("box", [[5, 1, 2, 10], [0, 0, 4], [0, 0, 4, math.inf], "all", None])
def test_a_box_that_holds_nothing_is_refused(box: object, tmp_path: Path) -> None:
    folder = crop_list(tmp_path, target_crop={"target_bbox": box})
    with pytest.raises(ValueError, match=r"entry 1: target_crop must hold target_bbox: \[left,"):
        read_image_prompts(folder)


def test_a_size_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = crop_list(tmp_path, origin_width="wide", origin_height=20)
    message = r"entry 1: origin_height and origin_width must be whole numbers, got \[20, 'wide'\]"
    with pytest.raises(ValueError, match=message):
        read_image_prompts(folder)


def test_a_crop_list_whose_image_is_missing_is_refused(tmp_path: Path) -> None:
    folder = crop_list(tmp_path, file_name="fish.jpg")
    with pytest.raises(ValueError, match=r"1 of its 1 images are missing: .*16-9/fish.jpg"):
        read_image_prompts(folder)


def test_two_crop_lists_are_one_too_many(tmp_path: Path) -> None:
    folder = crop_list(tmp_path)
    write(folder / "target_crop_info_1-1.json", [])
    with pytest.raises(ValueError, match="holds 2 crop lists"):
        read_image_prompts(folder)


# ---- one item per title


def test_a_prompt_that_is_listed_twice_is_made_once_for_all_its_dimensions() -> None:
    items = [
        PromptItem("a cat", "a cat", dimensions=("color",)),
        PromptItem("a dog", "a dog"),
        PromptItem("a cat", "a cat", dimensions=("scene", "color")),
    ]
    assert merged(items) == [
        PromptItem("a cat", "a cat", dimensions=("color", "scene")),
        PromptItem("a dog", "a dog"),
    ]


def test_one_title_for_two_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="two prompts of the same words would share files: 'cat'"):
        merged([PromptItem("one cat", "cat"), PromptItem("other cat", "cat")])
