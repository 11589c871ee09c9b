"""A demotion as CUDA graphs, a part of which can run before it is due.

A demotion takes about as long as a decode step, and most of that time encodes tokens that have long been
there. So layers whose records may be written ahead are encoded in the steps before, some layers in each, and
the demotion itself only counts the records and closes the gap among the recent tokens.
"""

from collections.abc import Callable

from ..compile.record import record
from . import together
from .layer import KVLayer
from .positions import DeviceCounters


class RecordedDemotion:
    """Graphs of one demotion, for buffers of fixed addresses.

    Args:
        layers: those that compress. Blocks are due in all of them, or counted as due.
        counters: what the graphs read.
        refresh: brings what steps read up to date; the last graph runs it, too.

    Attributes:
        parts: graphs that may run before the demotion is due, in this order. They need counters as if it
            were due. Empty where tokens compete for budgets, where queries choose tokens, and where a layer
            is demoted alone.
        done: how many of them have run for the next demotion.

    Raises what `record` raises.
    """

    def __init__(
        self, layers: list[KVLayer], counters: DeviceCounters, refresh: Callable[[DeviceCounters], None]
    ):
        self.parts, self.done = [], 0
        self._found: list[tuple] = []  # layers and bounds of each part; the last graph reads the bounds
        pool = None
        if all(layer.middle.writes_ahead and layer.demotes_like is not None for layer in layers):
            for group in together.groups(layers):
                graph, bounds = record(together.encode, pool, layers=group, counters=counters)
                pool = pool or graph.pool()
                self.parts.append(graph)
                self._found.append((group, bounds))
        self._last, _ = record(self._end, pool, layers=layers, counters=counters, refresh=refresh)

    def _end(self, layers, counters, refresh) -> None:
        for group, bounds in self._found:
            together.take_in(group, bounds)
        if not self._found:
            together.compact(layers, counters)
        refresh(counters)

    @property
    def left(self) -> int:
        """Parts that have not run for the next demotion."""
        return len(self.parts) - self.done

    def run_part(self) -> None:
        """Run the next part."""
        self.parts[self.done].replay()
        self.done += 1

    def replay(self) -> None:
        """Demote: run what is left."""
        while self.left:
            self.run_part()
        self._last.replay()
        self.done = 0
