"""Attention of a short step over a layer whose middle is product-quantized.

When compiled, one kernel computes the scores by looking codes up in the tables of the queries, and the output
is a sum over tokens of the centroids that their codes name. Otherwise `product.attend` works tile by tile.
"""

import torch
from torch import Tensor

from ..compile.compiled import Compiled, dynamic_size, use_compiled
from . import dense, product
from .decode import MOST_ROWS
from .merge import Partial, merge, of_heads, of_rows, sinks, soften
from .packed import TierView, force_materialize

UNIT = 128  # the number of slots read is a multiple of this: see `packed.chunk_of`


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    view: TierView,
    num_read: int,
    codebooks: tuple[Tensor, Tensor],
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
        view: the coded tokens at full capacity; codes uint8 [B, H, capacity, m] of keys and of values.
        num_read: number of slots read; covers every slot that `view.valid` may allow.
        codebooks: of keys and of values, see `product.py`.
        scaling, softcap: of scores.
        s_aux: [Hq], scores of learned attention sinks, or None.

    Computed in float32, or in float64 if the query is float64. Raises ValueError as `product.attend`.
    """
    rows = of_rows(query.to(torch.promote_types(query.dtype, torch.float32)) * scaling, keys.shape[1])
    fold = lambda x: x.repeat(1, rows.shape[2] // x.shape[1], 1)[:, None] if x.shape[1] > 1 else x[:, None]  # noqa: E731
    # Slots that no query sees may hold NaN, and 0 * NaN is NaN.
    values = torch.where(values.abs() <= torch.finfo(values.dtype).max, values, 0.0)
    valid = fold(view.valid)
    sides = [(x.codes, book) for x, book in zip((view.keys, view.values), codebooks)]
    fused = use_compiled(query) and query.dtype.itemsize == 2 and rows.shape[2] <= MOST_ROWS
    if fused and UNIT <= num_read < valid.shape[-1] and num_read % UNIT == 0:
        coded = _compiled(
            [dynamic_size(num_read // UNIT)], dict, rows, *sides[0], *sides[1], valid, softcap=softcap
        )
    else:
        sides = [(codes.narrow(2, 0, num_read), book) for codes, book in sides]
        coded = product.attend(rows, *sides[0], *sides[1], valid.narrow(-1, 0, num_read), softcap)
    partials = [dense.attend(rows, keys, values, fold(seen), softcap), coded]
    if s_aux is not None:
        partials.append(sinks(rows, s_aux))
    return of_heads(merge(partials), query.shape).to(query.dtype)


def _look_up(
    dynamic_sizes, query, key_codes, key_book, value_codes, value_book, visible, *, softcap: float | None
) -> Partial:
    """`product.attend` over the first slots at once, `UNIT` times the number that `dynamic_sizes` tells."""
    num_read = (dynamic_sizes[0].shape[0] - 1) * UNIT
    parts, centroids, width = key_book.shape
    batch, heads, rows = query.shape[:3]
    number = lambda n, *after: torch.arange(n, device=query.device).reshape(n, *(1 for _ in after))  # noqa: E731
    table = torch.einsum("bhrmw,mkw->bhrmk", query.unflatten(-1, (parts, width)), key_book.to(query.dtype))
    code = key_codes.narrow(2, 0, num_read).long().clamp_max(centroids - 1).unsqueeze(2)  # [B, H, 1, n, m]
    at = number(batch, *"hrnm"), number(heads, *"rnm"), number(rows, *"nm"), number(parts), code
    weights, row_max, row_sum = soften(
        force_materialize(table[at].sum(-1)), visible.narrow(-1, 0, num_read), softcap
    )
    code = value_codes.narrow(2, 0, num_read).long().clamp_max(value_book.shape[1] - 1)  # [B, H, n, m]
    picked = value_book.to(query.dtype)[number(len(value_book)), code].flatten(3)  # [B, H, n, D]
    # Otherwise the exponential of a token would be computed for each of its elements.
    return Partial((force_materialize(weights).unsqueeze(-1) * picked.unsqueeze(2)).sum(3), row_max, row_sum)


_compiled = Compiled(_look_up, options={})
