"""scripts/precompute_prompts.py: what a store holds, equal however it was made."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.encoders.text import TextEncoder
from model.families.registry import open_model
from model.families.tiny_world import TinyWorld
from scripts import precompute_prompts
from tests.commands import own_logging, refusal
from tests.ranks import RankFailedError, run_on_ranks
from tests.runs import write_config
from utils.data import lmdb_files
from utils.data.embeddings import EmbeddingManifest, EmbeddingReader
from utils.data.shards import ShardWriter, shard_paths
from utils.records import MANIFEST, read_manifest

__all__ = ["own_logging"]

NEGATIVE = "\u8272\u8c03\u8273\u4e3d, blurry"
CAPTIONS = [*(f"a red circle moves right {n} times" for n in range(20)), "a blue ring &amp; more"]
SHOWN = [CAPTIONS[3], "a green bar", "not shown"]
LONG = " ".join(["a red circle"] * 1000)  # 3 000 words; this model reads 12 tokens
GROUP = 2


class World:
    """A run's configuration and prompts, and the command line that they make."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.config = write_config(folder, root, "dmd")
        self.model = root / "wan_models" / "Wan2.1-T2V-Tiny"
        self.captions, self.shown = folder / "captions.txt", folder / "shown.txt"
        lines = [*CAPTIONS, CAPTIONS[0], CAPTIONS[0]]
        self.captions.write_text("\n".join(lines), encoding="utf-8")
        self.shown.write_text("\n".join(SHOWN), encoding="utf-8")

    def words(self, output: Path, *more: str) -> list[str]:
        return [
            "--config_path", str(self.config), "--output_path", str(output),
            f"data.path={self.captions}", f"data.negative_prompt='{NEGATIVE}'",
            f"validation.prompts={self.shown}", "validation.count=2", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> World:
    return World(tmp_path_factory.mktemp("run"), tiny_root)


def precompute(line: list[str]) -> int:
    """The command, writing often."""
    with patch.object(precompute_prompts, "GROUP", GROUP):
        return precompute_prompts.main(line)


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, unbroken."""
    folder = tmp_path_factory.mktemp("made") / "embeddings"
    assert precompute(world.words(folder)) == 0
    return folder


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the text encoder is loaded."""
    monkeypatch.setattr(
        TinyWorld, "load_text_encoder", lambda *_: pytest.fail("the encoder was loaded")
    )


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a store, by file."""
    files = [(folder / MANIFEST), *(path / "data.mdb" for path in shard_paths(folder))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def states(folder: Path) -> dict[str, Tensor]:
    """What a store holds of every prompt."""
    with EmbeddingReader(folder) as reader:
        return {prompt: reader([prompt])[0] for prompt in reader.prompts()}


def assert_same_states(left: Path, right: Path) -> None:
    """The same prompts with the same bits."""
    one, other = states(left), states(right)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[p].view(torch.uint8), other[p].view(torch.uint8)) for p in one)


# ---- what it holds


def test_a_store_holds_each_prompt_of_a_run(made: Path) -> None:
    assert sorted(states(made)) == sorted({*CAPTIONS, *SHOWN[:2], NEGATIVE})


@pytest.mark.parametrize(
    ("precision", "dtype"), [("false", torch.float32), ("true", torch.bfloat16)]
)
def test_states_are_those_of_the_encoder_that_training_would_load(
    precision: str, dtype: torch.dtype, world: World, tmp_path: Path
) -> None:
    assert precompute(world.words(tmp_path, f"mixed_precision={precision}")) == 0
    encoder = open_model(world.model).load_text_encoder(dtype)
    stored = states(tmp_path)
    assert all(rows.dtype == dtype for rows in stored.values())
    assert all(torch.equal(rows, encoder([prompt])[0]) for prompt, rows in stored.items())


def test_the_manifest_tells_what_they_depend_on(world: World, made: Path) -> None:
    manifest = read_manifest(made, EmbeddingManifest)
    assert manifest is not None
    assert (manifest.text_len, manifest.text_dim, manifest.dtype) == (12, 64, "float32")
    weights = (world.model / "models_t5_umt5-xxl-enc-bf16.pth").read_bytes()
    assert manifest.encoder == hashlib.sha256(weights).hexdigest()


def test_the_last_line_counts(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "long.txt"
    more.write_text(f"{LONG}\n{CAPTIONS[5]}\n", encoding="utf-8")
    store = tmp_path / "store"
    assert precompute(world.words(store, "--prompt_path", str(more))) == 0
    lines = capsys.readouterr().err.splitlines()
    # 23 captions, 2 shown, the negative prompt and 2 more, of which 2, 1 and 1 are known.
    assert lines[-1].endswith(
        f": 28 prompts, 4 of them duplicates; 0 were in {store}, 24 are added "
        "by all processes together, of which 1 were cut, by 2989 tokens in all"
    )
    assert any("prompt of 3001 tokens cut to the 12 that this model reads" in x for x in lines)


def test_captions_come_from_shards_as_well_and_may_be_empty(world: World, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data" / "a") as writer:
        writer.append(["", "two\nlines", "a red circle", "a red circle"])
    line = world.words(tmp_path / "store", f"data.path={tmp_path / 'data'}")
    assert precompute([*line, "validation.prompts=null"]) == 0
    assert sorted(states(tmp_path / "store")) == sorted(
        ["", "two\nlines", "a red circle", NEGATIVE]
    )


def test_an_empty_negative_prompt_is_stored(world: World, tmp_path: Path) -> None:
    assert precompute(world.words(tmp_path, "data.negative_prompt=''")) == 0
    assert "" in states(tmp_path)


def test_the_store_of_the_configuration_is_the_default(world: World, tmp_path: Path) -> None:
    line = [word for word in world.words(tmp_path) if word not in ("--output_path", str(tmp_path))]
    assert precompute([*line, f"data.text_embeddings={tmp_path / 'named'}"]) == 0
    assert len(states(tmp_path / "named")) == 23


# ---- however it was made


@pytest.mark.usefixtures("no_encoder")
def test_a_second_call_loads_no_encoder_and_changes_nothing(world: World, made: Path) -> None:
    before = content(made)
    assert precompute(world.words(made)) == 0
    assert content(made) == before


def test_prompts_are_added_to_what_is_there(world: World, made: Path, tmp_path: Path) -> None:
    store = shutil.copytree(made, tmp_path / "store")
    (tmp_path / "file.txt").write_text(f"{LONG}\nfrom a file\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("from a\nfolder\n", encoding="utf-8")
    more = [word for name in ("file.txt", "folder") for word in ("--prompt_path", tmp_path / name)]
    encoded, encode = [], precompute_prompts.encode

    def counted(encoder: TextEncoder, prompt: str) -> Tensor:
        encoded.append(prompt)
        return encode(encoder, prompt)

    with patch.object(precompute_prompts, "encode", counted):
        assert precompute(world.words(store, *map(str, more))) == 0
    assert sorted(encoded) == sorted([LONG, "from a file", "from a\nfolder"])
    assert states(store).keys() == states(made).keys() | set(encoded)


def test_two_processes_make_what_one_makes_byte_for_byte(
    world: World, made: Path, tmp_path: Path
) -> None:
    assert run_on_ranks(2, precompute, world.words(tmp_path / "two")) == [0, 0]
    assert content(tmp_path / "two") == content(made)


@pytest.mark.parametrize("prompts", [0, 1, 2, 11])
def test_an_interrupted_call_ends_with_130_and_goes_on_to_the_same_states(
    prompts: int, world: World, made: Path, tmp_path: Path
) -> None:
    encode, left = precompute_prompts.encode, [prompts]

    def interrupted(*arguments: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(*arguments)

    with patch.object(precompute_prompts, "encode", interrupted):
        assert precompute(world.words(tmp_path)) == 130
    assert len(states(tmp_path)) <= prompts
    assert precompute(world.words(tmp_path)) == 0
    assert_same_states(tmp_path, made)


def test_a_full_disk_is_told_in_a_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(precompute_prompts.EmbeddingWriter, "put", side_effect=full):
        assert precompute(world.words(tmp_path)) == 2
    assert "error: no space left on device; make room" in capsys.readouterr().err


def killed_while_it_writes(line: list[str], writes: int) -> int:
    """The command in a process that is killed within a write, after some are done."""
    put, left = lmdb_files._put, [writes]

    def last(env: Any, records: Any) -> bool:
        left[0] -= 1
        if left[0] < 0:
            with env.begin(write=True) as transaction:
                for key, value in records.items():
                    transaction.put(key, value)
                    os.kill(os.getpid(), signal.SIGKILL)
        return put(env, records)

    with patch.object(lmdb_files, "_put", last):
        return precompute(line)


def test_a_killed_process_loses_nothing_that_it_wrote(
    world: World, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError) as caught:
        run_on_ranks(1, killed_while_it_writes, world.words(tmp_path), 6)
    assert caught.value.exitcode == -signal.SIGKILL
    kept = len(states(tmp_path))
    assert 6 <= kept < len(states(made))
    print(f"kept {kept} of {len(states(made))} prompts")
    assert precompute(world.words(tmp_path)) == 0
    assert_same_states(tmp_path, made)


# ---- bad input


@pytest.mark.usefixtures("no_encoder")
def test_a_store_of_another_dtype_is_refused_and_left_alone(
    world: World, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(made)
    message = refusal_after_log(world.words(made, "mixed_precision=true"), capsys)
    assert message == (
        f"--output_path {made}: holds text embeddings of other settings "
        "(dtype was float32, is bfloat16); use another folder"
    )
    assert content(made) == before


@pytest.mark.usefixtures("no_encoder")
def test_a_store_of_another_model_is_refused_naming_both(
    world: World, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(world.model, tmp_path / "other")
    weights = model / "models_t5_umt5-xxl-enc-bf16.pth"
    weights.write_bytes(weights.read_bytes() + b"x")
    sizes = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(sizes | {"text_len": 16}), encoding="utf-8")
    (model / "google" / "umt5-xxl" / "more.json").write_text("{}", encoding="utf-8")
    message = refusal_after_log(world.words(made, f"generator.model={model}"), capsys)
    was = read_manifest(made, EmbeddingManifest)
    assert was is not None
    now = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert message.startswith(
        f"--output_path {made}: holds text embeddings of other settings (text_len was 12, is 16; "
        f"encoder was {was.encoder}, is {now}; tokenizer was {was.tokenizer}, is "
    )


def refusal_after_log(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says about a store that does not suit, without its log."""
    with patch.object(precompute_prompts.log, "info"):
        return refusal(precompute_prompts.main, words, capsys)


@pytest.mark.usefixtures("no_encoder")
def test_a_store_that_was_cut_off_is_refused(
    world: World, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(made, tmp_path / "store")
    path = next(store.glob("*/data.mdb"))
    path.write_bytes(path.read_bytes()[:-4096])
    message = refusal_after_log(world.words(store), capsys)
    assert message.startswith(f"{path.parent}: cut off, data.mdb has ")


@pytest.mark.usefixtures("no_encoder")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("generator.model=nowhere",), "model 'nowhere': no folder "),
        (("data.path=nowhere",), "nowhere: no such data; give a .txt file"),
        (("--prompt_path", "nowhere"), "nowhere: no such data; give a .txt file"),
        (("validation.prompts=nowhere",), "nowhere: no such prompt file"),
    ],
)
def test_a_bad_argument_gives_one_line_and_no_folder(
    more: tuple[str, ...],
    message: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = world.words(tmp_path / "store", *more)
    assert refusal(precompute_prompts.main, words, capsys).startswith(message)
    assert not (tmp_path / "store").exists()
