"""Compilation of kernels: the only file that names options of torch.compile and Inductor.

Each kernel is an eager PyTorch function. On CUDA its compiled version is compiled once per shape of its
buffers, with measured tile sizes instead of autotuning, so compiling takes seconds. The number of slots read
is data.
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

#: Without `native_matmul`, a batched product cannot compute its operand from bytes. With `shape_padding`,
#: Inductor benchmarks at compile time whether to pad 4 query rows to 8; a padded product does not fuse. A
#: split reduction would compute the statistics of the scores in two kernels. With these thresholds,
#: `packed.force_materialize` alone decides where one kernel ends and the next begins.
OPTIONS = {
    "triton.native_matmul": True,
    "shape_padding": False,
    "use_fast_math": True,
    "split_reductions": False,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_reads_threshold": 1000,
}
#: Resets the options of `row_products`, which compiles a model's step, for kernels compiled within the step.
APART = {"triton.native_matmul": False, "post_grad_custom_pre_pass": None}
#: One kernel for small, independent updates of several buffers.
TOGETHER = {"combo_kernels": True}

#: Modes of torch.compile with CUDA graph capture -> without; and the option of Inductor that captures.
UNCAPTURED = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
CAPTURES = "triton.cudagraphs"

#: The thread's dispatch keys in its normal state; `Compiled` restores them.
PLAIN = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

#: Block sizes, warps and stages of the generated kernels of one graph, by the number of results of a kernel
#: and the number of summands per result. A config without R0_BLOCK sums all summands at once.
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
    """Tiles of one tier, measured on an H100 for 2 to 64 rows (docs/lab-notebook.md).

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
        block = next((n for n in (64, 32) if key_width % n == 0), 16)  # a divisor needs no mask
        scores.update(R0_BLOCK=block, num_warps=4, num_stages=2)
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
        if chunk >= 512 and x <= 4:  # these suit `packed._chosen`
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
    # No stages: pipelining decoded operands takes eight times as long.
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
    """Tiles of a step outside the tiers, with the arguments of `tier_tiles`.

    Args:
        exact: number of uncompressed tokens.
        means: number of means of all tiers.
    """
    x, table = _power_of_two(rows), dim + 1 + exact + means
    first = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=16, R0_BLOCK=64, num_warps=2, num_stages=1)
    if heads * table >= 1 << 14:
        first.update(YBLOCK=32, num_warps=4)
    if dim % 128:  # half of head_dim is summed, in whole tiles
        first.update(R0_BLOCK=32)
    # One block if it fits: such a small kernel then waits for its loads alone.
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


#: Device types on which compiled versions run.
COMPILED_ON = {"cuda"}


def use_compiled(x: Tensor) -> bool:
    """Whether functions of tensors like `x` run as compiled versions."""
    return x.device.type in COMPILED_ON


def rounded(tokens: int) -> int:
    """The token count of the compiled version that serves `tokens` tokens: the next power of two."""
    return _power_of_two(tokens)


def more_rows(x: Tensor, rows: int) -> Tensor:
    """`x` [..., n, D] padded with zero rows to `rows` rows. A single row, which broadcasts, stays single."""
    return x if x.shape[-2] == 1 else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[-2]))


@functools.cache
def dynamic_size(n: int) -> Tensor:
    """A tensor whose length encodes `n`, so that a compiled graph does not depend on its value.

    The length is n + 1, because the compiler makes constants of 0 and 1.
    """
    marker = torch.empty(1, dtype=torch.uint8).expand(n + 1)
    torch._dynamo.mark_dynamic(marker, 0)
    return marker


