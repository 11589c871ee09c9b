"""CUDA graphs of what a layer does in a decode step.

vLLM captures the operations between attention layers. Attention runs between these pieces, because its work
follows the lengths of the requests. The host then starts some 20 kernels in each layer, which takes longer
than the device needs for most batches. So the plugin captures a layer's part of a step itself: storing, by
the number of requests, and attention of a batch, by its rows and by a bound of its contexts.

A graph reads and writes tensors that stay. `Graphs.hold` copies what a step knows of its requests into such
tensors, once for all layers, and `Held.forward` copies queries, keys and values of a layer. A call runs once
before it is captured, so that everything it needs is compiled.
"""

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compile.compiled import rounded
from ..compile.record import record
from ..compile.replay import rehearsal
from ..kernels.packed import bucket
from .batches import NOWHERE, Batch, Step
from .layer import CompressedLayer, New, PagedLayer

REPLAYS_ON = {"cuda"}  # types of devices on which steps are replayed
MOST_BATCHES = 64  # kinds of batches whose graphs are kept; each has a graph for each layer


class Call:
    """A call that writes to tensors that stay. It runs, is captured when it runs again, and is then replayed.

    If memory is short, or an operation cannot be captured, it stays an ordinary call.
    """

    def __init__(self):
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ran = self.refused = False

    def __call__(self, function: Callable[[], None], pool) -> None:
        """`pool`: memory that graphs share. No tensor in it outlives a replay."""
        if self.graph is None and self.ran and not self.refused:
            try:
                self.graph, _ = record(function, pool)
            except RuntimeError:
                self.refused = True
        if self.graph is not None:
            self.graph.replay()
            return
        with rehearsal():
            function()
        self.ran = True


@dataclass
class Place:
    """Tensors that stay, of one kind of steps or of batches, and what is captured with them.

    Attributes:
        calls: of each layer.
        shared: what layers share during a step; it is the `shared` of the step or of the batch.
        fills: by key of `shared`, the call that computes it anew, and its function.
    """

    shared: dict
    calls: dict[Hashable, Call] = field(default_factory=dict)
    fills: dict[Hashable, tuple[Call, Callable]] = field(default_factory=dict)

    def share(self, key: Hashable, compute: Callable) -> None:
        """Let layers find what `compute` gives, in this step and, computed anew, in later ones."""
        if key in self.shared:
            return
        kept = self.shared[key] = compute()

        def again():
            for own, new in zip(tree_leaves(kept), tree_leaves(compute())):
                if isinstance(own, Tensor):
                    own.copy_(new)

        self.fills[key] = Call(), again

    def fill(self, pool) -> None:
        """Compute what is shared for the step whose inputs are in place."""
        for call, function in self.fills.values():
            call(function, pool)


@dataclass
class Tokens(Place):
    """The tokens of steps with up to R requests: `step` has their positions, and `slots` is int64 [R]."""

    step: Step | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, rows: int, device: torch.device) -> "Tokens":
        none, after, slots = (torch.full((rows,), -1, device=device) for _ in range(3))
        step = Step([], [], None, lambda: None, none, after, True)
        return cls(step.shared, step=step, slots=slots)

    def load(self, step: Step, slots: Tensor) -> None:
        for own, new, value in (
            (self.step.positions, step.positions, NOWHERE), (self.step.after, step.after, 0),
            (self.slots, slots, -1),
        ):  # fmt: skip
            own[: len(new)].copy_(new)
            own[len(new) :].fill_(value)


@dataclass
class Rows(Place):
    """A batch of rows with one query each, and room for the tokens that rows of padding write."""

    batch: Batch | None = None

    @classmethod
    def like(cls, batch: Batch, bound: int) -> "Rows":
        """A place for batches of as many rows, whose contexts have up to `bound` tokens."""
        reach = np.full(len(batch.tokens), bound, dtype=np.int64)
        same = [torch.zeros_like(x) for x in (batch.tokens, batch.at, batch.table)]
        targets = torch.zeros_like(batch.tokens[:, 0])
        kept = Batch(*same, reach, None, targets, torch.zeros_like(batch.before))
        return cls(kept.shared, batch=kept)

    def load(self, batch: Batch, nowhere: int) -> None:
        """`nowhere`: the token to which padding is written."""
        own, count = self.batch, len(batch.targets)
        for name in ("tokens", "at", "table"):
            getattr(own, name).copy_(getattr(batch, name))
        own.targets[:count].copy_(batch.targets)
        own.targets[count:].fill_(nowhere)


