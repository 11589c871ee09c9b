"""Captures a compiled decode step as one CUDA graph. For a replay, the host only writes the inputs.

Inductor can capture graphs itself. But then Dynamo evaluates all its guards on the model before each step,
and Inductor checks that the addresses of the weights did not change. The GPU waits during these checks:
0.8 ms for 32 layers on an H100. Here both checks run once per graph, that is, once per `generate()` and
graph id.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..compile.record import record

#: After so many replays of a graph, the next variant is captured if it is at most `SOON` calls away, and from
#: then on every `AGAIN` replays if it is at most that far away.
SETTLED, SOON, AGAIN = 8, 1024, 64


class Captured:
    """Calls a compiled model, and replays a CUDA graph for calls that repeat.

    Two calls are of the same kind if their arguments differ only in the values of their tensors. The first
    call of a kind runs normally, so that the model can compile. The second call is captured. A new graph id
    ends all kinds. A variant of a graph id has kinds of its own. Those of the next variant may be captured
    ahead, because they compile nothing. All other state that a call depends on must not change while this
    object is used. A call must not change Python objects. The next call overwrites the logits of the output.
    """

    def __init__(
        self,
        compiled: Callable,
        otherwise: Callable[[str], Callable],
        must_clone: Callable[[object], bool] = lambda output: True,
        capture: Callable | None = None,
        counts: Counter[str] | None = None,
        ahead: Callable[[int], AbstractContextManager] | None = None,
        agree: Callable[[bool], bool] = lambda yes: yes,
    ):
        """Wrap a compiled model.

        Args:
            compiled: the function to capture.
            otherwise: given the reason, returns the function to call instead, if `compiled` cannot be
                captured.
            must_clone: returns whether the caller may keep tensors of an output. These tensors must be
                cloned, because the next call overwrites them.
            capture: captures a call; by default the function `record`, which needs a GPU.
            counts: counts the calls that were not replayed, by name.
            ahead: returns a context in which calls are of the next variant, and yields that variant; it
                yields None if the next variant is more than so many calls away or cannot be captured ahead.
            agree: of several processes that call together, returns whether all say yes. A graph with
                collectives must be captured and replayed by all of them at the same call.
        """
        self.compiled, self.otherwise, self.must_clone = compiled, otherwise, must_clone
        self.capture = capture or record
        self.refused, self.counts = False, Counter() if counts is None else counts
        self.graph_id, self.recordings, self.replays = 0, [], 0
        self.ahead, self.agree = ahead, agree

    def __call__(self, graph_id: int, arguments: dict, variant: Hashable = None):
        if self.refused:
            return self.compiled(**arguments)
        if graph_id != self.graph_id:
            self.graph_id, self.recordings = graph_id, []
        leaves, structure = tree_flatten(arguments)
        kind = variant, structure, [_kind(x) for x in leaves]
        recording = next((x for x in self.recordings if x.kind == kind), None)
        if recording is None:
            self.recordings = [x for x in self.recordings if x.kind[0] == variant] + [Recording(kind)]
            self.counts["step, not captured"] += 1
            return self.compiled(**arguments)
        if recording.graph:
            for own, given in zip(recording.inputs, _tensors(leaves)):
                own.copy_(given)
        else:
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            arguments, error = tree_unflatten(leaves, structure), None
            try:
                recording.graph, recording.output = self.capture(self.compiled, self._pool, **arguments)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as raised:
                error = str(raised)
            if not self.agree(error is None):
                why = "another process could not capture it" if error is None else error
                warnings.warn(
                    f"the decode step cannot be captured as a whole: {why}. The text is right, but slow. For "
                    "speed, change the model's forward(): within a step, wait for no GPU and change no state",
                    stacklevel=2,
                )
                self.refused, self.compiled, self.recordings = True, self.otherwise(why), []
                return self.compiled(**arguments)
            recording.inputs, recording.leaves = _tensors(leaves), leaves
            self.counts["step, captured"] += 1
        recording.graph.replay()
        self.replays += 1
        recording.replays += 1
        if self.ahead and not recording.next and recording.replays % AGAIN == SETTLED:
            self._capture_next(recording)
        output = recording.output
        return tree_map_only(Tensor, torch.clone, output) if self.must_clone(output) else output

    @property
    def _pool(self) -> tuple[int, int] | None:
        """The memory of the graphs that there are."""
        return next((x.graph.pool() for x in self.recordings if x.graph), None)

    def _capture_next(self, recording: "Recording") -> None:
        """Capture such a call of the next variant, if that is near. Nothing runs."""
        _, structure, kinds = recording.kind
        with self.ahead(SOON if recording.replays == SETTLED else AGAIN) as variant:
            if variant is None:
                return
            recording.next = True  # whatever comes of it
            self.recordings = [x for x in self.recordings if x.kind[0] == recording.kind[0]]
            arguments = tree_unflatten(recording.leaves, structure)
            later = Recording((variant, structure, kinds), leaves=recording.leaves, inputs=recording.inputs)
            with contextlib.suppress(RuntimeError):  # memory is short, or something compiles
                later.graph, later.output = self.capture(self.compiled, self._pool, **arguments)
            if self.agree(later.graph is not None):  # else the call itself will tell
                self.recordings.append(later)
                self.counts["step, captured ahead"] += 1


@dataclass
class Recording:
    """The CUDA graph that replays the calls of one kind. `graph` is None until the capture.

    `leaves` are the arguments of the capture, `inputs` the tensors among them. `next` says whether such a
    call of the next variant was captured, or cannot be.
    """

    kind: tuple
    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[Tensor] = field(default_factory=list)
    output: object = None
    leaves: list = field(default_factory=list)
    next: bool = False
    replays: int = 0


def _kind(x):
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x


def _tensors(leaves: list) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]