def uncaptured(config, device: torch.device):
    """A copy of a `transformers.CompileConfig` with which Inductor captures no CUDA graphs.

    None if `config` captures none either on this device.
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
    """The compiled version of a function of tensors: one graph per shape, with its tiles pinned."""

    def __init__(self, function: Callable, options: dict = OPTIONS):
        self.function, self.options = function, APART | options
        # Each graph, and the code object by which Dynamo finds it.
        self.graphs: dict[tuple, tuple[Callable, types.CodeType]] = {}

    def __call__(self, dynamic_sizes: list[Tensor], pinned: Callable[[], Tiles], *args, **constants):
        """Call the compiled version on `args`.

        `dynamic_sizes` are tensors whose length may differ between calls.
        """
        shapes = tuple(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x
            for x in tree_leaves(args)
        )
        key = (shapes, *constants.items())
        if key in self.graphs and not compiled_of(self.graphs[key][1]):
            del self.graphs[key]  # `torch._dynamo.reset()` dropped it; the new graph needs its tiles, too
        # Inside the first call of another compiled graph, tensors show other dispatch keys than in later
        # calls. Then this function would be compiled again, and a CUDA graph capture does not allow that.
        with torch._C._ForceDispatchKeyGuard(*PLAIN):
            return self._call(key, dynamic_sizes, pinned, args, constants)

    def _call(self, key: tuple, dynamic_sizes: list[Tensor], pinned: Callable[[], Tiles], args, constants):
        if key not in self.graphs:
            tiles = pinned()
            bound = _own(self.function, constants)
            graph = torch.compile(bound, fullgraph=True, options=self.options)
            tag = torch.compiler.config.patch(cache_key_tag=str(tiles))  # for graphs in the disk cache
            with (
                _pinned(tiles),
                tag,
                torch._dynamo.config.patch(automatic_dynamic_shapes=False),  # except `dynamic_sizes`
                symbolic_shapes.patch(use_duck_shape=False),  # equal lengths may differ later
            ):
                result = graph(dynamic_sizes, *args)
            self.graphs[key] = graph, bound.__code__
            return result
        return self.graphs[key][0](dynamic_sizes, *args)


def _own(function: Callable, constants: dict) -> Callable:
    """`function` with `constants` bound, and with a new code object.

    Dynamo keeps only a few graphs per code object, and here every shape needs a graph.
    """

    def bound(*args):
        return function(*args, **constants)

    code = bound.__code__.replace(co_name=function.__name__)
    return types.FunctionType(code, bound.__globals__, function.__name__, None, bound.__closure__)


@contextlib.contextmanager
def row_products():
    """Let Inductor generate products of up to `MOST` rows, see `small_matmul.py`, while it compiles a step.

    Nothing is tuned. For one row, one set of tiles is within 5 % of the best of 28 or more, for each of five
    shapes. For 8 rows, four sets are the best of 20 to 24 (docs/lab-notebook.md).
    """
    from torch._inductor.kernel import bmm, mm
    from torch._inductor.virtualized import V

    products = inductor.post_grad_custom_pre_pass or RowProducts()
    original = mm.use_native_matmul
    # Inductor must be allowed to generate all products. Then `_generates` decides for each product.
    options = {"post_grad_custom_pre_pass": products, "triton.native_matmul": True}
    try:
        mm.use_native_matmul = bmm.use_native_matmul = functools.partial(_generates, original)
        with V.set_choices_handler(_row_choices()), inductor.patch(options):
            yield
    finally:
        mm.use_native_matmul = bmm.use_native_matmul = original


def _generates(original: Callable, rows, matrix) -> bool:
    """Whether Inductor generates the product that it is about to lower; otherwise a library computes it."""
    from torch._inductor.virtualized import V

    if V.choices is not _row_choices():  # a kernel that is compiled during the step's first run
        return original(rows, matrix)
    if inductor.triton.use_block_ptr or inductor.triton.enable_persistent_tma_matmul:
        return False  # Inductor cannot combine these options with generated products
    hint = V.graph.sizevars.optimization_hint
    few = of_few_rows(V.graph.current_node, int(hint(rows.get_size()[0])))
    if not few or not original(rows, matrix):
        return False
    rows.realize()  # otherwise each program would recompute them for each tile
    return True


@functools.cache
def _row_choices():
    """The choices of Inductor, except for the tiles of these products."""
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

    The second change fuses the exponential and the value scale into the product over values.
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
            if "ZBLOCK" in chosen and "z" not in groups[0]:  # the batch became rows
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
    """The arguments that give a kernel these block sizes, warps and stages."""
    from torch._inductor.codegen.triton import FixedTritonConfig

    return {
        "fixed_config": FixedTritonConfig(dict(tile)),
        "override_persistent_reduction": "R0_BLOCK" not in tile,
    }
