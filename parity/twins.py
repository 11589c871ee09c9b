"""Which cases run on compiled twins, and how many of these there were.

On a GPU fade_fast compiles a kernel once a shape, which takes seconds, or one where an earlier run has
left it on disk. Most shapes of the cases would be met once. So by default only the cases that are marked,
which share their shapes, run compiled; the others run the same functions eagerly, on the same device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fade_fast.compile import compiled as compiling

#: What `--compiled` takes, and whether a case that is marked, and one that is not, may run compiled.
CHOICES = {"all": (True, True), "some": (True, False), "none": (False, False)}


@dataclass
class Twins:
    """The compiled graphs that were called, how many were new, and how long their first calls took."""

    graphs: set[str] = field(default_factory=set)
    new: int = 0
    seconds: float = 0.0


def wanted(choice: str, marked: bool) -> bool:
    """Whether a case runs compiled under `--compiled choice`."""
    return CHOICES[choice][not marked]


@contextmanager
def allowed(yes: bool) -> Iterator[Twins]:
    """Let twins run where fade_fast would compile them, or nowhere; tells which ran."""
    found, before, call = Twins(), compiling.COMPILED_ON, compiling.Compiled._call

    def watched(self, key, *args):
        start, new = time.perf_counter(), key not in self.graphs
        result = call(self, key, *args)
        found.graphs.add(f"{self.function.__module__}.{self.function.__qualname__} {key}")
        found.new += new
        found.seconds += time.perf_counter() - start if new else 0.0
        return result

    compiling.COMPILED_ON = before if yes else set()
    compiling.Compiled._call = watched
    try:
        yield found
    finally:
        compiling.COMPILED_ON, compiling.Compiled._call = before, call


def fused(device: str) -> bool:
    """Whether functions of tensors on `device` run compiled at the moment."""
    return torch.device(device).type in compiling.COMPILED_ON
