"""Attention over one tier, and the merge of tiers.

One batch row at a time. A query is [Hq, q, D]; keys and values are [H, n, D]. The Hq / H query heads of a
group share a KV head (GQA). Everything is float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .matched import MatchedCodec
from .rope import alibi_bias
from .rotation import Record, RotatedCodec


class Partial(NamedTuple):
    """Attention over some of the keys, not yet normalized (FlashAttention, arXiv 2205.14135, section 3.1).

    If a query sees no key: acc 0, top -inf, total 0.
    """

    acc: Tensor  # [Hq, q, D], sum_t exp(s_t - top) v_t
    top: Tensor  # [Hq, q], the largest score s_t
    total: Tensor  # [Hq, q], sum_t exp(s_t - top)


class Terms(NamedTuple):
    """How a model turns inner products into scores."""

    scaling: float  # multiplies q.k
    softcap: float | None = None  # c: then s becomes c tanh(s / c) (Gemma 2, arXiv 2408.00118, section 2)
    window: int | None = None  # positions that a query sees, its own included
    slopes: Tensor | None = None  # [Hq], of ALiBi
    s_aux: Tensor | None = None  # [Hq], scores of learned attention sinks, see `sink`

    def of(self, heads: list[int]) -> "Terms":
        """The terms of some query heads."""
        pick = lambda x: None if x is None else x[heads]  # noqa: E731
        return self._replace(slopes=pick(self.slopes), s_aux=pick(self.s_aux))


def visible(query_position: Tensor, key_position: Tensor, window: int | None = None) -> Tensor:
    """Which keys each query sees, bool [q, n]: real ones, not newer than the query, within the window.

    Positions are int64, [q] and [n], and -1 where there is no token.

    >>> visible(torch.tensor([2]), torch.tensor([-1, 0, 1, 2, 3]), window=2).tolist()
    [[False, False, True, True, False]]
    """
    q, k = query_position[:, None], key_position[None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (k > q - window)


def partial(
    products: Tensor,
    weigh: Callable[[Tensor], Tensor],
    query_position: Tensor,
    key_position: Tensor,
    terms: Terms,
) -> Partial:
    """A partial from the inner products q.k [Hq, q, n] of one tier.

    `weigh` maps weights [Hq, q, n] to the weighted sum of values [Hq, q, D], which a tier can compute without
    decoding. Scaling, softcap and bias come before the mask, in every tier. Positions are those of `visible`,
    and `terms` are those of all query heads.
    """
    scores = terms.scaling * products
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    if terms.slopes is not None:
        scores = scores + alibi_bias(terms.slopes, query_position, key_position)
    seen = visible(query_position, key_position, terms.window)
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = torch.exp(scores - top.clamp_min(-1e300)[..., None])  # -inf - -inf would be NaN
    return Partial(weigh(weights), top, weights.sum(-1))


def merge(partials: list[Partial]) -> Tensor:
    """The output [Hq, q, D] over the keys of all partials. It is exact, in any order and grouping.

    A query that sees nothing gives 0. Source: FlashAttention, arXiv 2205.14135, section 3.1.

    >>> p = Partial(torch.ones(1, 1, 2).double(), torch.zeros(1, 1).double(), torch.ones(1, 1).double())
    >>> merge([p, p]).tolist()
    [[[1.0, 1.0]]]
    """
    top = torch.stack([p.top for p in partials]).amax(0).clamp_min(-1e300)
    weights = [torch.exp(p.top - top) for p in partials]
    total = sum(w * p.total for w, p in zip(weights, partials))
    acc = sum(w[..., None] * p.acc for w, p in zip(weights, partials))
    return acc / torch.where(total > 0, total, 1.0)[..., None]


def sink(s_aux: Tensor, shape: torch.Size) -> Partial:
    """Learned attention sinks (gpt-oss): each head has one more key, of score `s_aux` [Hq] and value 0.

    `shape` is that of the query, (Hq, q, D).
    """
    top = s_aux.double()[:, None].expand(shape[:2])
    return Partial(torch.zeros(shape, dtype=torch.float64), top, torch.ones_like(top))


def by_group(query: Tensor, heads: int) -> Tensor:
    """The queries of each KV head: [Hq, q, D] as [H, Hq / H, q, D]."""
    return query.unflatten(0, (heads, -1))


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Inner products [Hq, q, n] of query [Hq, q, D] and keys [H, n, D]."""
    return torch.einsum("hgqd,hnd->hgqn", by_group(query, keys.shape[0]), keys).flatten(0, 1)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """sum_t w_t v_t: weights [Hq, q, n] and values [H, n, D] give [Hq, q, D]."""
    return torch.einsum("hgqn,hnd->hgqd", by_group(weights, values.shape[0]), values).flatten(0, 1)


def over_tensors(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    terms: Terms,
) -> Partial:
    """Partial over keys and values as tensors [H, n, D]: the FP16 tier, or any tier after decoding.

    `query` is [Hq, q, D]. The positions and the `terms` are as in `partial`.
    """
    products = dot(query, keys)
    return partial(products, lambda w: weighted(w, values), query_position, key_position, terms)


def over_codes(
    query: Tensor,
    keys: Record,
    values: Record,
    mean: Tensor,
    codecs: tuple[RotatedCodec, RotatedCodec] | tuple[MatchedCodec, MatchedCodec],
    query_position: Tensor,
    key_position: Tensor,
    terms: Terms,
) -> Partial:
    """Partial over records of the rotated or the matched codec, without decoding them.

    q.k = scale (P q).level + zero sum(P q) + q.mean, because P is orthogonal. The matched codec has A^-T in
    place of P, and no zero point. Values are summed in the rotated domain, and the sum is rotated back
    (TurboQuant, arXiv 2504.19874, section 3). The result equals `over_tensors` on decoded records, up to
    rounding. `mean` is [H, n or 1, D].
    """
    key_codec, value_codec = codecs
    rotated = key_codec.rotate_query(query)
    products = dot(rotated, key_codec.levels(keys)) * _each(keys.scale, query)
    if keys.zero is not None:
        products = products + rotated.sum(-1, keepdim=True) * _each(keys.zero, query)
    products = products + dot(query, mean.expand(-1, keys.scale.shape[-1], -1))

    def weigh(weights: Tensor) -> Tensor:
        acc = weighted(weights * _each(values.scale, query), value_codec.levels(values))
        if values.zero is not None:
            acc = acc + (weights * _each(values.zero, query)).sum(-1, keepdim=True)
        return value_codec.rotate_back(acc)

    return partial(products, weigh, query_position, key_position, terms)


def _each(per_token: Tensor, query: Tensor) -> Tensor:
    """A number per token, [H, n], as the scores of all query heads need it: [Hq, 1, n]."""
    return per_token.repeat_interleave(query.shape[0] // per_token.shape[0], dim=0)[:, None]
