"""Pages chosen by a block table, as an operator that Inductor fuses into what reads them.

PyTorch's own indexing counts negative entries from the end. For that, Inductor loads the number of pages
with the mask of the query rows, the mask comes to the gathered operand of a product, and Triton refuses an
operand with rows that the product does not give it ("reshape() cannot change total number of elements"). Of
16 rows or more the mask vanishes. Here no entry is negative, so that nothing has to be counted or checked.
"""

import functools

import torch
from torch import Tensor


@torch.library.custom_op("fade::pages", mutates_args=())
def pages_of(pages: Tensor, table: Tensor) -> Tensor:
    """`pages[table]`, [*table.shape, *pages.shape[1:]]; entries are from 0 to the number of pages less 1."""
    return pages[table]


@pages_of.register_fake
def _(pages: Tensor, table: Tensor) -> Tensor:
    return pages.new_empty((*table.shape, *pages.shape[1:]))


@functools.cache
def register() -> None:
    """Tell Inductor how to generate the operator; until then it would call it."""
    from torch._inductor.ir import Pointwise
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import ops

    @register_lowering(torch.ops.fade.pages.default, type_promotion_kind=None)
    def lowered(pages, table):
        load, entry = pages.make_loader(), table.make_loader()
        size, axes = pages.get_size(), len(table.get_size())

        def inner(index):
            page = ops.indirect_indexing(entry(index[:axes]), size[0], check=False, wrap_neg=False)
            return load([page, *index[axes:]])

        ranges = [*table.get_size(), *size[1:]]
        return Pointwise.create(
            device=pages.get_device(), dtype=pages.get_dtype(), inner_fn=inner, ranges=ranges
        )
