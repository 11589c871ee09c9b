"""A compiled decode step as one CUDA graph, of which the host only writes the inputs.

Inductor can capture graphs itself. But then Dynamo looks at all it knows of the model before each step,
and Inductor whether the weights still lie where they did, while the GPU waits: 0.8 ms for 32 layers on an
H100. Here both look once for each graph, that is once a `generate()` and an epoch.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


class Captured:
    """Calls of a compiled model, of which those that repeat are replayed.

    The first call of a kind is an ordinary one, for what has yet to be compiled; the second is captured.
    A kind is arguments that differ in the numbers of their tensors alone; a new epoch ends all kinds.
    Whatever else a call depends on must not change while this object is used, nor may a call change Python
    objects. The next call overwrites the logits of the output.
    """

    def __init__(
        self,
        compiled: Callable,
        otherwise: Callable[[], Callable],
        must_clone: Callable[[object], bool] = lambda output: True,
    ):
        """Wrap a compiled model.

        Args:
            compiled: what is captured.
            otherwise: makes the function that is called instead if `compiled` cannot be captured.
            must_clone: whether the caller may keep tensors of an output, which the next call overwrites.
        """
        self.compiled, self.otherwise, self.must_clone = compiled, otherwise, must_clone
        self.refused = False
        self.graph_id, self.recordings, self.replays = 0, [], 0

    def __call__(self, graph_id: int, arguments: dict):
        if self.refused:
            return self.compiled(**arguments)
        if graph_id != self.graph_id:
            self.graph_id, self.recordings = graph_id, []
        leaves, structure = tree_flatten(arguments)
        kind = structure, [_kind(x) for x in leaves]
        recording = next((x for x in self.recordings if x.kind == kind), None)
        if recording is None:
            self.recordings.append(Recording(kind))
            return self.compiled(**arguments)
        if recording.graph:
            for own, given in zip(recording.inputs, _tensors(leaves)):
                own.copy_(given)
        else:
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            pool = next((x.graph.pool() for x in self.recordings if x.graph), None)
            try:
                arguments = tree_unflatten(leaves, structure)
                recording.graph, recording.output = record(self.compiled, pool, **arguments)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"the decode step cannot be captured as a whole: {error}", stacklevel=2)
                self.refused, self.compiled, self.recordings = True, self.otherwise(), []
                return self.compiled(**arguments)
            recording.inputs = _tensors(leaves)
        recording.graph.replay()
        self.replays += 1
        output = recording.output
        return tree_map_only(Tensor, torch.clone, output) if self.must_clone(output) else output


@dataclass
class Recording:
    """What calls of one kind are replayed from, once there is a graph."""

    kind: tuple
    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[Tensor] = field(default_factory=list)
    output: object = None


def record(call: Callable, pool: tuple[int, int] | None = None, **arguments):
    """The CUDA graph of a call, not yet run, and what the call returned.

    `pool`: memory to share with graphs that never run at the same time, or None.
    """
    graph = torch.cuda.CUDAGraph()
    # Others may go on using the GPU.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = call(**arguments)
    return graph, output


def _kind(x):
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x


def _tensors(leaves: list) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]