class Vectors:
    """Queries, keys, values and outputs of a layer's tokens, and the records that a step overwrites.

    Layers of equal shapes use the same tensors, one after another.
    """

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor, most: int):
        of = lambda x, rows: x.new_zeros(rows, *x.shape[1:])  # noqa: E731
        self.inputs = [of(x, most) for x in (query, keys, values)]
        self.output = of(query, most + 1)  # the last one is for padding
        self.old: dict[int, Tensor] = {}

    def old_of(self, record: int, keys: Tensor) -> Tensor:
        """Room for records of `record` bytes, one for each token and KV head of `keys`."""
        if record not in self.old:
            self.old[record] = keys.new_zeros(*keys.shape[:2], record, dtype=torch.uint8)
        return self.old[record]

    def load(self, given: list[Tensor]) -> None:
        torch._foreach_copy_([own[: len(x)] for own, x in zip(self.inputs, given)], given)


class Graphs:
    """The graphs of all layers with the same pages.

    Args:
        most: requests in a step.
        heads: KV heads of a layer.
    """

    def __init__(self, most: int, heads: int):
        self.most, self.heads = rounded(most), heads
        self.tokens: dict[int, Tokens] = {}
        self.rows: OrderedDict[Hashable, Rows] = OrderedDict()
        self.vectors: dict[Hashable, Vectors] = {}
        self._pool: tuple[int, int] | None = None

    @property
    def pool(self) -> tuple[int, int] | None:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def hold(self, step: Step, slots: Tensor) -> "Held | None":
        """Copy a step to tensors that stay. None: its layers run without graphs of their own.

        Args:
            step: from `batches.split`, with batches of rounded sizes.
            slots: int64 [T] or more, slots of its tokens.
        """
        count = len(step.positions)
        decodes = step.single and step.short and not step.prefill
        if not decodes or count > self.most or step.positions.device.type not in REPLAYS_ON:
            return None
        size = rounded(count)
        if size not in self.tokens:
            self.tokens[size] = Tokens.of(size, step.positions.device)
        tokens, seen, rows = self.tokens[size], Counter(), []
        tokens.load(step, slots[:count])
        for batch in step.short:
            bound = bucket(len(batch.tokens) * self.heads, batch.length, paged=True)
            key = (*batch.table.shape, bound)
            seen[key] += 1
            rows.append(self._rows((*key, seen[key]), batch, bound))
        for place in (tokens, *rows):
            place.fill(self.pool)
        return Held(self, tokens, rows, count)

    def _rows(self, key: Hashable, batch: Batch, bound: int) -> Rows:
        if key not in self.rows:
            self.rows[key] = Rows.like(batch, bound)
            while len(self.rows) > MOST_BATCHES:
                self.rows.popitem(last=False)
        self.rows.move_to_end(key)
        self.rows[key].load(batch, self.most)
        return self.rows[key]

    def vectors_of(self, *given: Tensor) -> Vectors:
        """The tensors that stay for queries, keys and values like these."""
        key = tuple((*x.shape[1:], x.dtype) for x in given)
        if key not in self.vectors:
            self.vectors[key] = Vectors(*given, self.most)
        return self.vectors[key]


@dataclass
class Held:
    """A step whose inputs are in tensors that stay."""

    graphs: Graphs
    tokens: Tokens
    rows: list[Rows]
    count: int

    @staticmethod
    def serves(layer: PagedLayer) -> bool:
        """Whether steps of this layer are replayed."""
        return isinstance(layer, CompressedLayer) and layer.takes_single

    def forward(
        self, layer: PagedLayer, cache: Tensor, query: Tensor, keys: Tensor, values: Tensor, output: Tensor
    ) -> None:
        """What `PagedLayer.forward` does in this step. `Held.serves` says for which layers."""
        at, page = self.graphs.vectors_of(query, keys, values), cache.shape[2]
        at.load([x[: self.count] for x in (query, keys, values)])
        query, *own = at.inputs
        kind, size, caller = layer.kind(page), len(self.tokens.slots), (layer, cache.data_ptr())
        old = None if kind.fine else at.old_of(kind.record, own[0])
        slots, step = self.tokens.slots, self.tokens.step

        def store() -> None:
            found = layer.store(cache, own[0][:size], own[1][:size], slots, step)[0]
            if old is not None:
                old[:size].copy_(found)

        def attend(batch: Batch) -> None:
            new = New(tuple(own), single=True, old=old)
            batch.store(layer.attend_single(cache, query, new, batch), at.output)

        self._call(self.tokens, kind, lambda: layer.writes(page, slots, step, query), caller, store)
        for rows in self.rows:
            reads = functools.partial(layer.reads, page, rows.batch, query)
            self._call(rows, (kind, layer.heads), reads, caller, functools.partial(attend, rows.batch))
        output[: self.count].copy_(at.output[: self.count])

    def _call(self, place: Place, key: Hashable, shared: Callable, caller: Hashable, function: Callable):
        """Run a layer's part of a step, which reads what `shared` gives from `place.shared[key]`."""
        place.share(key, shared)
        place.calls.setdefault(caller, Call())(function, self.graphs.pool)
