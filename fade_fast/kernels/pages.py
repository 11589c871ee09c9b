"""Pages of some slots, which each query and KV head chose, as tensors of their own.

A page is one run of bytes in each field of a tier. It moves as words of eight bytes where possible.
"""

import torch
from torch import Tensor

from ..compile.compiled import TOGETHER, Compiled
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
    join: tuple[str, str] | None = None,
    given: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The pages `index` of a tier, a row for each of m queries of each row of the tier.

    Args:
        fields: [B, H, S, *shape] each, contiguous.
        means: [B, H, M, D], one for `per_mean` slots.
        valid: bool [B * m, S], contiguous: which slots hold a token that the query sees.
        index: int64 [B * m, H, n], from 0 to S / page - 1.
        keep: bool [B * m, H, n], which pages count; None: all.
        page: slots of a page, a divisor of S.
        join: names of the upper and the lower parts of codes, uint8. They come joined (`halves.join`), under
            the name of the lower part.
        given: those of these parts that are gathered already, [B * m, H, n * page, W].

    Returns the fields, [B * m, H, n * page, *shape], with "mean", [B * m, H, n, D], and "valid", bool
    [B * m, H, n * page].
    """
    given = given or {}
    parts = {} if join is None else {name: given[name] if name in given else fields[name] for name in join}
    slots = 1 if parts and all(_fits(x, 1) for x in parts.values()) else 0
    rows = {name: rows_of(x, page, slots if name in parts else page) for name, x in fields.items()}
    args = rows, means.flatten(0, 2), valid.view(-1, page), index, keep
    given = {name: rows_of(x, page, slots) for name, x in given.items()}
    options = dict(heads=means.shape[0] * means.shape[1], page=page, per_mean=per_mean, join=join)
    found, mean, seen = _compiled.run(index, *args, given, **options)
    shape = *index.shape[:2], index.shape[2] * page
    dtypes = {name: x.dtype for name, x in (fields | parts).items()}
    found = {
        name: x.view(dtypes[name]).reshape(*shape, *((-1,) if name in parts else fields[name].shape[3:]))
        for name, x in found.items()
    }
    return found | dict(mean=mean.unflatten(0, index.shape), valid=seen.view(shape))


def rows_of(x: Tensor, page: int, slots: int | None = None) -> Tensor:
    """A field [B, H, S, *shape] as one row per page, [B * H * S / page, W].

    Elements are words if the bytes of `slots` slots fill some; None: those of a page. 0: never.
    """
    batch, heads, count = x.shape[:3]
    rows = x.view(batch * heads * (count // page), -1)
    slots = page if slots is None else slots
    return rows.view(WORD) if slots and _fits(x, slots) else rows


def _fits(x: Tensor, slots: int) -> bool:
    """Whether the bytes of so many slots of a field fill words."""
    size = slots * x[0, 0, 0].numel() * x.element_size()
    return size % WORD.itemsize == 0 and x.data_ptr() % WORD.itemsize == 0


def _gather(dynamic_sizes, rows, means, valid, index, keep, given, *, heads, page, per_mean, join):
    """Rows of all fields, means and masks. `heads` counts those of all rows of the tier."""
    head = torch.arange(heads, device=index.device).reshape(-1, index.shape[1], 1)
    head = head.repeat_interleave(len(index) // len(head), dim=0)
    found = dict(given)
    for name, x in rows.items():
        found[name] = x.index_select(0, (head * (len(x) // heads) + index).flatten())
    if join is not None:
        upper, lower = (x.view(len(x), page, -1) for x in map(found.pop, join))
        found[join[1]] = halves.join(upper, lower).flatten(1)
    mean = means.index_select(0, (head * (len(means) // heads) + index * page // per_mean).flatten())
    query = torch.arange(len(index), device=index.device).reshape(-1, 1, 1)
    seen = valid.index_select(0, (query * (len(valid) // len(index)) + index).flatten())
    return found, mean, seen if keep is None else seen & keep.reshape(-1, 1)


_compiled = Compiled(_gather, options=TOGETHER)
