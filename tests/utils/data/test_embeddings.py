"""Stores of text states: the same bits come back, each prompt once, and damage is said."""

from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import asdict
from pathlib import Path

import lmdb
import pytest
import torch
from torch import Tensor

from model.conditioning import ConditioningEncoder
from model.families.registry import open_model
from utils.cli import fail
from utils.config import ConfigError
from utils.data import embeddings as module
from utils.data.embeddings import (
    SHARDS,
    EmbeddingManifest,
    EmbeddingReader,
    EmbeddingWriter,
    by_shard,
    check_embeddings,
)
from utils.records import MANIFEST, read_manifest

LENGTH, WIDTH = 5, 6  # [L, D] of the made-up states
DTYPES = [torch.float32, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
PROMPTS = [
    "a red circle",
    "",
    "Gr\u00fc\u00dfe \u4f60\u597d \U0001f600",
    "two\nlines",
    " spaces  kept ",
]
LONG = " ".join(f"word{i} red circle" for i in range(1000))  # 3 000 words


def write_manifest(folder: Path, manifest: EmbeddingManifest) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)), encoding="utf-8")


def states(prompt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows [L, D], as many as the prompt has words and one more; zeros after them."""
    rng = torch.Generator().manual_seed(len(prompt))
    rows = torch.randn(LENGTH, WIDTH, generator=rng).to(dtype)
    rows[len(prompt.split()) + 1 :] = 0
    return rows


def store(folder: Path, values: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Add to a store, or begin one."""
    length, width = next(iter(values.values())).shape
    name = str(dtype).removeprefix("torch.")
    write_manifest(folder, EmbeddingManifest(length, width, name, "encoder", "tokenizer"))
    for shard, prompts in by_shard(list(values)).items():
        with EmbeddingWriter(folder / shard) as writer:
            writer.put({prompt: values[prompt] for prompt in prompts})
    return folder


def small(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A store of PROMPTS."""
    return store(folder, {prompt: states(prompt, dtype) for prompt in PROMPTS}, dtype)


def record(folder: Path, prompt: str, kind: str) -> bytes:
    """A record as it lies in its shard; kind: 'p' or 's'."""
    (name,) = by_shard([prompt])
    digest = hashlib.sha256(prompt.encode()).digest()
    with lmdb.open(str(folder / name), readonly=True, lock=False) as env, env.begin() as rows:
        return bytes(rows.get(kind.encode() + digest))


# ---- what comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path, dtype)) as reader:
        read = reader(PROMPTS)
        assert (reader.text_len, reader.text_dim, reader.dtype) == (LENGTH, WIDTH, dtype)
    expected = torch.stack([states(prompt, dtype) for prompt in PROMPTS])
    assert read.dtype == dtype
    assert torch.equal(read.view(BITS[dtype]), expected.view(BITS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_what_the_text_encoder_gives(
    dtype: torch.dtype, tiny_root: Path, tmp_path: Path
) -> None:
    encoder = open_model(tiny_root / "wan_models/Wan2.1-T2V-Tiny").load_text_encoder(dtype)
    prompts = [*PROMPTS, LONG]
    expected = {prompt: encoder([prompt]) for prompt in prompts}
    store(tmp_path, {prompt: rows[0] for prompt, rows in expected.items()}, dtype)
    with EmbeddingReader(tmp_path) as reader:
        for prompt in prompts:
            read, rows = reader([prompt]), expected[prompt]
            assert torch.equal(read, rows)
            there = read.ne(0)  # past the end the encoder's zeros have signs, which say nothing
            assert torch.equal(read.view(BITS[dtype])[there], rows.view(BITS[dtype])[there])


def test_a_conditioning_encoder_takes_a_reader_for_an_encoder(tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path)) as reader:
        encoder = ConditioningEncoder(reader, negative_prompt="", device=torch.device("cpu"))
        text = encoder.encode(["two\nlines", "a red circle"]).text
    assert torch.equal(text, torch.stack([states("two\nlines"), states("a red circle")]))


def test_a_batch_is_in_the_order_of_its_prompts_and_may_repeat_them(tmp_path: Path) -> None:
    prompts = [PROMPTS[3], PROMPTS[0], PROMPTS[3]]
    with EmbeddingReader(small(tmp_path)) as reader:
        assert torch.equal(reader(prompts), torch.stack([states(prompt) for prompt in prompts]))


def test_zeros_within_a_prompt_and_what_is_no_number_are_kept(tmp_path: Path) -> None:
    rows = torch.zeros(LENGTH, WIDTH)
    rows[2, 1], rows[3, 0] = torch.inf, torch.nan
    with EmbeddingReader(store(tmp_path, {"x": rows})) as reader:
        assert torch.equal(reader(["x"])[0].view(torch.int32), rows.view(torch.int32))


def test_states_that_are_all_zero_come_back(tmp_path: Path) -> None:
    with EmbeddingReader(store(tmp_path, {"x": torch.zeros(LENGTH, WIDTH)})) as reader:
        assert reader.missing(["x"]) == []
        assert torch.equal(reader(["x"]), torch.zeros(1, LENGTH, WIDTH))


# ---- how they lie on disk


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_only_the_rows_of_the_prompt_take_space(
    dtype: torch.dtype, size: int, tmp_path: Path
) -> None:
    small(tmp_path, dtype)
    assert len(record(tmp_path, "two\nlines", "s")) == 3 * WIDTH * size
    assert record(tmp_path, PROMPTS[2], "p") == PROMPTS[2].encode()


def test_a_hash_tells_the_shard_of_a_prompt(tmp_path: Path) -> None:
    assert by_shard(["a red circle", "", "a red circle"]) == {
        f"shard_{hashlib.sha256(b'a red circle').digest()[0] % 64:02d}": ["a red circle"] * 2,
        f"shard_{0xE3 % 64}": [""],  # SHA-256 of nothing begins with e3
    }
    assert len(by_shard([str(i) for i in range(2000)])) == SHARDS == 64


def test_stored_prompts_can_be_listed(tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path)) as reader:
        assert sorted(reader.prompts()) == sorted(PROMPTS)


def test_a_store_grows_past_its_first_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.data.lmdb_files.FIRST_MAP_BYTES", 64 * 1024)
    large = {str(i): torch.full((16, 1024), float(i + 1)) for i in range(12)}  # 64 KiB each
    with EmbeddingReader(store(tmp_path, large)) as reader:
        assert torch.equal(reader(list(large)), torch.stack(list(large.values())))


def test_prompts_are_added_to_a_store(tmp_path: Path) -> None:
    small(tmp_path)
    more = {str(i): states(str(i)) for i in range(100)}
    with EmbeddingReader(store(tmp_path, more)) as reader:
        assert reader.missing([*PROMPTS, *more]) == []
        assert torch.equal(reader(PROMPTS), torch.stack([states(prompt) for prompt in PROMPTS]))


# ---- what is not there


def test_missing_prompts_are_told_once_and_in_their_order(tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path)) as reader:
        asked = ["z", PROMPTS[0], "b", "z", "a red  circle", "", "b"]
        assert reader.missing(asked) == ["z", "b", "a red  circle"]


def test_an_empty_store_misses_everything(tmp_path: Path) -> None:
    write_manifest(tmp_path, EmbeddingManifest(LENGTH, WIDTH, "float32", "e", "t"))
    with EmbeddingReader(tmp_path) as reader:
        assert reader.missing(["a", ""]) == ["a", ""]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a blue ring\nmoves", "'a blue ring moves'"),
        (LONG, "'word0 red circle word1 red circle word2 red circle word3 red...'"),
    ],
)
def test_a_prompt_that_is_not_stored_is_named_with_the_command_that_adds_it(
    prompt: str, shown: str, tmp_path: Path
) -> None:
    with EmbeddingReader(small(tmp_path)) as reader, pytest.raises(ValueError) as caught:
        reader([PROMPTS[0], prompt])
    assert str(caught.value) == (
        f"{tmp_path}: holds no states of the prompt {shown}; add it with "
        f"scripts/precompute_prompts.py --config_path <config> --output_path {tmp_path} "
        "(--prompt_path takes prompts beside the run's own)"
    )


def test_two_prompts_of_one_hash_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_hash", lambda _: bytes(32))
    message = "holds another prompt under the hash of 'second': 'first'"
    with EmbeddingReader(store(tmp_path, {"first": states("first")})) as reader:
        with pytest.raises(ValueError, match=message):
            reader.missing(["second"])
        with pytest.raises(ValueError, match=message):
            reader(["second"])


# ---- the check before a run


def test_a_store_with_all_that_a_run_needs_passes(tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path)) as reader:
        check_embeddings(reader, PROMPTS, text_len=LENGTH, text_dim=WIDTH, dtype=torch.float32)


def test_a_check_counts_what_is_missing_and_names_the_first(tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path)) as reader, pytest.raises(ConfigError) as caught:
        prompts = ["", "new", "two\nlines", "newer", "new"]
        check_embeddings(reader, prompts, text_len=LENGTH, text_dim=WIDTH, dtype=torch.float32)
    assert str(caught.value) == (
        f"data.text_embeddings: {tmp_path} lacks 2 of this run's 4 prompts, the first of them "
        "'new'; add them with scripts/precompute_prompts.py --config_path <config> "
        f"--output_path {tmp_path}"
    )


def test_a_check_names_what_else_differs(tmp_path: Path) -> None:
    with EmbeddingReader(small(tmp_path)) as reader, pytest.raises(ConfigError) as caught:
        check_embeddings(reader, PROMPTS, text_len=512, text_dim=WIDTH, dtype=torch.bfloat16)
    assert str(caught.value) == (
        f"data.text_embeddings: {tmp_path} was made with text_len {LENGTH}, here 512; dtype "
        "torch.float32, here torch.bfloat16; make another folder with "
        "scripts/precompute_prompts.py --config_path <config> --output_path <folder>"
    )


# ---- damage


def test_a_folder_without_a_store_is_not_found(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, EmbeddingManifest) is None
    with pytest.raises(FileNotFoundError, match=r"no text embeddings; make them with scripts/pre"):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("left", [100, 4096, 20_000, 200_000])
def test_a_shard_that_was_cut_off_is_refused(left: int, tmp_path: Path) -> None:
    store(tmp_path, {"x": torch.ones(64, 1024)})
    (path,) = tmp_path.glob("*/data.mdb")
    path.write_bytes(path.read_bytes()[:left])
    for opens in (lambda: EmbeddingReader(tmp_path), lambda: EmbeddingWriter(path.parent)):
        with pytest.raises(ValueError, match=r"not readable as LMDB|cut off, data\.mdb has"):
            opens()


def test_a_damaged_shard_is_told(tmp_path: Path) -> None:
    for path in small(tmp_path).glob("*/data.mdb"):
        content = path.read_bytes()
        path.write_bytes(content[:8192] + b"\x55" * (len(content) - 8192))  # behind the headers
    with EmbeddingReader(tmp_path) as reader:
        for read in (reader, reader.missing):
            with pytest.raises(ValueError, match=f"{tmp_path}: damaged where '.*' is stored: "):
                read([PROMPTS[0]])


def test_a_full_disk_is_told_and_costs_no_prompt(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EmbeddingWriter(tmp_path / "shard_00") as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # of any file, in bytes
        try:
            with pytest.raises(
                OSError, match=r"shard_00: cannot be written: .*is the disk full\?"
            ) as caught:
                writer.put({"a": torch.ones(2**10, 2**8)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fail(caught.value) == 2  # a line, and no traceback
    small(tmp_path)
    with EmbeddingReader(tmp_path) as reader:
        assert sorted(reader.prompts()) == sorted(PROMPTS)


def test_a_shard_that_was_killed_before_it_began_counts_for_nothing(tmp_path: Path) -> None:
    small(tmp_path)
    (name,) = by_shard(["another"])
    (tmp_path / name).mkdir()
    (tmp_path / name / "data.mdb").touch()
    with EmbeddingReader(tmp_path) as reader:
        assert reader.missing(["another", ""]) == ["another"]
    with EmbeddingReader(store(tmp_path, {"another": states("another")})) as reader:
        assert reader.missing(["another", ""]) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"text_len": 5}', '{"unknown": 1}'])
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json: not a manifest of text embeddings"):
        EmbeddingReader(tmp_path)


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of format 0, this version reads 1; make a new store"):
        EmbeddingReader(tmp_path)
