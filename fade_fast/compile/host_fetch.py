"""Rows of one of two tensors, as an operator that Inductor fuses: what is not asked for is not loaded.

`torch.where` loads both sides. One of them lies in host memory here, and every load of it crosses PCIe. So
the generated kernel loads each side under a mask.
"""

import functools

import torch
from torch import Tensor


@torch.library.custom_op("fade::rows_of_either", mutates_args=())
def rows_of_either(far: Tensor, near: Tensor, far_row: Tensor, near_row: Tensor, is_far: Tensor) -> Tensor:
    """Row `far_row[i]` of `far` [F, W] where `is_far[i]`, else row `near_row[i]` of `near` [M, W]: [n, W].

    Rows are int64 [n], from 0 to the number of rows less 1; `is_far` is bool [n]. Both tensors have one
    dtype.
    """
    return torch.where(is_far.unsqueeze(-1), far[far_row], near[near_row])


@rows_of_either.register_fake
def _(far, near, far_row, near_row, is_far):
    return near.new_empty((far_row.shape[0], near.shape[1]))


@functools.cache
def register() -> None:
    """Tell Inductor how to generate the operator; until then it would call it."""
    from torch._inductor.ir import Pointwise
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import ops

    @register_lowering(torch.ops.fade.rows_of_either.default, type_promotion_kind=None)
    def lowered(far, near, far_row, near_row, is_far):
        loads = [x.make_loader() for x in (far, near)]
        rows = [x.make_loader() for x in (far_row, near_row)]
        mask, sizes = is_far.make_loader(), [x.get_size()[0] for x in (far, near)]

        def row_of(side: int, index):
            row = ops.indirect_indexing(rows[side](index[:1]), sizes[side], check=False, wrap_neg=False)
            return loads[side]([row, index[1]])

        def inner(index):
            wanted = mask(index[:1])
            far_value = ops.masked(wanted, lambda: row_of(0, index), 0)
            near_value = ops.masked(ops.logical_not(wanted), lambda: row_of(1, index), 0)
            return ops.where(wanted, far_value, near_value)

        return Pointwise.create(
            device=near.get_device(),
            dtype=near.get_dtype(),
            inner_fn=inner,
            ranges=[far_row.get_size()[0], near.get_size()[1]],
        )
