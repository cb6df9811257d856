"""Enough of ``torch.cuda`` to run the CUDA-only code on a CPU and to find missing waits.

Streams and events carry vector clocks; the host is one more stream, in whose order everything is
queued. Copies and arithmetic happen at once, on the CPU: this finds orders that nothing enforces,
whether or not they go wrong, and says nothing about what a GPU would do.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.tiers import vm
from offload.tiers.arena import CudaMemory
from offload.tiers.copy import CudaCopier, Mark


class Stream:
    """A stream whose clock tells how far each stream is known to have come."""

    def __init__(self, device: object = None) -> None:
        self.clock: Counter[int] = Counter()

    def tick(self) -> int:
        """Something is queued here by the host."""
        self.clock |= HOST.clock
        self.clock[id(self)] += 1
        return self.clock[id(self)]

    def wait_event(self, event: Event) -> None:
        self.clock |= event.seen

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock

    def synchronize(self) -> None:
        HOST.clock |= self.clock


HOST = Stream()


class Event:
    """What had been queued when it was recorded."""

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()

    def record(self, stream: Stream) -> None:
        stream.tick()
        self.seen = Counter(stream.clock)

    def synchronize(self) -> None:
        HOST.clock |= self.seen


class Cudart:
    """Registers nothing; remembers what is registered. ``code``: of the next registrations.

    ``limit_bytes``: more cannot be registered.
    """

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.code = 0
        self.limit_bytes = 1 << 62

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:  # noqa: N802
        if sum(self.pinned.values()) + size_bytes > self.limit_bytes:
            return 2
        if not self.code:
            self.pinned[address] = size_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@dataclass
class Device:
    """The streams of one device, and the races that were found."""

    compute: Stream = field(default_factory=Stream)
    runtime: Cudart = field(default_factory=Cudart)
    races: list[str] = field(default_factory=list)
    written: dict[int, tuple[Stream, int]] = field(default_factory=dict)  # frame -> by whom, when
    read: dict[int, tuple[Stream, int]] = field(default_factory=dict)  # frame -> last
    straight: Counter[str] = field(default_factory=Counter)  # copies from and to pinned homes
    local: threading.local = field(default_factory=threading.local)
    lock: threading.Lock = field(default_factory=threading.Lock)  # clocks are not atomic

    def current(self, device: object = None) -> Stream:
        stream: Stream = getattr(self.local, "stream", self.compute)
        return stream

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.local.stream = self.current(), stream
        try:
            yield
        finally:
            self.local.stream = before

    def check(self, stream: Stream, after: tuple[Stream, int] | None, what: str) -> None:
        """Whether a stream knows of an earlier access."""
        if after is not None and stream.clock[id(after[0])] < after[1]:
            self.races.append(what)


class Memory(CudaMemory):
    """CudaMemory over host memory; tensors over a frame are what compute reads."""

    def __init__(self, fake: Device) -> None:
        self.fake = fake
        super().__init__(torch.device("cpu"))

    def over(self, address: int, size_bytes: int, token: object) -> Tensor:
        if token is not None:
            self.fake.compute.tick()
            self.fake.check(self.fake.compute, self.fake.written.get(address), "read too early")
        buffer = vm.buffer_at(address, size_bytes)
        buffer.token = token  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def retire(self, address: int) -> None:
        self.fake.read[address] = self.fake.compute, self.fake.compute.tick()
        super().retire(address)


class Copier(CudaCopier):
    """CudaCopier, which says when it writes to a frame and reads a gradient."""

    def __init__(self, fake: Device) -> None:
        self.fake = fake
        super().__init__(torch.device("cpu"))

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        with self.fake.lock:
            super().upload(source, target, mark)
            frame, stream = target.untyped_storage().data_ptr(), self.fake_up
            self.fake.check(stream, self.fake.read.get(frame), "overwritten too early")
            self.fake.written[frame] = stream, stream.clock[id(stream)]
            if self.is_pinned(source) and source.dtype == target.dtype:
                self.fake.straight["up"] += 1
                self.fake.check(HOST, self.fake.written[frame], "a home was given back too early")

    def ready(self) -> Mark:
        made = self.fake.compute, self.fake.compute.tick()
        mark = super().ready()
        mark.arrived = made  # of no use to the real one on the way down
        return mark

    def download(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        super().download(source, target, mark)
        made: Any = mark.arrived
        stream: Any = self._down
        self.fake.straight["down"] += self.is_pinned(target)
        self.fake.check(stream, made, "a gradient left too early")
        self.fake.check(HOST, (stream, stream.clock[id(stream)]), "the host read too early")

    @property
    def fake_up(self) -> Stream:
        stream: Any = self._up
        assert isinstance(stream, Stream)
        return stream


def install(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Put the fake in the place of ``torch.cuda``'s, and of the emulated device's memory."""
    fake = Device()
    for name, value in {
        "Stream": Stream, "Event": Event, "current_stream": fake.current, "stream": fake.use,
        "device": lambda _: nullcontext(), "cudart": lambda: fake.runtime,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("offload.place.PageMemory", lambda: Memory(fake))
    monkeypatch.setattr("offload.place.PlainCopier", lambda: Copier(fake))
    return fake
