"""Keys and values of frames that are already clean, kept between the forward passes of one video.

Letters as in model/types.py; n tokens per frame. Rotary positions that count from the start of the
video never change, so keys are kept rotated. Those that count from the start of the window do:
then keys are kept before rotation, and rotated when they are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.wan.grafts import Graft, KeyValue, straight_through
from model.wan.masks import Span, past_spans

__all__ = ["KVCache", "KeyValue", "Past", "TextKeys", "TimeStates"]

TextKeys = tuple[Tensor, ...]  # those of the text, and behind them of the images, of one layer
TimeStates = tuple[Tensor, Tensor]  # of a noise level: states [B, T, D], modulation [B, T, 6, D]


@dataclass(frozen=True, eq=False)
class Past:
    """What a forward pass sees of a cache. Positions are on the CPU."""

    layers: list[list[KeyValue]]  # per layer, one piece or two in order, as views; empty = no past
    key_positions: Tensor  # [m] rotary time positions of the m frames that are seen
    query_positions: Tensor  # [f] of the f new frames
    # Per layer, the last piece of `layers` and behind it the place of the new frames' own keys and
    # values, which the pass writes there; not in `layers` then. None = the pass writes nothing.
    rooms: list[KeyValue] | None = None
    rotated: bool = True  # whether the keys in `layers` are


class KVCache:
    """The clean past of one batch of videos, layer by layer, and the keys of their text.

    It serves one set of weights: whoever changes them begins with an empty cache.

    window: frames that a block sees at most, its own and the `sink` first ones included; what no
    later block can see is dropped, so memory is bounded. None = everything is kept.
    relative_positions: count rotary positions from the first frame that is still kept, so that
    they stay inside the window's range however long the video grows.
    sink_decay: how much of the sink is left when a frame is dropped, which gives the rest; 1 = the
    sink stays as it is (arXiv:2512.04678). Less needs relative_positions, whose keys are unrotated.
    pins: whether the first frame after a change of prompt stays until the next one's does, as one
    more of those that a block sees. Needs relative_positions.
    frames: of the whole video, if known: storage of the right size is allocated once.

    Reading is free. Writing is allowed only without autograd, and outside the layers: activation
    checkpointing runs them twice. A place in the storage is written for one block and never again
    once that block is committed, so a pass that is recomputed later sees what it saw.
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        sink: int = 0,
        relative_positions: bool = False,
        sink_decay: float = 1.0,
        pins: bool = False,
        frames: int | None = None,
    ) -> None:
        assert relative_positions or not pins, "a pass writes beside what it sees, without a gap"
        assert sink_decay == 1.0 or relative_positions, "rotated keys of two frames have no average"
        self.window, self.sink, self.sink_decay, self.pins = window, sink, sink_decay, pins
        self.relative_positions = relative_positions
        self._expected = frames
        self._index = torch.arange(0)  # positions in the video of the frames that are kept
        self._storage: list[KeyValue] = []  # [B, capacity n, heads, head_dim] of each layer
        self._begin = 0  # the frame of the storage at which the kept ones begin
        self._sink: list[KeyValue] = []  # the first frames, once others behind them were dropped
        self._sums: list[KeyValue] = []  # the sink in fp32, once something was added to it
        self._pinned: list[KeyValue] = []  # a pinned frame, once those around it were dropped
        self._pin: int | None = None  # before that, which of the frames ever it is
        self._pins_next = False  # whether the next one to be committed is
        self._committed = self._last = 0  # frames ever, and by the last commit
        self._per_frame = 0
        self._grafts: list[Graft] = []
        self._text: list[TextKeys] = []
        self._time: dict[Hashable, TimeStates] = {}
        self._beside: dict[Hashable, KVCache] = {}
        self._adapters: tuple[str, ...] | None = None

    def serve(self, adapters: tuple[str, ...]) -> None:
        """Say with which adapters a pass reads this. Raises ValueError if others wrote it."""
        if self._adapters is None:
            self._adapters = adapters
        if self._adapters != adapters:
            raise ValueError(
                f"this cache was written with adapters {self._adapters} and cannot be read with "
                f"{adapters}: what it keeps follows from them; use a cache of its own"
            )

    def snapshot(self) -> KVCache:
        """What is kept now, to read later: what is committed from here on does not show in it.

        No value is copied, and none that is kept is ever written again.
        """
        now = copy.copy(self)
        now._grafts = list(self._grafts)
        return now

    @property
    def frames(self) -> int:
        """How many frames are kept."""
        return len(self._index)

    def past(self, frame_index: Tensor) -> Past:
        """What new frames at `frame_index` [f] see, and where they and it lie."""
        new = len(frame_index)
        spans = self._seen(new)
        positions = torch.cat([frame_index[:0], *(self._index[a:b] for a, b in spans)])
        if self.relative_positions:
            kept = len(positions)
            positions = torch.arange(kept, device=frame_index.device)
            frame_index = kept + torch.arange(new, device=frame_index.device)
        learns = torch.is_grad_enabled()
        rooms = None
        if self._storage and not learns and not self.relative_positions:
            if self.sink and sum(b - a for a, b in spans) < self.frames:
                self._set_sink_apart()  # what a pass writes to may share no storage with the rest
            begin, spans = self._split_off(spans)
            rooms = self._rooms(begin, new)
        parts = [piece for span in spans for piece in self._pieces(span)]
        layers = [list(pieces) for pieces in zip(*parts, strict=True)]
        if not layers and rooms is not None:
            layers = [[] for _ in rooms]
        return Past(layers, positions, frame_index, rooms, not self.relative_positions)

    def commit(self, frame_index: Tensor, layers: Sequence[KeyValue]) -> None:
        """Append frames at `frame_index` [f], and drop those that no later block can see.

        layers: keys and values of every layer, rotated unless positions are relative; none if the
        pass wrote them into the rooms of its `past`.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("a KV cache is written only under torch.no_grad()")
        new = len(frame_index)
        spans = self._seen(new)
        if layers:
            if not self._storage:
                self._per_frame = layers[0][0].shape[1] // new
                self._storage = _allocate(layers, self._capacity(new) * self._per_frame)
            for room, own in zip(self._rooms(self.frames, new), layers, strict=True):
                for place, values in zip(room, own, strict=True):
                    place.copy_(values)
        self._drop(spans)
        if self._pins_next:
            self._pin, self._pins_next = self._committed, False
        self._index = torch.cat([self._index, frame_index])
        self._committed, self._last = self._committed + new, new

    def graft(self, layers: Sequence[KeyValue]) -> None:
        """Let gradients of whoever reads the last chunk flow into `layers`; values stay.

        The straight-through estimate c + g - stopgrad(g) of each key and value.
        """
        assert len(layers) == len(self._storage), "a graft has keys and values for every layer"
        span = (self._committed - self._last, self._committed)
        self._grafts.append(Graft(span, layers))

    @property
    def text(self) -> list[TextKeys] | None:
        """Per layer, what `keep_text` was given; None before that, and always under autograd.

        Keys that were computed without a gradient would hide the weights that they came from.
        """
        return self._text if self._text and not torch.is_grad_enabled() else None

    def keep_text(self, layers: Sequence[TextKeys]) -> None:
        """Keep keys and values of the text for every layer; they serve until the video's end."""
        if torch.is_grad_enabled():
            raise RuntimeError("a KV cache is written only under torch.no_grad()")
        self._text = list(layers)

    def new_prompt(self) -> None:
        """What comes next follows another text, whose keys are not known, and may be pinned."""
        self._text = []
        self._pins_next = self.pins

    def time(self, key: Hashable, compute: Callable[[], TimeStates]) -> TimeStates:
        """Time states of a noise level and shape, computed once per video; under autograd anew."""
        if torch.is_grad_enabled():
            return compute()
        if key not in self._time:
            self._time[key] = compute()
        return self._time[key]

    def beside(self, network: Hashable) -> KVCache:
        """The cache of another set of weights over the same videos, by its name; empty at first."""
        if network not in self._beside:
            self._beside[network] = KVCache(
                window=self.window,
                sink=self.sink,
                relative_positions=self.relative_positions,
                sink_decay=self.sink_decay,
                pins=self.pins,
                frames=self._expected,
            )
        return self._beside[network]

    def _seen(self, new: int) -> list[Span]:
        """Of the kept frames, counted from 0, those that `new` further frames see."""
        sink = self.sink + len(self._pinned[:1])
        spans = past_spans(self.frames, new, window=self.window, sink=sink)
        pin = self._pin_index()
        if pin is None or self.window is None or any(a <= pin < b for a, b in spans):
            return spans
        latest = self.frames + new - self.window + self.sink + 1
        found = ((0, self.sink), (pin, pin + 1), (latest, self.frames))
        return [(a, b) for a, b in found if a < b]

    def _pin_index(self) -> int | None:
        """Which of the kept frames is pinned, where it still lies among its neighbours."""
        return None if self._pin is None else self.frames - (self._committed - self._pin)

    def _apart(self) -> int:
        """How many of the kept frames are a sink, or pinned, with a storage of their own."""
        return (self.sink if self._sink else 0) + len(self._pinned[:1])

    def _split_off(self, spans: list[Span]) -> tuple[int, list[Span]]:
        """The kept frame at which the latest run of seen ones begins, and the spans before it."""
        if not spans or spans[-1][1] < self.frames:
            return self.frames, spans
        begin = max(spans[-1][0], self._apart())
        before = [*spans[:-1], (spans[-1][0], begin)]
        return begin, [span for span in before if span[0] < span[1]]

    def _rooms(self, begin: int, new: int) -> list[KeyValue]:
        """Per layer the kept frames from `begin` on, and behind them the place of `new` ones."""
        used = self._begin + self.frames - self._apart()
        if (used + new) * self._per_frame > self._storage[0][0].shape[1]:
            self._move(new)
            used = self.frames - self._apart()
        first = used - (self.frames - begin)
        return [self._view(layer, first, used + new) for layer in self._storage]

    def _move(self, new: int) -> None:
        """Go on in a new storage with room for `new` frames; autograd may still need the old."""
        kept = self.frames - self._apart()
        old = [self._view(layer, self._begin, self._begin + kept) for layer in self._storage]
        self._storage = _allocate(old, self._capacity(kept + new) * self._per_frame)
        for layer, values in zip(self._storage, old, strict=True):
            for place, value in zip(self._view(layer, 0, kept), values, strict=True):
                place.copy_(value)
        self._begin = 0

    def _capacity(self, needed: int) -> int:
        """Frames of a storage that holds `needed` and is not soon too small."""
        whole = 2 * needed if self._expected is None else max(needed, self._expected)
        if self.window is None:
            return whole
        # Moving the window once in a few blocks costs little; twice its memory would cost much.
        return max(needed, min(whole, self.window + max(2 * self._last, self.window // 4)))

    def _view(self, layer: KeyValue, first: int, last: int) -> KeyValue:
        """Frames of a storage. A fresh alias: autograd takes writing elsewhere in it for harm."""
        n = self._per_frame
        keys, values = (x.data[:, first * n : last * n] for x in layer)
        return keys, values

    def _pieces(self, span: Span) -> Iterator[list[KeyValue]]:
        """Kept frames as views, per layer: of the sink's own storage, and of the other."""
        apart, sink = self._apart(), self.sink if self._sink else 0
        dropped = self._committed - self.frames
        for storage, (first, last), offset, age in (
            (self._sink, (0, sink), 0, 0),
            (self._pinned, (sink, apart), -sink, dropped),
            (self._storage, (apart, self.frames), self._begin - apart, dropped),
        ):
            a, b = max(first, span[0]), min(last, span[1])
            if a < b:
                views = [self._view(layer, a + offset, b + offset) for layer in storage]
                yield self._grafted(views, (a + age, b + age))

    def _grafted(self, views: list[KeyValue], frames: Span) -> list[KeyValue]:
        """Under autograd, views of some frames with the gradients of what was grafted on them."""
        found: list[tuple[Graft, Span]] = []
        for graft in self._grafts if torch.is_grad_enabled() else ():
            both = max(frames[0], graft.frames[0]), min(frames[1], graft.frames[1])
            if both[0] < both[1]:
                found.append((graft, both))
        if not found:
            return views
        n = self._per_frame
        spans = tuple(((a - frames[0]) * n, (b - frames[0]) * n) for _, (a, b) in found)
        grafted: list[KeyValue] = []
        for i, (keys, values) in enumerate(views):
            live = [graft.part(i, both, n) for graft, both in found]
            grafted.append(
                (
                    straight_through(keys, spans, [k for k, _ in live]),
                    straight_through(values, spans, [v for _, v in live]),
                )
            )
        return grafted

    def _drop(self, seen: list[Span]) -> None:
        """Forget the kept frames that are not in `seen`."""
        kept = sum(b - a for a, b in seen)
        if kept == self.frames:
            return
        if self.sink:
            self._set_sink_apart()
        apart = self._apart()
        latest = seen[-1][0] if seen and seen[-1][1] == self.frames else self.frames
        dropped, pin = max(latest, apart) - apart, self._pin_index()
        pinned = None if pin is None or pin >= apart + dropped else pin - apart
        if self.sink and self.sink_decay < 1.0:
            self._fold(dropped, pinned)
        if pinned is not None:
            self._set_pin_apart(self._begin + pinned)
        self._begin += dropped
        self._index = torch.cat([self._index[:0], *(self._index[a:b] for a, b in seen)])
        oldest = self._committed - (kept - self._apart())
        self._grafts = [
            graft
            for graft in self._grafts
            if graft.frames[1] > oldest or graft.frames[0] < self._apart()
        ]

    def _fold(self, dropped: int, pinned: int | None) -> None:
        """Add those that leave to the sink, all but a pinned one: j to the sink's frame j mod sink.

        Into tensors of their own, for whoever reads the old ones once more. In fp32: a thousandth
        of a key is less than what bf16 rounds it by.
        """
        sums = self._sums or [(k.float(), v.float()) for k, v in self._sink]
        leaving = [self._view(layer, self._begin, self._begin + dropped) for layer in self._storage]
        slots = [None if j == pinned else j % self.sink for j in range(dropped)]
        self._sums = [
            (
                folded(keys, old_keys, slots, self.sink_decay),
                folded(values, old_values, slots, self.sink_decay),
            )
            for (keys, values), (old_keys, old_values) in zip(sums, leaving, strict=True)
        ]
        self._sink = [
            (keys.to(like[0].dtype), values.to(like[1].dtype))
            for (keys, values), like in zip(self._sums, self._storage, strict=True)
        ]

    def _set_pin_apart(self, place: int) -> None:
        """Give a frame of the storage one of its own, before those around it are dropped."""
        views = [self._view(layer, place, place + 1) for layer in self._storage]
        self._pinned, self._pin = [(k.clone(), v.clone()) for k, v in views], None

    def _set_sink_apart(self) -> None:
        """Give the first frames a storage of their own, before others behind them are dropped."""
        if self._sink:
            return
        first, last = self._begin, self._begin + self.sink
        views = [self._view(layer, first, last) for layer in self._storage]
        self._sink = [(k.clone(), v.clone()) for k, v in views]
        self._begin += self.sink


def _allocate(like: Sequence[KeyValue], tokens: int) -> list[KeyValue]:
    """Storage of so many tokens for each layer."""
    return [
        (
            keys.new_empty((keys.shape[0], tokens, *keys.shape[2:])),
            values.new_empty((values.shape[0], tokens, *values.shape[2:])),
        )
        for keys, values in like
    ]


def folded(sums: Tensor, frames: Tensor, slots: Sequence[int | None], decay: float) -> Tensor:
    """decay s + (1 - decay) x for each frame x that has a slot, and the frame s of `sums` in it.

    sums: [B, sink n, heads, head_dim], fp32; frames: [B, len(slots) n, heads, head_dim].
    """
    n = frames.shape[1] // len(slots)
    result = sums.clone()
    for frame, slot in zip(frames.split(n, dim=1), slots, strict=True):
        if slot is not None:
            result[:, slot * n : (slot + 1) * n].lerp_(frame.float(), 1.0 - decay)
    return result
