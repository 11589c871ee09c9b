"""What we change of Inductor while it compiles: which products it generates, their tiles, and CUDA graphs.

Each change is undone when its context ends.
"""

import contextlib
import copy
import functools
from collections.abc import Callable

import torch
from torch._inductor import config as inductor

from . import host_fetch, page_gather
from .small_matmul import LEAST, RowProducts, few_tile, of_few_rows, tile
from .start import without_collection
from .tiles import Tiles

#: Modes of torch.compile with CUDA graph capture -> without; and the option of Inductor that captures.
UNCAPTURED = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
CAPTURES = "triton.cudagraphs"


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
        with V.set_choices_handler(_row_choices()), inductor.patch(options), without_collection():
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
def pinned_tiles(tiles: Tiles):
    """While compiling: use `tiles`, and let an operand of a product read several buffers.

    The second change fuses the exponential and the value scale into the product over values.
    """
    from torch._inductor import lowering
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Pinned(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            hint = V.graph.sizevars.optimization_hint
            results, summands = int(hint(features.numel)), int(hint(features.reduction_numel))
            chosen = tiles.get((results, summands), tiles.get((None, summands)))
            if chosen is None:
                return kernel_kwargs
            if "YBLOCK" in chosen and "y" not in groups[0]:  # a sum, no product, over as many numbers
                return kernel_kwargs
            if "ZBLOCK" in chosen and "z" not in groups[0]:  # the batch became rows
                chosen = {name: n for name, n in chosen.items() if name != "ZBLOCK"}
            if features.is_reduction():
                return {**kernel_kwargs, **_fixed(chosen)}
            if "R0_BLOCK" in chosen:  # a sum of one summand became a kernel without sums
                return kernel_kwargs
            return {**kernel_kwargs, **_fixed_rows(chosen, groups[0])}

    page_gather.register()
    host_fetch.register()
    realized = lowering.needs_realized_inputs
    held = [op for op in (torch.ops.aten.bmm, torch.ops.aten.bmm.default) if op in realized]
    try:
        realized.difference_update(held)
        with V.set_choices_handler(Pinned()):
            yield
    finally:
        realized.update(held)


def _fixed(tile: dict) -> dict:
    """The arguments that give a kernel with sums these block sizes, warps and stages."""
    return {**_config(tile), "override_persistent_reduction": "R0_BLOCK" not in tile}


def _fixed_rows(tile: dict, axes) -> dict:
    """The arguments that give these to a kernel without sums: one place of each further axis a program."""
    return _config(tile | {f"{axis.upper()}BLOCK": 1 for axis in ("y", "z") if axis in axes})


def _config(tile: dict) -> dict:
    from torch._inductor.codegen.triton import FixedTritonConfig

    return {"fixed_config": FixedTritonConfig(dict(tile))}
