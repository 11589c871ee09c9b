"""The spread of the times of decode steps, and what happened at the slow ones.

`Watch` reads a few counters at each step, on the host, and never waits for a GPU. What two readings differ
by happened between them. The host may prepare a step while a GPU still works on the step before, but both
take the steps in one order, so the readings and the times belong together step by step.
"""

import contextlib
import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch._dynamo.callback import callback_handler

SKIPPED = 32  # first steps that the spread leaves out
FIRST = 64  # steps whose times are stored one by one
SLOW = 2.0  # a step is slow from so many medians on


@dataclass
class Slow:
    """A slow step.

    Attributes:
        step: 1 for the step that gives the second token.
        ms, times: its time, also in medians of the steps.
        host_ms: between the step before and this one, on the host.
        what: name -> how often it happened in this step; for times, milliseconds.
    """

    step: int
    ms: float
    times: float
    host_ms: float | None = None
    what: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """One line."""
        found = ", ".join(f"{name} ({n:g})" if n != 1 else name for name, n in self.what.items())
        host = "" if self.host_ms is None else f", host {self.host_ms:.1f} ms"
        return f"step {self.step}: {self.ms:.1f} ms, {self.times:.1f}x{host}: {found or 'nothing counted'}"


@dataclass(frozen=True)
class Spread:
    """Times of the steps after the first ones, over their median. `first_ms` are the first ones."""

    mean: float
    p99: float
    worst: float
    first_ms: list[float]

    @classmethod
    def of(cls, steps: list[float]) -> "Spread":
        """Of times in seconds. If there are few, the second half counts."""
        tail = sorted(steps[first_counted(steps) :])
        usual = statistics.median(tail)
        rank = -(-99 * len(tail) // 100) - 1  # the nearest rank: a time that was measured
        values = statistics.fmean(tail), tail[rank], tail[-1]
        return cls(*(x / usual for x in values), [x * 1e3 for x in steps[:FIRST]])


def first_counted(steps: list[float]) -> int:
    """Index of the first step that `Spread` counts."""
    return min(SKIPPED, len(steps) // 2)


class Reorderings:
    """How long each call of `cache.reorder_cache` takes, on a GPU by events: nobody waits for them."""

    def __init__(self, cache, cuda: bool):
        self.cache, self.cuda = cache, cuda
        self._pairs: list[tuple] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context, calls are timed."""
        plain = self.cache.reorder_cache

        def timed(index):
            start = self._stamp()
            plain(index)
            self._pairs.append((start, self._stamp()))

        self.cache.reorder_cache = timed
        try:
            yield
        finally:
            del self.cache.reorder_cache

    def _stamp(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float | None:
        """Milliseconds of the later ones; None if there was none. Waits for the device."""
        if not self._pairs:
            return None
        if self.cuda:
            torch.cuda.synchronize()
            times = [start.elapsed_time(stop) for start, stop in self._pairs]
        else:
            times = [(stop - start) * 1e3 for start, stop in self._pairs]
        return statistics.median(times[first_counted(times) :])


class Watch:
    """Readings of what a process and a cache have done so far.

    Args:
        cache: `counts` of its `decode_graph` are read, if it has one.
    """

    def __init__(self, cache=None):
        self.graph = getattr(cache, "decode_graph", None)
        self.cuda = torch.cuda.is_available()
        self.readings: list[tuple[float, Counter]] = []
        self._process, self._since = Counter(), {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context, compilations and garbage collections are counted."""
        self._starts = callback_handler.register_start_callback(self._compile_starts)
        self._ends = callback_handler.register_end_callback(self._compile_ends)
        gc.callbacks.append(self._collects)
        try:
            yield
        finally:
            gc.callbacks.remove(self._collects)
            callback_handler.remove_start_callback(self._starts)
            callback_handler.remove_end_callback(self._ends)

    def read(self) -> None:
        """Take a reading, at the end of a step."""
        counts = self._process.copy()
        if self.graph is not None:
            counts.update(self.graph.counts)
            counts["step outside the graph"] = self.graph.eager_steps
        if self.cuda:
            held = torch.cuda.memory_stats_as_nested_dict()
            counts["memory taken from the device"] = held.get("num_device_alloc", 0)
            counts["memory given back to it"] = held.get("num_device_free", 0)
        self.readings.append((time.perf_counter(), counts))

    def _compile_starts(self, args) -> None:
        self._since["compile"] = time.perf_counter()

    def _compile_ends(self, args) -> None:
        self._process["compilation"] += 1
        self._process["compilation, ms"] += self._elapsed("compile")

    def _collects(self, phase: str, info: dict) -> None:
        if phase == "start":
            self._since["gc"] = time.perf_counter()
            return
        self._process[f"garbage collection {info['generation']}, ms"] += self._elapsed("gc")

    def _elapsed(self, what: str) -> float:
        return (time.perf_counter() - self._since.pop(what, time.perf_counter())) * 1e3

    def slow(self, steps: list[float]) -> list[Slow]:
        """The slow ones of all steps, in order. `steps` are seconds.

        Readings belong to steps if there is one more than there are steps: before each, and after the last.
        """
        usual = statistics.median(steps[first_counted(steps) :])
        return [self._slow(i, x, usual) for i, x in enumerate(steps) if x >= SLOW * usual]

    def _slow(self, index: int, seconds: float, usual: float) -> Slow:
        found = Slow(index + 1, seconds * 1e3, seconds / usual)
        if index + 1 < len(self.readings):
            (start, before), (stop, after) = self.readings[index : index + 2]
            found.host_ms = (stop - start) * 1e3
            changed = {name: n - before[name] for name, n in after.items()}
            found.what = {name: round(n, 1) for name, n in changed.items() if n > 0.05}
        return found
