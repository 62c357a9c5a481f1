"""Ranks that work apart for as long as each needs, and notice when one of them is gone."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from utils.errors import UserError

# What a rank's key in the store holds: a count that grows while it works, and then one of these.
DONE, STOPPED = "done", "stopped: "
INTERVAL_S = 5.0  # between two signs of life, and between two looks at those of the others


class LostRankError(UserError):
    """Another rank raised, or is gone; the message names it."""


@contextlib.contextmanager
def working(
    store: dist.Store, rank: int, world_size: int, timeout_s: float, barrier: Callable[[], None]
) -> Iterator[None]:
    """Around this rank's share of uneven work; at its end, wait until all ranks are done.

    Collective at both ends. timeout_s: how long a rank may show no life. Raises LostRankError.
    """
    interval_s = min(INTERVAL_S, timeout_s / 10)
    store.set(_key(rank), "0")
    barrier()  # whoever looks finds all keys, and none of an earlier work
    over = threading.Event()
    beat = threading.Thread(target=_show_life, args=(store, rank, interval_s, over), daemon=True)
    beat.start()
    end = DONE
    try:
        yield
    except BaseException as error:
        end = STOPPED + f"{type(error).__name__}: {error}".partition("\n")[0]
        raise
    finally:
        over.set()
        beat.join()
        with contextlib.suppress(dist.DistError):  # without a store nobody waits, or can
            store.set(_key(rank), end)
    _wait(store, world_size, timeout_s, interval_s)
    barrier()


def _key(rank: int) -> str:
    return f"uneven work of rank {rank}"


def _show_life(store: dist.Store, rank: int, interval_s: float, over: threading.Event) -> None:
    for count in itertools.count(1):
        if over.wait(interval_s):
            return
        try:
            store.set(_key(rank), str(count))
        except dist.DistError:  # the ranks that wait will tell
            return


def _wait(store: dist.Store, world_size: int, timeout_s: float, interval_s: float) -> None:
    """Return when all ranks are done."""
    keys = [_key(rank) for rank in range(world_size)]
    last, since = [""] * world_size, [time.monotonic()] * world_size
    while last != [DONE] * world_size:
        try:
            signs = [sign.decode(errors="replace") for sign in store.multi_get(keys)]
        except dist.DistError as error:
            raise LostRankError(
                f"the store that ranks share is gone, and with it rank 0 or torchrun: {error}"
            ) from error
        for rank, sign in enumerate(signs):
            if sign.startswith(STOPPED):
                raise LostRankError(f"rank {rank} {sign}")
            if sign != last[rank]:
                last[rank], since[rank] = sign, time.monotonic()
            elif sign != DONE and time.monotonic() - since[rank] > timeout_s:
                raise LostRankError(
                    f"rank {rank} has shown no life for {timeout_s:g} s, and was probably killed; "
                    f"run the same command again to continue"
                )
        if last != [DONE] * world_size:
            time.sleep(interval_s)
