"""A compiled decode step as one CUDA graph, of which the host only writes the inputs.

Inductor can capture graphs itself. But then Dynamo looks at all it knows of the model before each step,
and Inductor whether the weights still lie where they did, while the GPU waits: 0.8 ms for 32 layers on an
H100. Here both look once for each graph, that is once a `generate()` and an epoch.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers.utils import ModelOutput

LEFT = {"logits", "past_key_values"}  # of an output, what generate() copies itself, and what is no tensor


class Captured:
    """Calls of a compiled model, of which those that repeat are replayed.

    The first call of a kind is an ordinary one, for what has yet to be compiled; the second is captured.
    A kind is an epoch, and arguments that differ in the numbers of their tensors alone. Whatever else a
    call depends on must not change while this object is used, nor may a call change Python objects.
    The next call overwrites the logits of the output.
    """

    def __init__(self, compiled: Callable[..., ModelOutput], otherwise: Callable[[], Callable]):
        """`otherwise` makes what is called instead if `compiled` cannot be captured."""
        self.compiled, self.otherwise, self.refused = compiled, otherwise, False
        self._forget()

    def _forget(self, kind: tuple | None = None) -> None:
        self.kind, self.graph, self.inputs, self.output = kind, None, [], None

    def __call__(self, epoch: int, arguments: dict) -> ModelOutput:
        leaves, structure = tree_flatten(arguments)
        kind = epoch, structure, [_kind(x) for x in leaves]
        if self.refused or kind != self.kind:
            self._forget(kind)
            return self.compiled(**arguments)
        if self.graph:
            for own, given in zip(self.inputs, _tensors(leaves)):
                own.copy_(given)
        else:
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            try:
                self.graph, self.output = record(self.compiled, **tree_unflatten(leaves, structure))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"the decode step cannot be captured as a whole: {error}", stacklevel=2)
                self.refused, self.compiled = True, self.otherwise()
                return self.compiled(**arguments)
            self.inputs = _tensors(leaves)
        self.graph.replay()
        return self.output if self.output.keys() <= LEFT else tree_map_only(Tensor, torch.clone, self.output)


def record(call: Callable, **arguments):
    """The CUDA graph of a call, not yet run, and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on using the GPU
        output = call(**arguments)
    return graph, output


def _kind(x):
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x


def _tensors(leaves: list) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]
