"""LMDB files as plain bytes: what LMDB wrote is read, and no damage is more than an error."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from tests.commands import ROOT
from utils.data.lmdb_reading import DamagedRecordError, LmdbReader
from utils.errors import UserError


def written(folder: Path, *transactions: Mapping[bytes, bytes | None]) -> Path:
    """An LMDB; None = the key is removed again."""
    with lmdb.open(str(folder), map_size=2**28) as env:
        for records in transactions:
            with env.begin(write=True) as transaction:
                for key, value in records.items():
                    if value is None:
                        transaction.delete(key)
                    else:
                        transaction.put(key, value)
    return folder


def some(count: int, seed: int = 0, largest: int = 9000) -> dict[bytes, bytes]:
    """Random keys of 1 to 500 bytes with values that lie in their page, or in up to three more."""
    rng = random.Random(seed)
    return {
        rng.randbytes(rng.randint(1, rng.choice([8, 500]))): rng.randbytes(
            rng.randint(0, rng.choice([10, 2000, largest]))
        )
        for _ in range(count)
    }


@pytest.mark.parametrize("count", [0, 1, 2, 50, 3000])
def test_all_that_lmdb_wrote_is_read_and_nothing_else(count: int, tmp_path: Path) -> None:
    records = some(count)
    reader = LmdbReader(written(tmp_path, records))
    assert all(reader.get(key) == value and reader.has(key) for key, value in records.items())
    others = some(200, seed=1).keys() - records.keys()
    assert not any(reader.has(key) or reader.get(key) is not None for key in others)
    assert dict(reader.items(b"")) == records
    assert [key for key, _ in reader.items(b"")] == sorted(records)


def test_keys_that_begin_alike_are_listed(tmp_path: Path) -> None:
    records = {f"{kind}{i}".encode(): bytes(i) for kind in "aps" for i in range(2000)}
    reader = LmdbReader(written(tmp_path, records))
    for prefix in (b"a", b"p", b"p19", b"s1999", b"t", b""):
        assert dict(reader.items(prefix)) == {
            key: value for key, value in records.items() if key.startswith(prefix)
        }


def test_the_latest_transaction_counts(tmp_path: Path) -> None:
    first, second = some(300), some(300, seed=1)
    gone: dict[bytes, bytes | None] = dict.fromkeys(list(first)[:200])
    reader = LmdbReader(written(tmp_path, first, second, gone))
    assert dict(reader.items(b"")) == {k: v for k, v in (first | second).items() if k not in gone}


def test_threads_read_at_once(tmp_path: Path) -> None:
    records = some(2000)
    reader = LmdbReader(written(tmp_path, records))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.get, records)) == list(records.values())


def test_a_closed_reader_gives_its_descriptor_back(tmp_path: Path) -> None:
    written(tmp_path, some(3))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        LmdbReader(tmp_path)
    readers = [LmdbReader(tmp_path) for _ in range(50)]
    for reader in readers:
        reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


# ---- damage


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_and_what_is_left_is_read(
    tmp_path: Path,
) -> None:
    records = {f"{i:04}".encode(): bytes([i % 256]) * 5000 for i in range(200)}
    path = written(tmp_path, records) / "data.mdb"
    whole = path.stat().st_size
    for left in (0.75, 0.25, 0.0):
        reader = LmdbReader(tmp_path)
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(int(left * whole))
        found, lost = 0, 0
        for key, value in records.items():
            try:
                assert reader.get(key) == value
                found += 1
            except DamagedRecordError as error:
                lost += 1
                said = f"{tmp_path}: '{key.decode()}' is not readable: cut off, data.mdb has "
                assert str(error).startswith(said)
        assert lost and found + lost == len(records)
        path.write_bytes(content)


MAPPED = """
import sys, lmdb
env = lmdb.open(sys.argv[1], readonly=True, lock=False)
open(sys.argv[1] + "/data.mdb", "r+b").truncate(8192)
with env.begin() as transaction:
    for key, value in transaction.cursor():
        pass
"""


def test_lmdb_itself_would_die_there(tmp_path: Path) -> None:
    """Otherwise the reader would not be needed."""
    written(tmp_path, some(500))
    done = subprocess.run([sys.executable, "-c", MAPPED, tmp_path], cwd=ROOT, check=False)
    assert done.returncode < 0


@pytest.mark.parametrize("seed", range(4))
def test_no_byte_that_is_changed_is_more_than_an_error(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    records = some(60, largest=6000)
    path = written(tmp_path, records) / "data.mdb"
    whole, told = path.read_bytes(), 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8, 64])):
            page = rng.randrange(len(content) // 4096)  # where pages begin, they are structure
            content[page * 4096 + rng.randrange(rng.choice([64, 4096]))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            reader = LmdbReader(tmp_path)
            dict(reader.items(b""))
        except UserError:
            told += 1
            continue
        for key in records:
            try:
                reader.get(key)
            except DamagedRecordError:
                told += 1
    assert told > 20


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = LmdbReader(written(tmp_path, {b"key": b"value"}))

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(DamagedRecordError, match="'key' is not readable: Input/output error"):
        reader.get(b"key")


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (16, 0, "it has no meta page"),
        (20, 9, "of version 9, this one reads 1"),
        (40, 1, "pages of 4097 bytes"),
        (10, 0, "it has no meta page"),
    ],
)
def test_a_header_that_is_none_is_told(at: int, value: int, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, {b"key": b"value"}) / "data.mdb"
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}: not readable as LMDB: {said}$"):
        LmdbReader(tmp_path)
