"""Functions of many small kernels, replayed as CUDA graphs: a GPU would wait for the host between kernels."""

import contextlib
import contextvars
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .compiled import use_compiled
from .record import record

REPLAYS_ON = {"cuda"}  # types of devices on which calls are replayed
MOST_GRAPHS = 4  # kept of one function; each holds the memory of its arguments and of all between


@dataclass
class Replay:
    """The graph of calls of one kind: its inputs, which a call overwrites, and its outputs. Without a graph,
    such a call has run once, or cannot be recorded (`refused`).
    """

    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[Tensor] | None = None
    output: object = None
    refused: bool = False


class Replayed:
    """A function of tensors whose calls are replayed from the third call of a kind on.

    Calls of one kind agree in shapes, dtypes, devices, thread, stream and constants, and in whether compiled
    versions run. The first call compiles what it needs, and the second call is recorded. A call within the
    recording of another graph is an ordinary one, and so is a call within `rehearsal`.

    Args:
        function: it reads tensors, returns new ones, and never waits for the device.
        most: elements of the first argument from which on the device needs longer than the host, and
            replays would only cost memory.
    """

    def __init__(self, function: Callable, most: int):
        self.function, self.most = function, most
        self.known: OrderedDict[Hashable, Replay] = OrderedDict()

    def __call__(self, *args, **constants):
        first = args[0]
        if first.device.type not in REPLAYS_ON or first.numel() > self.most:
            return self.function(*args, **constants)
        if _rehearses.get() or _is_recording(first):
            return self.function(*args, **constants)
        leaves, structure = tree_flatten(args)
        kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        place = threading.get_ident(), _stream(first), use_compiled(first)
        key = (*place, structure, *kinds, *constants.items())
        found = self.known.get(key)
        if found is None:
            self.known[key] = Replay()
            while len(self.known) > MOST_GRAPHS:
                self.known.popitem(last=False)
            # With the strides of the recording, or that would have to compile.
            return self.function(*tree_unflatten(_copied(leaves), structure), **constants)
        self.known.move_to_end(key)
        with _on_device(first):  # a recording sees only the current device
            if found.graph is None and not found.refused:
                self._record(found, leaves, structure, constants)
            if found.refused:
                return self.function(*args, **constants)
            for own, given in zip(found.inputs, (x for x in leaves if isinstance(x, Tensor))):
                own.copy_(given)
            found.graph.replay()
            return tree_map_only(Tensor, torch.clone, found.output)

    def _record(self, found: Replay, leaves: list, structure, constants: dict) -> None:
        """Record a call. If memory is short or something compiles, calls of this kind stay ordinary ones."""
        leaves = _copied(leaves)
        try:
            args = tree_unflatten(leaves, structure)
            found.graph, found.output = record(lambda: self.function(*args, **constants))
        except RuntimeError:
            found.graph, found.refused = None, True
        found.inputs = [x for x in leaves if isinstance(x, Tensor)]


_rehearses: contextvars.ContextVar[bool] = contextvars.ContextVar("rehearses", default=False)


@contextlib.contextmanager
def rehearsal():
    """Inside, no call is replayed. So everything is compiled that a recording of the same calls needs.

    A replay needs nothing compiled: after `torch.compiler.reset()` it would hide what is missing.
    """
    token = _rehearses.set(True)
    try:
        yield
    finally:
        _rehearses.reset(token)


def _copied(leaves: list) -> list:
    """The same with contiguous copies of tensors."""
    clone = lambda x: x.clone(memory_format=torch.contiguous_format)  # noqa: E731
    return [clone(x) if isinstance(x, Tensor) else x for x in leaves]


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _is_recording(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _stream(x: Tensor) -> Hashable:
    return torch.cuda.current_stream(x.device) if x.is_cuda else None
