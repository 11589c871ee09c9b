"""Attention of many queries by kernels of PyTorch, with the log-sum-exp that merging needs.

PyTorch's public function does not return the log-sum-exp. The operators behind it do. On a GPU they are
FlashAttention-2 (arXiv 2307.08691) for half precision and, where tokens are hidden or for float32,
memory-efficient attention (arXiv 2112.05682).
"""

import torch
from torch import Tensor

from .merge import Partial, of_rows

_aten = torch.ops.aten


ALIGNED = 16  # elements: memory-efficient attention loads masks in pieces, from addresses of these multiples


def takes(query: Tensor, keys: Tensor) -> bool:
    """Whether there is an operator for these tensors. On a GPU, there is none for float64."""
    if query.dtype != keys.dtype:
        return False
    if query.is_cuda:
        return query.dtype.itemsize <= 4 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return query.device.type == "cpu"


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    causal: bool = False,
    seen: Tensor | None = None,
) -> Partial:
    """Partial attention over keys: all of them; if `causal`, those up to the query's own; or those `seen`.

    Args:
        query: [B, Hq, q, D].
        keys, values: [B, H, n, D] of the same dtype, n > 0, finite; if `causal`, n = q.
        seen: bool [B or 1, 1, q, n], without `causal`. A query may see no key.

    Returns a `Partial` of R = Hq / H * q rows in float32, or in float64 for float64 queries. Its `acc` is the
    normalized output, so the row sum of a query that sees a key is 1.
    """
    heads, group = keys.shape[1], query.shape[1] // keys.shape[1]
    if query.is_cuda and query.dtype.itemsize == 2 and seen is None:
        result = _aten._scaled_dot_product_flash_attention(
            query, keys, values, is_causal=causal, scale=scaling
        )
    else:
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        bias = None if seen is None else _bias(seen, query)
        if query.is_cuda:
            result = _aten._scaled_dot_product_efficient_attention(
                query, keys, values, bias, True, is_causal=causal, scale=scaling
            )
        else:
            result = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, is_causal=causal, attn_mask=bias, scale=scaling
            )
    # Memory-efficient attention may round the number of queries up.
    output, row_max = result[0], result[1][..., : query.shape[2]].reshape(query.shape[0], heads, -1)
    acc, row_sum = of_rows(output.to(row_max.dtype), heads), torch.ones_like(row_max)
    if seen is not None:  # what the operators return for a query that sees nothing differs
        any_key = seen.any(-1).repeat(1, 1, group).expand_as(row_max)
        acc = torch.where(any_key.unsqueeze(-1), acc, 0.0)
        row_max = torch.where(any_key, row_max, torch.finfo(row_max.dtype).min)
        row_sum = any_key.to(row_max.dtype)
    return Partial(acc, row_max, row_sum)


def _bias(seen: Tensor, query: Tensor) -> Tensor:
    """`seen` as numbers that are added to scores, [B, Hq, q, n] of the dtype of `query`, aligned."""
    batch, queries, count = seen.shape[0], seen.shape[2], seen.shape[3]
    width = -(-count // ALIGNED) * ALIGNED
    bias = query.new_zeros(batch, 1, queries, width)[..., :count]
    return bias.masked_fill_(~seen, -torch.inf).expand(*query.shape[:3], count)
