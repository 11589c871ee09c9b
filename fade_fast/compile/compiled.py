"""How kernels are compiled: the only file that names options of torch.compile and Inductor.

Each kernel is an eager PyTorch function. On CUDA its twin is compiled once a shape of its buffers, with
tile sizes that were measured instead of searched for, so that nothing is tuned and compiling takes
seconds. How much of the buffers is read is data.
"""

import contextlib
import copy
import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list as compiled_of
from torch._inductor import config as inductor
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._pytree import tree_leaves

from . import page_gather
from .small_matmul import LEAST, RowProducts, few_tile, of_few_rows, tile

#: Without `native_matmul`, a batched product cannot take its operand from arithmetic on bytes. With
#: `shape_padding`, Inductor benchmarks at compile time whether to pad 4 query rows to 8; where it does,
#: nothing fuses. A split reduction would write the scores' statistics in two kernels. The thresholds leave
#: it to `packed.force_materialize` where one kernel ends and the next begins.
OPTIONS = {
    "triton.native_matmul": True,
    "shape_padding": False,
    "use_fast_math": True,
    "split_reductions": False,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_reads_threshold": 1000,
}
#: What a model's step is compiled with, `row_products`, is not for the kernels that are compiled within it.
APART = {"triton.native_matmul": False, "post_grad_custom_pre_pass": None}
#: For small updates of several buffers that need nothing of each other: in one kernel.
TOGETHER = {"combo_kernels": True}

#: Modes of torch.compile in which Inductor captures CUDA graphs, and the same without; and its option.
UNCAPTURED = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
CAPTURES = "triton.cudagraphs"

#: What calls are dispatched by where nothing unusual is going on; `Compiled` restores it.
PLAIN = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

#: Block sizes, warps and stages of the generated kernels of one graph, by how many numbers a kernel
#: computes and how many it sums for each. A config without R0_BLOCK sums all of them at once.
Tiles = dict[tuple[int, int], dict]


