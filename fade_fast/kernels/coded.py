"""Attention of a short step over a layer whose middle is product-quantised.

Ordinary operators of shapes that depend on no data, so that it can be captured; nothing is compiled.
"""

import torch
from torch import Tensor

from . import exact, product
from .merge import merge, of_heads, of_rows, sinks
from .packed import Slots


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    slots: Slots,
    span: int,
    books: tuple[Tensor, Tensor],
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention output [B, q, Hq, D] in the dtype of the query.

    Args:
        query: [B, Hq, q, D].
        keys, values: [B, H, E, D], uncompressed.
        seen: bool [B, 1 or q, E], which of them each query sees.
        slots: of the coded tokens, at full capacity, codes uint8 [B, H, capacity, m] of either side.
        span: how many slots are read: all that `slots.valid` may allow.
        books: codebooks of keys and values, see `product.py`.
        scaling, softcap: of scores. s_aux: [Hq], scores of learned attention sinks, or None.

    Computed in float32, or in float64 if the query is. Raises ValueError as `product.attend`.
    """
    rows = of_rows(query.to(torch.promote_types(query.dtype, torch.float32)) * scaling, keys.shape[1])
    fold = lambda x: x.repeat(1, rows.shape[2] // x.shape[1], 1)[:, None] if x.shape[1] > 1 else x[:, None]  # noqa: E731
    # Slots that no query sees may hold NaN, and 0 * NaN is NaN.
    values = torch.where(values.abs() <= torch.finfo(values.dtype).max, values, 0.0)
    codes = [x.codes.narrow(2, 0, span) for x in (slots.keys, slots.values)]
    valid = fold(slots.valid.narrow(-1, 0, span))
    partials = [
        exact.attend(rows, keys, values, fold(seen), softcap),
        product.attend(rows, codes[0], books[0], codes[1], books[1], valid, softcap),
    ]
    if s_aux is not None:
        partials.append(sinks(rows, s_aux))
    return of_heads(merge(partials), query.shape).to(query.dtype)
