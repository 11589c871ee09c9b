"""Combine partial attentions by log-sum-exp; exact, in any order and grouping."""

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys, not yet normalized.

    Shapes: `acc` [B, H, R, D] is sum exp(s - row_max) v; `row_max` [B, H, R] is the row maximum of the scores
    s; `row_sum` [B, H, R] is sum exp(s - row_max). A row that sees no key has row_sum 0 and acc 0. R is the
    number of query rows per KV head (group size times query length).
    """

    acc: Tensor
    row_max: Tensor
    row_sum: Tensor


def merge(partials: list[Partial]) -> Tensor:
    """Normalized attention output [B, H, R, D] over the union of the partials' keys.

    A row that saw no key at all gives 0, never NaN.
    """
    row_max = torch.stack([p.row_max for p in partials]).amax(0)
    acc, row_sum = 0, 0
    for p in partials:
        weight = torch.exp(p.row_max - row_max)
        acc = acc + p.acc * weight[..., None]
        row_sum = row_sum + p.row_sum * weight
    return acc / row_sum.clamp_min(torch.finfo(row_sum.dtype).tiny)[..., None]


def empty(query: Tensor) -> Partial:
    """The partial over no keys, for query rows [B, H, R, D]: the start of a loop over tiles."""
    rows = query.shape[:-1]
    lowest = torch.finfo(query.dtype).min
    return Partial(torch.zeros_like(query), query.new_full(rows, lowest), query.new_zeros(rows))


def of_rows(query: Tensor, heads: int) -> Tensor:
    """[B, Hq, q, D] reshaped to the query rows of each KV head, [B, H, Hq / H * q, D]."""
    return query.reshape(query.shape[0], heads, -1, query.shape[-1])


def of_heads(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `of_rows`, transposed to the layout of transformers: [B, q, Hq, D]."""
    return rows.reshape(*shape[:-1], rows.shape[-1]).transpose(1, 2).contiguous()


def sinks(query: Tensor, s_aux: Tensor) -> Partial:
    """Learned attention sinks (gpt-oss): one key per head, of score `s_aux` [Hq] and value 0."""
    row_max = s_aux.to(query.dtype).reshape(1, query.shape[1], -1, 1)
    row_max = row_max.expand(*query.shape[:2], -1, query.shape[2] // row_max.shape[2]).reshape(
        query.shape[:3]
    )
    return Partial(torch.zeros_like(query), row_max, torch.ones_like(row_max))


def combine(one: Partial, other: Partial) -> Partial:
    """One partial over the keys of both, for a loop over tiles."""
    row_max = torch.maximum(one.row_max, other.row_max)
    a, b = torch.exp(one.row_max - row_max), torch.exp(other.row_max - row_max)
    return Partial(
        one.acc * a[..., None] + other.acc * b[..., None], row_max, one.row_sum * a + other.row_sum * b
    )


def soften(scores: Tensor, visible: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softcap, mask and exponentiate one tile of scores.

    Args:
        scores: [B, H, R, n], already scaled.
        visible: bool, broadcastable to `scores`. A key is never attended where this is False, whatever its
            score.
        softcap: c in c * tanh(s / c) (Gemma 2), or None.

    Returns `(weights [B, H, R, n], row_max [B, H, R], row_sum [B, H, R])` as `Partial` defines them.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    floor = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~visible, floor)
    row_max = scores.amax(-1)
    weights = torch.exp(scores - row_max[..., None]).masked_fill(~visible, 0.0)
    return weights, row_max, weights.sum(-1)
