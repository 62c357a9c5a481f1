"""Prompts and latents from files, and the order in which a run takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.dataset import DataOrder, open_dataset, read_prompt_file, read_prompt_folder


def test_a_prompt_file_holds_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\n")
    data = open_dataset(path)
    assert [data[i].prompt for i in range(len(data))] == ["a cat", "a dog"]


def test_prompts_alone_carry_no_latents(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\n")
    data = open_dataset(path)
    assert data.latent_shape is None
    assert data[0].latents is None


def test_blank_lines_and_outer_spaces_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n  a cat \r\n\n \t\na dog")
    assert read_prompt_file(path) == ["a cat", "a dog"]


def test_only_line_feeds_and_carriage_returns_end_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("one\u2028prompt\x0chere\r\ntwo\rthree".encode())
    assert read_prompt_file(path) == ["one\u2028prompt\x0chere", "two", "three"]


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\n")
    assert read_prompt_file(path) == ["a cat"]


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        open_dataset(path)
    assert str(caught.value) == f"{path}: holds no prompt; write one per line"


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"a caf\xe9\n")
    with pytest.raises(ValueError) as caught:
        open_dataset(path)
    assert str(caught.value) == f"{path}: not UTF-8 at byte 5; save it as UTF-8"


def test_a_missing_prompt_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        read_prompt_file(tmp_path / "p.txt")


def test_missing_data_tells_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_dataset(tmp_path / "absent")
    assert str(caught.value) == (
        f"{tmp_path}/absent: no such data; give a .txt file with one prompt per line, a folder of "
        ".txt files with one prompt each, or a folder of LMDB shards"
    )


def test_a_prompt_folder_holds_one_prompt_per_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a dog\non two lines\n")
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "readme.md").write_text("not a prompt\n")
    data = open_dataset(tmp_path)
    assert [data[i].prompt for i in range(len(data))] == ["a cat", "a dog\non two lines"]


def test_empty_files_of_a_prompt_folder_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("a dog")
    assert read_prompt_folder(tmp_path) == ["a dog"]


def test_a_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no prompt: 1 .txt files, all empty"):
        open_dataset(tmp_path)


def test_shards_give_captions_with_latents(tiny_root: Path) -> None:
    data = open_dataset(tiny_root / "data" / "tiny" / "latents")
    item = data[63]
    assert (len(data), data.latent_shape) == (64, (16, 5, 4, 4))
    assert item.latents is not None
    assert item.latents.dtype == torch.float32
    assert item.prompt.startswith("a ")


def test_each_epoch_is_a_permutation_of_all_records() -> None:
    order = DataOrder(7, seed=1)
    for epoch in range(3):
        assert sorted(order[epoch * 7 + i] for i in range(7)) == list(range(7))


def test_epochs_differ_in_their_order() -> None:
    order = DataOrder(50, seed=1)
    assert [order[i] for i in range(50)] != [order[50 + i] for i in range(50)]


def test_the_order_depends_on_nothing_but_the_seed() -> None:
    first, second = DataOrder(9, seed=3), DataOrder(9, seed=3)
    backwards = [second[i] for i in reversed(range(45))]
    assert [first[i] for i in range(45)] == backwards[::-1]


def test_another_seed_gives_another_order() -> None:
    first, second = DataOrder(50, seed=3), DataOrder(50, seed=4)
    assert [first[i] for i in range(50)] != [second[i] for i in range(50)]
