"""Attention of many queries by kernels of PyTorch, with the log-sum-exp that merging needs.

PyTorch's public function does not return the log-sum-exp. The operators behind it do. On a GPU they are
FlashAttention-2 (arXiv 2307.08691) for half precision and, where tokens are hidden or for float32,
memory-efficient attention (arXiv 2112.05682).
"""

import torch
from torch import Tensor

from .merge import Partial, of_heads, of_rows

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


def takes_ragged(query: Tensor) -> bool:
    """Whether `ragged` serves queries like these. On a GPU, FlashAttention takes half precision alone."""
    return takes(query, query) and (query.dtype.itemsize == 2 or not query.is_cuda)


def ragged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    queries_from: Tensor,
    keys_from: Tensor,
    used: Tensor,
    longest: tuple[int, int],
    scaling: float,
    causal: bool,
    back: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of requests of any lengths, each over keys of its own.

    Args:
        query: [T, Hq, D], the queries of one request after another.
        keys, values: [E, H, D], finite where they are read.
        queries_from: int32 [R + 1], the first query of each request, and T.
        keys_from: int32 [R + 1], the first key of each request, and the end of the last one's.
        used: int32 [R], how many keys of a request are read; 0: its queries see nothing.
        longest: the most queries and keys that a request may have.
        causal: the last query of a request sees its last key, and each query one key less than the next one.
            A query may see no key.
        back: if `causal`: a query sees this many keys before its last one. None: all of them.

    Returns the outputs [T, Hq, D], and their log-sum-exp [Hq, T] in float32 or float64: infinite, beside an
    output of 0, where a query sees nothing.
    """
    if query.is_cuda:
        output, lse, *_ = _aten._flash_attention_forward(
            query, keys, values, queries_from, keys_from, *longest, 0.0, causal and back is None, False,
            scale=scaling, window_size_left=-1 if back is None else back,
            window_size_right=0 if causal else -1, seqused_k=used,
        )  # fmt: skip
        return output, lse
    outputs, lses = [], []
    starts = queries_from.tolist()
    for begin, end, first, count in zip(starts, starts[1:], keys_from.tolist(), used.tolist()):
        rows = query[begin:end].transpose(0, 1).unsqueeze(0)
        if not count or begin == end:
            outputs.append(torch.zeros_like(query[begin:end]))
            wide = torch.promote_types(query.dtype, torch.float32)
            lses.append(query.new_full((query.shape[1], end - begin), torch.inf, dtype=wide))
            continue
        held = (x[first : first + count].transpose(0, 1).unsqueeze(0) for x in (keys, values))
        seen = None
        if causal:
            last = torch.arange(end - begin).unsqueeze(1) + count - (end - begin)
            position = torch.arange(count)
            seen = position <= last
            if back is not None:
                seen &= position >= last - back
            seen = seen[None, None]
        part = attend(rows, *held, scaling, seen=seen)
        outputs.append(of_heads(part.acc, rows.shape)[0].to(query.dtype))
        lse = torch.where(part.row_sum > 0, part.row_max, torch.inf)
        lses.append(lse.reshape(query.shape[1], -1))
    return torch.cat(outputs), torch.cat(lses, dim=1)
