"""LMDB files through plain reads: whatever happens to a file, reading it is an error, no signal.

LMDB itself maps files into memory, where a file that is cut off and a disk that fails end the
process (SIGBUS), and it follows what damaged pages say to anywhere. Here each page is read as bytes
and checked. The layout is LMDB's of version 1: two meta pages, of which the later counts, and a
tree of pages whose nodes are sorted by key; a value that fits no page has pages of its own.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from utils.errors import UserError

MAGIC, VERSION = 0xBEEFC0DE, 1
EMPTY = 2**64 - 1  # the root of a tree without pages
BRANCH, LEAF, OVERFLOW, META = 0x01, 0x02, 0x04, 0x08  # kinds of pages
BIG = 0x01  # of a node: its value has pages of its own
DEEPEST = 32  # levels of a tree, as LMDB has it
CACHED = 512  # pages in memory
HEADER = struct.Struct("<QHHHH")  # number, unused, kind, where free space begins and ends
COUNT = struct.Struct("<12xI")  # in the same place: how many pages a value has
BEGIN = struct.Struct("<IIQQ")  # of a meta page: magic, version, address, map size
TREE = struct.Struct("<IHHQQQQQ")  # page size (of the first tree), flags, depth, ..., root
END = struct.Struct("<QQ")  # last page, number of the transaction
NODE = struct.Struct("<HHHH")  # size or page (low, high), flags or page, size of the key


class DamagedRecordError(UserError):
    """A record that cannot be what was written."""


class FaultError(UserError):
    """What is wrong with some bytes; who knows the file and the key names them."""


@dataclass(frozen=True)
class _Meta:
    page_bytes: int
    root: int
    last_page: int
    transaction: int


@dataclass(frozen=True, eq=False)
class _Page:
    """Nodes, sorted by key."""

    content: bytes
    leaf: bool
    count: int

    def node(self, index: int) -> tuple[int, int, int, bytes, int]:
        """Low and high part, flags, key, and where the value begins."""
        (at,) = struct.unpack_from("<H", self.content, HEADER.size + 2 * index)
        low, high, flags, size = NODE.unpack_from(self.content, at)
        begin = at + NODE.size
        if begin + size > len(self.content):
            raise FaultError(f"node {index} leaves its page")
        return low, high, flags, self.content[begin : begin + size], begin + size

    def child(self, index: int) -> int:
        """The page below a node of a branch."""
        low, high, flags, _, _ = self.node(index)
        return low | high << 16 | flags << 32

    def first_not_below(self, key: bytes) -> int:
        """The first node of a leaf whose key is not smaller."""
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            if self.node(middle)[3] < key:
                low = middle + 1
            else:
                high = middle
        return low

    def towards(self, key: bytes) -> int:
        """The node of a branch below which a key lies; the first one's key is never looked at."""
        low, high = 1, self.count
        while low < high:
            middle = (low + high) // 2
            if self.node(middle)[3] <= key:
                low = middle + 1
            else:
                high = middle
        return low - 1


