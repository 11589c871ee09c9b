"""Attention of many queries by FlashAttention, with the log-sum-exp that merging needs.

PyTorch's public function does not return the log-sum-exp. The operators behind it do. Source:
FlashAttention-2 (arXiv 2307.08691).
"""

import torch
from torch import Tensor

from .merge import Partial, of_rows

_aten = torch.ops.aten


def takes(query: Tensor, keys: Tensor) -> bool:
    """Whether there is an operator for these tensors. On a GPU, only for half precision."""
    if query.dtype != keys.dtype:
        return False
    if query.is_cuda:
        return query.dtype.itemsize == 2 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return query.device.type == "cpu"


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool = False) -> Partial:
    """Partial attention over keys that every query sees; if `causal`, over keys up to the query's own.

    Args:
        query: [B, Hq, q, D].
        keys, values: [B, H, n, D] of the same dtype, n > 0; if `causal`, n = q.

    Returns a `Partial` of R = Hq / H * q rows in float32, or in float64 for float64 queries. Its `acc` is the
    normalized output, so its row sum is 1.
    """
    heads = keys.shape[1]
    if query.is_cuda:
        result = _aten._scaled_dot_product_flash_attention(
            query, keys, values, is_causal=causal, scale=scaling
        )
    else:
        keys, values = (x.repeat_interleave(query.shape[1] // heads, dim=1) for x in (keys, values))
        result = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, is_causal=causal, scale=scaling
        )
    output, row_max = result[0], result[1].reshape(query.shape[0], heads, -1)
    return Partial(of_rows(output.to(row_max.dtype), heads), row_max, torch.ones_like(row_max))
