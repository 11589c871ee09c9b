"""Selects the cases that run compiled versions of the kernels, and counts the compiled graphs.

On a GPU fade_fast compiles a kernel once per shape. This takes several seconds, or one second if an earlier
run has stored the kernel on disk. Most shapes of the cases occur only once. So by default only the marked
cases run compiled, and these cases share their shapes. The other cases run the same functions eagerly on
the same device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fade_fast.compile import compiled as compiling
from fade_fast.compile import stored

#: The values of `--compiled`: whether a marked case runs compiled, and whether an unmarked case does.
CHOICES = {"all": (True, True), "some": (True, False), "none": (False, False)}


@dataclass
class Twins:
    """The compiled graphs that ran, the number of new graphs, and the time of their first calls.

    `traced` are those of the new graphs that Dynamo counts: it counts none that was loaded from disk.
    """

    graphs: set[str] = field(default_factory=set)
    new: int = 0
    traced: int = 0
    seconds: float = 0.0


def wanted(choice: str, marked: bool) -> bool:
    """Whether a case runs compiled with `--compiled choice`."""
    return CHOICES[choice][not marked]


@contextmanager
def allowed(yes: bool) -> Iterator[Twins]:
    """Allow or forbid compiled versions of the kernels. Yields a record of the graphs that ran."""
    graphs, before, call = Twins(), compiling.COMPILED_ON, compiling.Compiled._call

    def watched(self, dynamic_sizes, pinned, args, constants):
        key = self.key_of(args, constants)
        start, new = time.perf_counter(), not self._knows(key, dynamic_sizes, args)
        ahead = stored.counts["compiled"]
        result = call(self, dynamic_sizes, pinned, args, constants)
        graphs.graphs.add(f"{self.function.__module__}.{self.function.__qualname__} {key}")
        graphs.new += new
        graphs.traced += stored.counts["compiled"] - ahead
        graphs.traced += new and isinstance(self.graphs[key], compiling.Traced)
        graphs.seconds += time.perf_counter() - start if new else 0.0
        return result

    compiling.COMPILED_ON = before if yes else set()
    compiling.Compiled._call = watched
    try:
        yield graphs
    finally:
        compiling.COMPILED_ON, compiling.Compiled._call = before, call


def fused(device: str) -> bool:
    """Whether kernels on `device` run compiled at the moment."""
    return torch.device(device).type in compiling.COMPILED_ON