class LmdbReader:
    """What an LMDB holds, as it was when it was opened. Threads may share it.

    Raises UserError that names the folder if it is no LMDB or cut off; later DamagedRecordError.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._fd = os.open(folder / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
        self._closing = weakref.finalize(self, os.close, self._fd)
        try:
            self._meta = self._newest_meta()
        except (ValueError, struct.error) as error:
            self.close()
            raise UserError(f"{folder}: not readable as LMDB: {error}") from error
        size = os.fstat(self._fd).st_size
        whole = (self._meta.last_page + 1) * self._meta.page_bytes
        if size < whole:
            self.close()
            raise UserError(
                f"{folder}: cut off, data.mdb has {size} of {whole} bytes; copy it again"
            )
        self._page = lru_cache(CACHED)(self._read_page)

    def close(self) -> None:
        """Let go of the file."""
        self._closing()

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None. Raises DamagedRecordError."""
        try:
            page = self._leaf(key)
            index = 0 if page is None else page.first_not_below(key)
            if page is None or index == page.count or page.node(index)[3] != key:
                return None
            return self._value(page, index)
        except (OSError, ValueError, struct.error) as error:
            raise self._damaged(key, error) from error

    def has(self, key: bytes) -> bool:
        """Whether there is such a key; its value is not read. Raises DamagedRecordError."""
        try:
            page = self._leaf(key)
            index = 0 if page is None else page.first_not_below(key)
            return page is not None and index < page.count and page.node(index)[3] == key
        except (OSError, ValueError, struct.error) as error:
            raise self._damaged(key, error) from error

    def items(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys that begin alike, and their values, in order. Raises DamagedRecordError."""
        try:
            for key, page, index in self._from(self._meta.root, prefix, set()):
                if not key.startswith(prefix):
                    return
                yield key, self._value(page, index)
        except (OSError, ValueError, struct.error) as error:
            raise self._damaged(prefix, error) from error

    def _damaged(self, key: bytes, error: Exception) -> DamagedRecordError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        name = key.decode() if key.isascii() and key.decode().isprintable() else key.hex()[:16]
        return DamagedRecordError(f"{self.path}: '{name}' is not readable: {reason}")

    def _newest_meta(self) -> _Meta:
        first = self._read_meta(0)
        second = self._read_meta(first.page_bytes)
        return max(first, second, key=lambda meta: meta.transaction)

    def _read_meta(self, offset: int) -> _Meta:
        size = HEADER.size + BEGIN.size + 2 * TREE.size + END.size
        content = self._bytes(offset, size)
        kind = HEADER.unpack_from(content)[2]
        magic, version, *_ = BEGIN.unpack_from(content, HEADER.size)
        at = HEADER.size + BEGIN.size
        page_bytes, root = (
            TREE.unpack_from(content, at)[0],
            TREE.unpack_from(content, at + TREE.size)[-1],
        )
        last_page, transaction = END.unpack_from(content, at + 2 * TREE.size)
        if not kind & META or magic != MAGIC:
            raise FaultError("it has no meta page")
        if version != VERSION:
            raise FaultError(f"of version {version}, this one reads {VERSION}")
        if page_bytes < 256 or page_bytes > 2**16 or page_bytes & (page_bytes - 1):
            raise FaultError(f"pages of {page_bytes} bytes")
        return _Meta(page_bytes, root, last_page, transaction)

    def _leaf(self, key: bytes) -> _Page | None:
        """The leaf that a key would be on; None if there is nothing at all."""
        number = self._meta.root
        if number == EMPTY:
            return None
        for _ in range(DEEPEST):
            page = self._page(number)
            if page.leaf:
                return page
            number = page.child(page.towards(key))
        raise FaultError(f"deeper than {DEEPEST} levels")

    def _from(self, number: int, key: bytes, seen: set[int]) -> Iterator[tuple[bytes, _Page, int]]:
        """Keys from `key` on below a page, and where they are. seen: pages that were passed."""
        if number == EMPTY:
            return
        if number in seen or len(seen) > self._meta.last_page:
            raise FaultError(f"page {number} is met twice")
        seen.add(number)
        page = self._page(number)
        if page.leaf:
            for index in range(page.first_not_below(key), page.count):
                yield page.node(index)[3], page, index
        else:
            for index in range(page.towards(key), page.count):
                yield from self._from(page.child(index), key, seen)

    def _value(self, page: _Page, index: int) -> bytes:
        low, high, flags, _, begin = page.node(index)
        size = low | high << 16
        if flags & ~BIG:
            raise FaultError(f"a value of kind {flags}")
        if not flags:
            if begin + size > len(page.content):
                raise FaultError("a value that leaves its page")
            return page.content[begin : begin + size]
        (number,) = struct.unpack_from("<Q", page.content, begin)
        header = self._page_bytes(number, HEADER.size)
        pages = COUNT.unpack_from(header)[0]
        if not HEADER.unpack_from(header)[2] & OVERFLOW or not (
            HEADER.size + size <= pages * self._meta.page_bytes
        ):
            raise FaultError(f"page {number} does not hold its {size} bytes")
        return self._bytes(number * self._meta.page_bytes + HEADER.size, size)

    def _read_page(self, number: int) -> _Page:
        content = self._page_bytes(number, self._meta.page_bytes)
        _, _, kind, lower, _ = HEADER.unpack_from(content)
        count = (lower - HEADER.size) // 2
        if kind & (BRANCH | LEAF) not in (BRANCH, LEAF) or lower < HEADER.size:
            raise FaultError(f"page {number} holds no nodes")
        if lower > len(content) or (not count and kind & BRANCH):
            raise FaultError(f"page {number} holds {count} nodes")
        return _Page(content, bool(kind & LEAF), count)

    def _page_bytes(self, number: int, size: int) -> bytes:
        """The beginning of a page, which tells its own number."""
        if number > self._meta.last_page:
            raise FaultError(f"page {number} of {self._meta.last_page + 1}")
        content = self._bytes(number * self._meta.page_bytes, size)
        if HEADER.unpack_from(content)[0] != number:
            raise FaultError(f"page {number} is another one")
        return content

    def _bytes(self, offset: int, size: int) -> bytes:
        """So many bytes of the file, or FaultError where it ends before them."""
        content = os.pread(self._fd, size, offset)
        if len(content) < size:
            there = os.fstat(self._fd).st_size
            raise FaultError(f"cut off, data.mdb has {there} of at least {offset + size} bytes")
        return content