def tier_tiles(
    heads: int,
    rows: int,
    blocks: int,
    chunk: int,
    bits: tuple[int, int],
    widths: tuple[int, int],
    dim: int,
    paged: bool = False,
) -> Tiles:
    """Of one tier, measured on an H100 for 2 to 64 rows (docs/lab-notebook.md).

    Args:
        heads: batch times KV heads. rows: query rows of each, at least 2.
        blocks: chunks of `chunk` tokens.
        bits, widths: of keys and values, bits a code and codes a field. dim: head_dim.
        paged: whether there is a block table; measured on an H200 for 4 rows.
    """
    x, (key_width, value_width) = _power_of_two(rows), widths
    scores = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=128, R0_BLOCK=16, num_warps=2, num_stages=3)
    if key_width % 32 == 0:
        scores["R0_BLOCK"] = 32 if x <= 4 else 64
    if x > 4:
        scores.update(YBLOCK=64, num_warps=2 if x <= 8 else 4, num_stages=2)
    if bits[0] == 8:
        whole = next((n for n in (64, 32) if key_width % n == 0), 16)  # without a mask if that can be
        scores.update(R0_BLOCK=whole, num_warps=4, num_stages=2)
    elif key_width == 64 and x <= 8:  # the sum is one tile: nothing to pipeline
        scores.update(R0_BLOCK=64, YBLOCK=128, num_warps=2, num_stages=1)
        if chunk > 1024 and x <= 4:
            scores.update(YBLOCK=256, num_warps=4)
    if key_width == 32:
        scores.update(R0_BLOCK=32, YBLOCK=64, num_warps=1, num_stages=1)
    values = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=min(128, max(16, _power_of_two(value_width))))
    values.update(R0_BLOCK=128, num_warps=2 if value_width <= 64 else 4)
    values.update(num_stages={2: 4, 4: 3}.get(x, 2))  # more rows leave less room for stages
    if bits[1] == 8:  # wider sums
        values.update(num_warps=4)
        if chunk >= 512 and x <= 4:  # of whole halves, see `packed._chosen`
            values.update(num_warps=2, num_stages=3)
    if chunk <= 256 or chunk == 512 and x <= 4 and heads < 32:
        values.update(R0_BLOCK=64, num_stages=4, num_warps=1 if value_width <= 64 else 2)
    if chunk <= 128:
        values.update(num_stages=2, num_warps=2)
    stats = dict(XBLOCK=4, num_warps=min(8, max(1, chunk // (128 if chunk <= 512 else 256))), num_stages=1)
    if paged:
        # A pipeline of loads by a table takes a third longer than many small programs that do not load
        # ahead. A row of codes ends with its page: of fewer tokens, a warp loads longer pieces.
        values.update(R0_BLOCK=64, num_stages=4, num_warps=1 if x <= 8 else 2 if x <= 16 else 4)
        if heads * blocks >= 2048:
            values.update(R0_BLOCK=64 if bits[1] >= 4 else 32, num_stages=1)
        stats.update(XBLOCK=1, num_warps=1)  # the rows of a program would exchange their scales
    join = dict(XBLOCK=16, R0_BLOCK=16 if heads >= 32 else 64, num_warps=4)
    if heads >= 32 and blocks <= 32:
        join.update(XBLOCK=32, R0_BLOCK=max(4, _power_of_two(blocks)), num_warps=2 if blocks > 8 else 1)
    # No stages: a pipeline of operands that are decoded takes eight times as long.
    decode = dict(ZBLOCK=1, XBLOCK=128, YBLOCK=128, num_warps=8, num_stages=1)
    decode.update(R0_BLOCK=64 if dim % 64 == 0 else 32)
    length = blocks * chunk
    return {
        (heads * length * dim, dim): decode,
        (heads * length * rows, dim // 2): dict(scores, R0_BLOCK=32 if dim % 64 == 0 else 16),
        (heads * length * rows, key_width): scores,
        (heads * blocks * value_width * rows, chunk): values,
        (heads * blocks * rows, chunk): stats,
        (heads * value_width * rows, blocks): dict(join, num_stages=1),
    }


def step_tiles(heads: int, rows: int, exact: int, means: int, dim: int) -> Tiles:
    """Of what surrounds the tiers: `exact` uncompressed tokens, and as many means as all tiers have."""
    x, table = _power_of_two(rows), dim + 1 + exact + means
    first = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=16, R0_BLOCK=64, num_warps=2, num_stages=1)
    if heads * table >= 1 << 14:
        first.update(YBLOCK=32, num_warps=4)
    if dim % 128:  # a half is summed, in whole tiles
        first.update(R0_BLOCK=32)
    # All at once if it fits: a kernel this small waits for its loads, and so for nothing else.
    last = dict(ZBLOCK=1, XBLOCK=32 if heads >= 32 else 16, YBLOCK=x, num_stages=1)
    last.update(R0_BLOCK=min(512, _power_of_two(exact + dim)), num_warps=4 if x <= 4 else 8)
    if x > 8:
        last.update(XBLOCK=64, R0_BLOCK=64, num_warps=4, num_stages=2)
    return {
        (heads * table * rows, dim // 2): first,
        (heads * rows, exact): dict(XBLOCK=1, R0_BLOCK=256, num_warps=1, num_stages=1),
        (heads * rows * dim, exact + dim): last,
    }


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


#: Types of devices on which twins run.
COMPILED_ON = {"cuda"}


def use_compiled(x: Tensor) -> bool:
    """Whether functions of tensors like `x` run as their compiled twins."""
    return x.device.type in COMPILED_ON


def rounded(columns: int) -> int:
    """Columns that a twin is compiled for, to serve these: few different numbers."""
    return _power_of_two(columns)


def more_rows(x: Tensor, rows: int) -> Tensor:
    """`x` [..., n, D] with zeros below, `rows` in all; one row, which stands for all, stays one."""
    return x if x.shape[-2] == 1 else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[-2]))


@functools.cache
def dynamic_size(n: int) -> Tensor:
    """A tensor that says `n` by its length, so that a compiled graph need not know it.

    One more than n, for the compiler makes constants of 0 and 1.
    """
    dynamic_size = torch.empty(1, dtype=torch.uint8).expand(n + 1)
    torch._dynamo.mark_dynamic(dynamic_size, 0)
    return dynamic_size


def uncaptured(config, device: torch.device):
    """A `transformers.CompileConfig` by which Inductor compiles as by `config`, but captures no CUDA graphs.

    None if by `config` it captures none either, on this device.
    """
    options = config.options or {}
    captures = config.mode in UNCAPTURED or options.get(CAPTURES)
    if device.type != "cuda" or config.backend != "inductor" or not captures:
        return None
    config = copy.copy(config)
    config.mode = UNCAPTURED.get(config.mode, config.mode)
    config.options = {name: x for name, x in options.items() if name != CAPTURES} or None
    return config


class Compiled:
    """The compiled twin of a function of tensors: one graph a shape, with its tiles pinned."""

    def __init__(self, function: Callable, options: dict = OPTIONS):
        self.function, self.options = function, APART | options
        self.graphs: dict[tuple, tuple[Callable, types.CodeType]] = {}  # and what the compiler knows each by

    def __call__(self, dynamic_sizes: list[Tensor], pinned: Callable[[], Tiles], *args, **constants):
        """Call the twin on `args`, and `dynamic_sizes`, tensors whose length may differ between calls."""
        shapes = tuple(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x
            for x in tree_leaves(args)
        )
        key = (shapes, *constants.items())
        if key in self.graphs and not compiled_of(self.graphs[key][1]):
            del self.graphs[key]  # `torch._dynamo.reset()` dropped it; the next has to have its tiles, too
        # Inside the first call of another compiled graph, tensors show other dispatch keys than in later
        # ones; the twin would then be compiled again, and where that graph is being captured, it cannot.
        with torch._C._ForceDispatchKeyGuard(*PLAIN):
            return self._call(key, dynamic_sizes, pinned, args, constants)

    def _call(self, key: tuple, dynamic_sizes: list[Tensor], pinned: Callable[[], Tiles], args, constants):
        if key not in self.graphs:
            tiles = pinned()
            own = _own(self.function, constants)
            graph = torch.compile(own, fullgraph=True, options=self.options)
            tag = torch.compiler.config.patch(cache_key_tag=str(tiles))  # for graphs kept on disk
            with (
                _pinned(tiles),
                tag,
                torch._dynamo.config.patch(automatic_dynamic_shapes=False),  # but for the markers
                symbolic_shapes.patch(use_duck_shape=False),  # equal lengths may part later
            ):
                result = graph(dynamic_sizes, *args)
            self.graphs[key] = graph, own.__code__
            return result
        return self.graphs[key][0](dynamic_sizes, *args)


def _own(function: Callable, constants: dict) -> Callable:
    """`function` with `constants` bound, and a code object of its own.

    Dynamo keeps only a few graphs for each code object; here every shape is meant to have one.
    """

    def bound(*args):
        return function(*args, **constants)

    code = bound.__code__.replace(co_name=function.__name__)
    return types.FunctionType(code, bound.__globals__, function.__name__, None, bound.__closure__)


@contextlib.contextmanager
def row_products():
    """While compiling a model's step: its products of up to `rows.MOST` rows are generated, see `rows.py`.

    Nothing is tuned: of one row, one set of tiles is within 5 % of the best of 28 or more for each of five
    shapes, of 8 rows four sets are the best of 20 to 24 (docs/lab-notebook.md).
    """
    from torch._inductor.kernel import bmm, mm
    from torch._inductor.virtualized import V

    own = inductor.post_grad_custom_pre_pass or RowProducts()
    theirs = mm.use_native_matmul
    # To generate one product, Inductor must be told that it may generate any, and then which.
    options = {"post_grad_custom_pre_pass": own, "triton.native_matmul": True}
    try:
        mm.use_native_matmul = bmm.use_native_matmul = functools.partial(_generates, theirs)
        with V.set_choices_handler(_row_choices()), inductor.patch(options):
            yield
    finally:
        mm.use_native_matmul = bmm.use_native_matmul = theirs


def _generates(theirs: Callable, rows, matrix) -> bool:
    """Whether Inductor generates a product that it is about to lower, or leaves it to a library."""
    from torch._inductor.virtualized import V

    if V.choices is not _row_choices():  # a kernel that is compiled as the step first runs
        return theirs(rows, matrix)
    if inductor.triton.use_block_ptr or inductor.triton.enable_persistent_tma_matmul:
        return False  # these two it cannot have together
    hint = V.graph.sizevars.optimization_hint
    few = of_few_rows(V.graph.current_node, int(hint(rows.get_size()[0])))
    if not few or not theirs(rows, matrix):
        return False
    rows.realize()  # or each program would compute them anew, of each tile
    return True


@functools.cache
def _row_choices():
    """The choices of Inductor, but for the tiles of such products."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Rows(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            if not features.is_reduction():
                return kernel_kwargs
            hint = lambda n: int(V.graph.sizevars.optimization_hint(n))  # noqa: E731
            results, summands = hint(features.numel), hint(features.reduction_numel)
            if any(node.is_native_matmul() for node in features.reduction_nodes()):
                rows = hint(groups[0]["y"])
                return {**kernel_kwargs, **_fixed(few_tile(results // rows, summands))}
            if min(results, summands) < LEAST:
                return kernel_kwargs
            return {**kernel_kwargs, **_fixed(tile(summands))}

    return Rows()


@contextlib.contextmanager
def _pinned(tiles: Tiles):
    """While compiling: use `tiles`, and let an operand of a product read several buffers.

    The second is what fuses exponential and value scale into the product over values.
    """
    from torch._inductor import lowering
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Pinned(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            hint = V.graph.sizevars.optimization_hint
            chosen = tiles.get((int(hint(features.numel)), int(hint(features.reduction_numel))))
            if chosen is None or not features.is_reduction():
                return kernel_kwargs
            if "ZBLOCK" in chosen and "z" not in groups[0]:  # a batch that became rows
                chosen = {name: n for name, n in chosen.items() if name != "ZBLOCK"}
            return {**kernel_kwargs, **_fixed(chosen)}

    page_gather.register()
    realized = lowering.needs_realized_inputs
    held = [op for op in (torch.ops.aten.bmm, torch.ops.aten.bmm.default) if op in realized]
    try:
        realized.difference_update(held)
        with V.set_choices_handler(Pinned()):
            yield
    finally:
        realized.update(held)


def _fixed(tile: dict) -> dict:
    """What a kernel is made with, to have these block sizes, warps and stages."""
    from torch._inductor.codegen.triton import FixedTritonConfig

    return {
        "fixed_config": FixedTritonConfig(dict(tile)),
        "override_persistent_reduction": "R0_BLOCK" not in tile,
    }
