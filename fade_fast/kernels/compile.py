"""How kernels are compiled: the only file that names options of torch.compile and Inductor.

Each kernel is an eager PyTorch function. On CUDA its twin is compiled once a shape, with tile sizes
that were measured instead of searched for, so that nothing is tuned and compiling takes seconds.
"""

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Without `native_matmul`, a batched product cannot take its operand from arithmetic on bytes. With
#: `shape_padding`, Inductor benchmarks at compile time whether to pad 4 query rows to 8; where it does,
#: nothing fuses. A split reduction would write the scores' statistics in two kernels. The thresholds leave
#: it to `packed.written` where one kernel ends and the next begins.
OPTIONS = {
    "triton.native_matmul": True,
    "shape_padding": False,
    "use_fast_math": True,
    "split_reductions": False,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_reads_threshold": 1000,
}


@dataclass(frozen=True)
class Tiles:
    """Block sizes, warps and stages of the generated kernels of one shape.

    `scores` and `values` are for the two products, told apart by the number of scores; `stats` and
    `merge` for the two reductions, told apart by their length.
    """

    scores_numel: int
    chunk: int
    scores: dict
    values: dict
    stats: dict
    merge: dict


def tiles(rows: int, batch_heads: int, length: int, chunk: int, key_bytes: int, value_bytes: int) -> Tiles:
    """Measured on an H100 for 2 to 64 query rows and 32 to 256 bytes a token (docs/lab-notebook.md)."""
    x = max(2, _power_of_two(rows))
    scores = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=128, num_warps=2, num_stages=2)
    if x > 4:
        scores.update(YBLOCK=64, num_warps=2 if x <= 8 else 4)
    if key_bytes % 32 == 0:
        scores["R0_BLOCK"] = 32 if key_bytes <= 64 else 64
    elif key_bytes % 16 == 0:
        scores.update(R0_BLOCK=16, num_stages=3)
    if key_bytes == 32:
        scores.update(YBLOCK=64, num_warps=1, num_stages=1)
    y = min(128, max(16, _power_of_two(value_bytes)))
    narrow = value_bytes <= 64
    values = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=y, R0_BLOCK=128, num_warps=2 if narrow else 4)
    values["num_stages"] = 3 if x <= 4 else 2
    if chunk <= 256:
        values.update(R0_BLOCK=64, num_stages=4, num_warps=1 if narrow else 2)
    if chunk <= 128:
        values.update(num_stages=2, num_warps=2)
    merge = dict(XBLOCK=32, R0_BLOCK=16) if batch_heads >= 32 else dict(XBLOCK=16, R0_BLOCK=64)
    return Tiles(
        scores_numel=batch_heads * length * max(2, rows),
        chunk=chunk,
        scores=scores,
        values=values,
        stats=dict(XBLOCK=2, num_warps=1 if chunk <= 512 else 2, num_stages=1),
        merge=dict(merge, num_warps=4, num_stages=1),
    )


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Compiled:
    """The compiled twin of a function of tensors: one graph a shape, with `tiles` pinned."""

    def __init__(self, function: Callable):
        self.function = function
        self.graphs: dict[tuple, Callable] = {}

    def __call__(self, pinned: Tiles, *args, **constants):
        shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
        key = (shapes, args[0].device, *sorted(constants.items()))
        if key not in self.graphs:
            graph = torch.compile(
                _own(self.function, constants), dynamic=False, fullgraph=True, options=OPTIONS
            )
            with _pinned(pinned):
                graph(*args)
            self.graphs[key] = graph
        return self.graphs[key](*args)


def _own(function: Callable, constants: dict) -> Callable:
    """`function` with `constants` bound, and a code object of its own.

    Dynamo keeps only a few graphs for each code object; here every shape is meant to have one.
    """

    def bound(*args):
        return function(*args, **constants)

    code = bound.__code__.replace(co_name=function.__name__)
    return types.FunctionType(code, bound.__globals__, function.__name__, None, bound.__closure__)


@contextlib.contextmanager
def _pinned(tiles: Tiles):
    """While compiling: use `tiles`, and let an operand of a product read several buffers.

    The second is what fuses exponential and value scale into the product over values.
    """
    from torch._inductor import lowering
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.triton import FixedTritonConfig
    from torch._inductor.virtualized import V

    class Pinned(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            nodes = [getattr(node, "node", None) for node in features.scheduler_nodes()]
            product = any(getattr(n, "get_reduction_type", lambda: None)() == "dot" for n in nodes)
            numel, length = int(features.numel), int(features.reduction_numel)
            if product:
                chosen = tiles.scores if numel == tiles.scores_numel else tiles.values
            elif features.is_reduction():
                chosen = tiles.stats if length == tiles.chunk else tiles.merge
            else:
                return kernel_kwargs
            persistent = "R0_BLOCK" not in chosen
            pinned = {
                "fixed_config": FixedTritonConfig(dict(chosen)),
                "override_persistent_reduction": persistent,
            }
            return {**kernel_kwargs, **pinned}

    realized = lowering.needs_realized_inputs
    held = [op for op in (torch.ops.aten.bmm, torch.ops.aten.bmm.default) if op in realized]
    try:
        realized.difference_update(held)
        with V.set_choices_handler(Pinned()):
            yield
    finally:
        realized.update(held)
