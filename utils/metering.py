"""What running code costs: live bytes by what they are, and operations by what they do.

A meter sees each operation of torch as it is called, with values or without (utils/dry_run.py).
Memory is counted in storages, from the call that makes one to the moment that nothing holds it.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import _engine_run_backward
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from utils.op_costs import Transfer, Work, tensors_in, transfer_of, work_of

# A peak's contents are looked at again once it has grown by this share; its height is exact.
LOOK_AGAIN = 1.0005
# How DTensor learns the shape of a whole result: by an operation on nothing, which costs nothing.
_INFER = "_propagate_tensor_meta_non_cached"


_HOST = "host memory"


def on_host() -> AbstractContextManager[Any]:
    """Around what goes to host memory, which no meter counts."""
    return record_function(_HOST)


class Tag(NamedTuple):
    """Whose memory it is, and what for."""

    role: str
    kind: str


class Place(NamedTuple):
    """Where in a step an operation is called."""

    phase: str  # as its owner says with `within`
    turn: int  # of the phase, as its owner counts: micro-batches
    part: str  # the innermost `record_function` around it; libraries' own do not count
    role: str  # whose network runs forward, or an empty string


@dataclass(eq=False)
class _Held:
    """A storage that is alive."""

    count: int  # bytes
    tag: Tag
    watch: weakref.ref[UntypedStorage]
    pinned: bool = False  # whether its tag was given to it by name


@dataclass
class Peak:
    """The most that was alive at once."""

    total: int = 0  # bytes
    contents: dict[Tag, int] = field(default_factory=dict)  # bytes, at about that moment

    def told(self, fixed: Collection[Tag] = ()) -> dict[Tag, float]:
        """`contents`, of which all but the `fixed` is made to add up to `total`."""
        known = sum(self.contents.get(tag, 0) for tag in fixed)
        rest = sum(self.contents.values()) - known
        factor = (self.total - known) / rest if rest else 1.0
        return {
            tag: count * (1.0 if tag in fixed else factor)
            for tag, count in self.contents.items()
            if count
        }


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    look: called before the contents of a peak are read, so that its owner can tag what only it can
    tell apart, such as gradients.
    """

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.look = look
        self.live: Counter[Tag] = Counter()
        self.total = 0
        self.work: Counter[tuple[Place, Work]] = Counter()
        self.transfers: Counter[tuple[Place, Transfer]] = Counter()
        self.peaks: dict[Place, Peak] = {}
        self._held: dict[int, _Held] = {}
        self._elsewhere: dict[int, weakref.ref[UntypedStorage]] = {}  # in host memory
        self.turn = 0
        self._phase = ""
        self._parts: list[str] = [""]
        self._roles: list[str] = [""]
        self._looking = self._aside = self._in_place = False

    @property
    def place(self) -> Place:
        """Where the code is now."""
        return Place(self._phase, self.turn, self._parts[-1], self._roles[-1])

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Name the phase of a step that the body is."""
        before, self._phase, self.turn = self._phase, phase, 0
        try:
            yield
        finally:
            self._phase, self.turn = before, 0

    def watch(self, role: str, network: torch.nn.Module) -> None:
        """Note when `network` runs forward, as `role`; of networks within others, the outermost."""
        network.register_forward_pre_hook(
            lambda *_: self._roles.append(self._roles[-1] or role), prepend=True
        )
        network.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._roles.pop()

    def tag(self, tensors: Iterable[Tensor], role: str, kind: str) -> None:
        """Say what tensors are, whoever made them; such a tag stays. Counts unknown ones too."""
        for tensor in tensors:
            self._note(plain(tensor), Tag(role, kind), pinned=True)

    def bytes_of(self, kind: str) -> int:
        """Live bytes of a kind now."""
        return sum(count for tag, count in self.live.items() if tag.kind == kind)

    def __enter__(self) -> Meter:
        """Count from here on."""
        self._resize = UntypedStorage.resize_
        self._infer = getattr(ShardingPropagator, _INFER)
        meter, resize, infer = self, self._resize, self._infer

        def resized(storage: UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            meter._resized(storage)
            return result

        def inferred(*args: Any, **words: Any) -> Any:
            meter._aside = True
            try:
                return infer(*args, **words)
            finally:
                meter._aside = False

        UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        setattr(ShardingPropagator, _INFER, inferred)
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        """Count no longer; what was counted stays."""
        super().__exit__(*failure)
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        setattr(ShardingPropagator, _INFER, self._infer)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around each call, which costs time: nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and count what it does and makes."""
        if DTensor in types:
            return NotImplemented  # its local part comes by here
        kwargs = kwargs or {}
        if self._aside or func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "profiler":
            return self._label(func, args, kwargs)
        out = func(*args, **kwargs)
        if self._parts[-1] == _HOST:
            self._set_aside(tensors_in(out))
            return out
        self._in_place = func is torch.ops.aten.add.Tensor and _adds_in_place(args)
        transfer = transfer_of(func, args, out)
        if transfer is not None:
            self.transfers[self.place, transfer] += 1
            if transfer.kind == "all_gather":
                self._retag(args[0], "gathered")
            elif transfer.kind == "reduce_scatter":
                self._retag(args[1], "gathered")
        else:
            work = work_of(func, args, kwargs, out)
            if work is not None:
                self.work[self.place, work] += 1
        for tensor in tensors_in(out):
            self._note(tensor, None)
        self._in_place = False
        return out

    def _label(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Follow the labels of `record_function`."""
        name = func.overloadpacket.__name__
        if name.startswith("_record_function_enter"):
            librarys = "::" in args[0] or "#" in args[0]
            self._parts.append(self._parts[-1] if librarys else args[0])
        elif name.startswith("_record_function_exit"):
            self._parts.pop()
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor, tag: Tag | None, *, pinned: bool = False) -> None:
        """Count the storage of `tensor` if it is new; give it the tag, if there is one."""
        if tensor.is_meta or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._elsewhere:
            return
        held = self._held.get(key)
        if held is None:
            usual = Tag(self._roles[-1], "activations")
            watch = weakref.ref(storage, lambda _: self._freed(key))
            held = self._held[key] = _Held(0, tag or usual, watch, pinned)
            self._set(held, storage.nbytes())
        elif tag is not None and held.tag != tag:
            self._move(held, tag)
        held.pinned = held.pinned or pinned

    def _set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Count them no more: they are in host memory."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key = storage._cdata
            if key not in self._held:
                self._elsewhere[key] = weakref.ref(storage, self._came_back(key))

    def _came_back(self, key: int) -> Callable[[object], None]:
        """What forgets a storage of host memory that is gone: others get its place."""
        return lambda _: (self._elsewhere.pop(key, None), None)[1]

    def _retag(self, tensor: Tensor, kind: str) -> None:
        held = self._held.get(tensor.untyped_storage()._cdata)
        if held is not None and not held.pinned:
            self._move(held, Tag(held.tag.role, kind))

    def _move(self, held: _Held, tag: Tag) -> None:
        self.live[held.tag] -= held.count
        self.live[tag] += held.count
        held.tag = tag

    def _set(self, held: _Held, count: int) -> None:
        """Storages grow and shrink; what is alive at most is noted by place."""
        self.live[held.tag] += count - held.count
        self.total += count - held.count
        grown, held.count = count > held.count, count
        if not grown or self._in_place:  # its first operand goes, which has the memory really
            return
        peak = self.peaks.setdefault(self.place, Peak())
        if self.total > peak.total:
            peak.total = self.total
            if peak.total > LOOK_AGAIN * sum(peak.contents.values()) and not self._looking:
                self._looking = True  # what it looks at may be counted for the first time
                self.look()
                self._looking = False
                peak.contents = {tag: n for tag, n in self.live.items() if n}

    def _resized(self, storage: UntypedStorage) -> None:
        """Sharded networks make room for gathered weights, and give it back, in this way."""
        held = self._held.get(storage._cdata)
        if held is not None:
            if not held.pinned and held.tag.kind == "activations":
                self._move(held, Tag(held.tag.role, "gathered"))
            self._set(held, storage.nbytes())

    def _freed(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._set(held, 0)


def _adds_in_place(args: Any) -> bool:
    """Whether autograd adds two gradients of one tensor in the memory of the first.

    It does where nobody else holds that one; but never while a mode looks on, as one does here.
    See `can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp.
    """
    first, second = args[0], args[1]
    if torch.is_grad_enabled() or not isinstance(second, Tensor) or first._is_view():
        return False
    caller = inspect.currentframe()
    while caller is not None and caller.f_code.co_filename == __file__:
        caller = caller.f_back
    return caller is not None and caller.f_code is _engine_run_backward.__code__


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
