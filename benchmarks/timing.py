"""Time of a callable on a device, without launch gaps and from a cold L2 cache.

On CUDA the host runs ahead: a spinning kernel holds the stream while the repetitions are enqueued,
so the gaps between launches are the device's own. Before each repetition a buffer of twice the L2
is written, and each repetition stands between two events of its own. An empty kernel reads a few
microseconds that way (`Clock.empty`), so small figures are best read beside a plain copy of the
same bytes in the same harness (`Clock.copy`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

Work = Callable[[], object]

_BATCH = 16  # repetitions enqueued behind one spin: well under the driver's launch queue
_SPIN_CLOCK = 2.0e9  # cycles per second, rounded up: too long a spin is harmless
_LONGEST_SPIN = 0.5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the quartiles as its spread.

    ``host_ahead`` is False where the host could not stay ahead of the device (the callable
    synchronises, or launches very much): the figure then contains host time.
    """

    ms: float
    low: float
    high: float
    repetitions: int
    host_ahead: bool = True

    @classmethod
    def of(cls, samples: list[float], host_ahead: bool = True) -> Timing:
        ordered = sorted(samples)
        quarter = len(ordered) // 4
        return cls(median(ordered), ordered[quarter], ordered[-1 - quarter], len(ordered), host_ahead)


class Clock(Protocol):
    """Times callables on one device."""

    device: torch.device

    def time(self, work: Work, seconds: float = 0.15) -> Timing:
        """Median over as many repetitions (3 to 48) as fit in ``seconds`` of the device's time; a call of more than
        a second is timed once."""
        ...

    def empty(self) -> Timing:
        """What a call that does nothing reads."""
        ...


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def repetitions(seconds_each: float, seconds: float) -> int:
    return 1 if seconds_each > 1 else max(3, min(3 * _BATCH, int(seconds / max(seconds_each, 1e-9))))


class CudaClock:
    """Events on the current stream, the host running ahead, the L2 flushed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.uint8, device=device)

    def time(self, work: Work, seconds: float = 0.15) -> Timing:
        host, device = self._estimate(work)
        remaining = repetitions(device, seconds)
        if remaining == 1:  # so slow that the estimate is as good as another call
            return Timing.of([1e3 * device])
        samples, ahead = [], True
        while remaining:
            count = min(remaining, _BATCH)
            batch, in_time = self._batch(work, count, host)
            samples += batch
            ahead &= in_time
            remaining -= count
        return Timing.of(samples, ahead)

    def empty(self) -> Timing:
        return self.time(lambda: torch.cuda._sleep(0))

    def _estimate(self, work: Work) -> tuple[float, float]:
        """Seconds of the host to enqueue one call, and of the whole call, after a warm-up."""
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(self.device)
        if time.perf_counter() - start < 1:
            work()
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return host, time.perf_counter() - start

    def _batch(self, work: Work, count: int, host: float) -> tuple[list[float], bool]:
        """One batch behind a spin long enough for the host; a spin that was too short is tried again longer."""
        spin = 1e-3 + 2 * count * (host + 50e-6)
        for _ in range(3):
            samples, ahead = self._spin_and_run(work, count, min(spin, _LONGEST_SPIN))
            if ahead or spin > _LONGEST_SPIN:
                break
            spin *= 3
        return samples, ahead

    def _spin_and_run(self, work: Work, count: int, spin: float) -> tuple[list[float], bool]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        gate = torch.cuda.Event()
        torch.cuda._sleep(int(spin * _SPIN_CLOCK))
        gate.record()
        for start, end in events:
            self._flush.zero_()
            start.record()
            work()
            end.record()
        ahead = not gate.query()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events], ahead


class HostClock:
    """The same interface by the host's clock, for devices whose work is done when the call returns."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._flush = torch.empty(64 << 20, dtype=torch.uint8)

    def time(self, work: Work, seconds: float = 0.15) -> Timing:
        work()
        start = time.perf_counter()
        first = self._once(work)
        count = repetitions(time.perf_counter() - start, seconds)  # the flush takes its time, too
        return Timing.of([first] + [self._once(work) for _ in range(count - 1)])

    def empty(self) -> Timing:
        return self.time(lambda: None)

    def _once(self, work: Work) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)


def copy_time(clock: Clock, moved_bytes: int, seconds: float = 0.05) -> Timing:
    """A plain copy that moves ``moved_bytes`` in all: half of them read, half written."""
    source = torch.ones(max(moved_bytes // 2, 1), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return clock.time(lambda: target.copy_(source), seconds)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read plus written, of a copy far larger than the cache."""
    size = 8 << 30 if clock.device.type == "cuda" else 256 << 20
    return size / (copy_time(clock, size).ms / 1e3)


def matmul_rate(clock: Clock) -> float:
    """Floating-point operations per second of a large square product: float16 on CUDA, float32 elsewhere."""
    size, dtype = (8192, torch.float16) if clock.device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=clock.device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / (clock.time(lambda: torch.mm(a, a, out=out)).ms / 1e3)


def graphed(work: Work) -> Work:
    """``work`` captured once as a CUDA graph; the returned callable replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
