"""Attention over one tier, the merge of tiers, and attention over all of them.

One batch row at a time. Shapes: query [Hq, q, D]; keys and values [H, n, D]; the Hq / H query heads
of a group share a KV head (GQA). Everything is float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import product, quantize
from .rope import alibi_bias
from .rotation import LEVELS, Record, RotatedCodec


class Partial(NamedTuple):
    """Attention over some of the keys, not normalised yet (FlashAttention, 2205.14135, section 3.1).

    `acc` [Hq, q, D] is sum_t exp(s_t - top) v_t, `top` [Hq, q] the largest score and `total` [Hq, q]
    sum_t exp(s_t - top). Of no visible key: acc 0, top -inf, total 0.
    """

    acc: Tensor
    top: Tensor
    total: Tensor


class Terms(NamedTuple):
    """What a model asks of its scores.

    `scaling` multiplies q.k; `softcap` c then gives c tanh(s / c) (Gemma 2, 2408.00118, section 2);
    `window` is how many positions a query sees back, itself included; `slopes` [Hq] are ALiBi's, and
    `s_aux` [Hq] the scores of learned attention sinks (gpt-oss), see `sink`.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None
    slopes: Tensor | None = None
    s_aux: Tensor | None = None

    def of(self, heads: list[int]) -> "Terms":
        """The same for some of the query heads."""
        pick = lambda x: None if x is None else x[heads]  # noqa: E731
        return self._replace(slopes=pick(self.slopes), s_aux=pick(self.s_aux))


def visible(query_position: Tensor, key_position: Tensor, window: int | None = None) -> Tensor:
    """Which keys a query sees, bool [q, n]: real ones, not newer than itself, within the window.

    Positions [q] and [n] are logical, int64, -1 where there is no token.

    >>> visible(torch.tensor([2]), torch.tensor([-1, 0, 1, 2, 3]), window=2).tolist()
    [[False, False, True, True, False]]
    """
    q, k = query_position[:, None], key_position[None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (k > q - window)


def partial(products: Tensor, weigh, query_position, key_position, terms: Terms) -> Partial:
    """A partial from the inner products q.k [Hq, q, n] of one tier.

    `weigh` maps weights [Hq, q, n] to their sum of values [Hq, q, D]: a tier need not decode its
    values to do that. Scaling, softcap and bias come before the mask, alike in every tier.
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
    """The output [Hq, q, D] over the keys of all partials; exact, in any order and grouping.

    A query that sees nothing gives 0. Source: formulas of FlashAttention, 2205.14135, section 3.1.

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
    """Learned attention sinks (gpt-oss): a key a head of score `s_aux` [Hq] and value 0.

    `shape` is the query's, (Hq, q, D).
    """
    top = s_aux.double()[:, None].expand(shape[:2])
    return Partial(torch.zeros(shape, dtype=torch.float64), top, torch.ones_like(top))


def by_group(query: Tensor, heads: int) -> Tensor:
    """[Hq, q, D] as [H, Hq / H, q, D]: the queries of each KV head."""
    return query.unflatten(0, (heads, -1))


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Inner products [Hq, q, n] of query [Hq, q, D] and keys [H, n, D]."""
    return torch.einsum("hgqd,hnd->hgqn", by_group(query, keys.shape[0]), keys).flatten(0, 1)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """sum_t w_t v_t: weights [Hq, q, n] and values [H, n, D] give [Hq, q, D]."""
    return torch.einsum("hgqn,hnd->hgqd", by_group(weights, values.shape[0]), values).flatten(0, 1)


def over_tensors(query, keys, values, query_position, key_position, terms: Terms) -> Partial:
    """Partial over keys and values as they are: the FP16 tier, or any tier decoded first."""
    products = dot(query, keys)
    return partial(products, lambda w: weighted(w, values), query_position, key_position, terms)


def over_codes(
    query: Tensor,
    keys: Record,
    values: Record,
    mean: Tensor,
    codecs: tuple[RotatedCodec, RotatedCodec],
    query_position: Tensor,
    key_position: Tensor,
    terms: Terms,
) -> Partial:
    """Partial over records of the rotated codec, which are never decoded.

    q.k = scale (P q).level + zero sum(P q) + q.mean, because P is orthogonal; the values are summed
    in the rotated domain and rotated back once (formulas: TurboQuant, arXiv 2504.19874, section 3).
    Equal to `over_tensors` on decoded records up to rounding. `mean` [H, n or 1, D].
    """
    key_codec, value_codec = codecs
    turned = query @ key_codec.rotation.T
    products = dot(turned, _levels(keys, key_codec)) * _each(keys.scale, query)
    if keys.zero is not None:
        products = products + turned.sum(-1, keepdim=True) * _each(keys.zero, query)
    products = products + dot(query, mean.expand(-1, keys.scale.shape[-1], -1))

    def weigh(weights: Tensor) -> Tensor:
        acc = weighted(weights * _each(values.scale, query), _levels(values, value_codec))
        if values.zero is not None:
            acc = acc + (weights * _each(values.zero, query)).sum(-1, keepdim=True)
        return acc @ value_codec.rotation

    return partial(products, weigh, query_position, key_position, terms)


def _each(per_token: Tensor, query: Tensor) -> Tensor:
    """A number a token [H, n], for the scores of all query heads: [Hq, 1, n]."""
    return per_token.repeat_interleave(query.shape[0] // per_token.shape[0], dim=0)[:, None]


def _levels(record: Record, codec: RotatedCodec) -> Tensor:
    """What the codes stand for before scale and zero, [H, n, D]."""
    codes = quantize.unpack(record.codes, codec.bits, codec.head_dim)
    return codes.double() if codec.bits >= 4 else quantize.steps(codec.bits, LEVELS)[codes.long()]


def over_tables(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    books: tuple[Tensor, Tensor],
    query_position: Tensor,
    key_position: Tensor,
    terms: Terms,
) -> Partial:
    """Partial over product-quantised keys and values [H, n, m], `books` being their codebooks.

    Keys by look-ups in a table of the query's, values by a histogram of the weights over centroids
    (`product.py`). Equal to `over_tensors` on decoded codes up to rounding.
    """
    key_book, value_book = books
    heads = key_codes.shape[0]
    products = product.scores(by_group(query, heads), key_codes[:, None], key_book).flatten(0, 1)

    def weigh(weights: Tensor) -> Tensor:
        codes, centroids = value_codes[:, None], value_book.shape[1]
        histogram = product.value_histogram(by_group(weights, heads), codes, centroids)
        return product.combine(histogram, value_book).flatten(0, 1)

    return partial(products, weigh, query_position, key_position, terms)
