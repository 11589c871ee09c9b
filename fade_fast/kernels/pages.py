"""Pages of some slots, which each query and KV head chose, as tensors of their own.

A page is one run of bytes in each field of a tier. It moves as words of eight bytes where possible.
"""

import torch
from torch import Tensor

from ..compile.compiled import Compiled
from . import halves

WORD = torch.int64


def gather(
    fields: dict[str, Tensor],
    means: Tensor,
    valid: Tensor,
    index: Tensor,
    keep: Tensor | None,
    *,
    page: int,
    per_mean: int,
) -> dict[str, Tensor]:
    """The pages `index` of a tier, a row for each of m queries of each row of the tier.

    Args:
        fields: [B, H, S, *shape] each, contiguous.
        means: [B, H, M, D], one for `per_mean` slots.
        valid: bool [B * m, S], contiguous: which slots hold a token that the query sees.
        index: int64 [B * m, H, n], from 0 to S / page - 1.
        keep: bool [B * m, H, n], which pages count; None: all.
        page: slots of a page, a divisor of S.

    Returns the fields, [B * m, H, n * page, *shape], with "mean", [B * m, H, n, D], and "valid", bool
    [B * m, H, n * page].
    """
    rows = {name: rows_of(x, page) for name, x in fields.items()}
    args = rows, means.flatten(0, 2), valid.view(-1, page), index, keep
    options = dict(heads=means.shape[0] * means.shape[1], page=page, per_mean=per_mean)
    found, mean, seen = _compiled.run(index, *args, **options)
    shape = *index.shape[:2], index.shape[2] * page
    found = {
        name: x.view(fields[name].dtype).reshape(*shape, *fields[name].shape[3:]) for name, x in found.items()
    }
    return found | dict(mean=mean.unflatten(0, index.shape), valid=seen.view(shape))


def rows_of(x: Tensor, page: int) -> Tensor:
    """A field [B, H, S, *shape] as one row per page, [B * H * S / page, W]."""
    batch, heads, slots = x.shape[:3]
    rows = x.view(batch * heads * (slots // page), -1)
    fits = rows.shape[1] * rows.element_size() % WORD.itemsize == 0 and x.data_ptr() % WORD.itemsize == 0
    return rows.view(WORD) if fits else rows


def joined(upper: Tensor, lower: Tensor) -> Tensor:
    """`halves.join` of codes uint8 [..., W], in words where the bytes of a token fill them."""
    fits = all(x.shape[-1] % WORD.itemsize == 0 and x.data_ptr() % WORD.itemsize == 0 for x in (upper, lower))
    parts = [x.view(WORD) if fits else x for x in (upper, lower)]
    return _compiled_join.run(upper, *parts).view(torch.uint8)


def _gather(dynamic_sizes, rows, means, valid, index, keep, *, heads, page, per_mean):
    """Rows of all fields, means and masks. `heads` counts those of all rows of the tier."""
    head = torch.arange(heads, device=index.device).reshape(-1, index.shape[1], 1)
    head = head.repeat_interleave(len(index) // len(head), dim=0)
    found = {}
    for name, x in rows.items():
        found[name] = x.index_select(0, (head * (len(x) // heads) + index).flatten())
    mean = means.index_select(0, (head * (len(means) // heads) + index * page // per_mean).flatten())
    query = torch.arange(len(index), device=index.device).reshape(-1, 1, 1)
    seen = valid.index_select(0, (query * (len(valid) // len(index)) + index).flatten())
    return found, mean, seen if keep is None else seen & keep.reshape(-1, 1)


def _join(dynamic_sizes, upper: Tensor, lower: Tensor) -> Tensor:
    return halves.join(upper, lower)


_compiled, _compiled_join = Compiled(_gather, options={}), Compiled(_join, options={})
