"""The attention that each token received.

`fade_fast.policies.scores` counts the same in closed form, and parity compares the two.

Axes: `...` any batch dims, H KV heads, Hq query heads, q queries, n live tokens in order of arrival, w window
queries. Input may be of any float dtype; every result is float64. Bad shapes and dtypes raise `ValueError`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import baselines
from .moved import lookup

EMA_ALPHA = 0.95  # fade-kv 1.1.0, tracker.py
FRESH = {"mass": 0.0, "queries": 0.0, "ema": 0.0, "window": math.nan, "hybrid": 0.0}


@dataclass(frozen=True)
class Importance:
    """Attention received by n live tokens: float64 [..., H, n], and `window` [..., H, w, n].

    p is the probability that one query gives to one token, averaged over the query heads of a KV head.
    """

    mass: Tensor  # sum of p over all queries so far, of prefill and decode alike
    queries: Tensor  # number of queries that could see the token
    ema: Tensor  # s <- alpha s + (1 - alpha) p at each query that sees the token; the first p starts it
    window: Tensor  # p of the last w queries, the newest last; NaN: not visible, or no such query
    hybrid: Tensor  # see `baselines.hybrid`


def empty(*shape: int, window: int = 64) -> Importance:
    """The state before any token; `shape` is the batch dims, then H. Raises `ValueError` if window < 1."""
    if window < 1 or not shape:
        raise ValueError(f"shape={shape}, window={window}: heads and a window of 1 are needed")
    none = torch.zeros(*shape, 0, dtype=torch.float64)
    return Importance(none, none, none, none.unsqueeze(-2).expand(*shape, window, 0), none)


def append(state: Importance, count: int) -> Importance:
    """Add `count` tokens at the end, which no query has seen yet. Raises `ValueError` if negative."""
    if count < 0:
        raise ValueError(f"count={count}: tokens leave through keep()")
    return Importance(**{k: F.pad(getattr(state, k), (0, count), value=FRESH[k]) for k in FRESH})


def keep(state: Importance, index: Tensor) -> Importance:
    """The state of the surviving tokens, whose scores move with them.

    `index` is int64, the slots to keep: [m] for all, [..., m] for each row or [..., H, m] for each head. -1
    makes a hole, so rows may keep different numbers. Raises `ValueError` for a slot that does not exist.
    """
    n = state.mass.shape[-1]
    if ((index < -1) | (index >= n)).any():
        raise ValueError(f"index must hold slots from -1 to {n - 1}")
    index = index.unsqueeze(-2) if index.dim() < state.mass.dim() else index
    index = _expand("index", index, torch.int64, (*state.mass.shape[:-1], index.shape[-1]))
    state, index = append(state, 1), torch.where(index < 0, n, index)  # a hole is a fresh token

    def pick(name: str) -> Tensor:
        field, at = getattr(state, name), index.unsqueeze(-2) if name == "window" else index
        return field.gather(-1, at.expand(*field.shape[:-1], -1))

    return Importance(**{name: pick(name) for name in FRESH})


def observe(state: Importance, probabilities: Tensor, visible: Tensor) -> Importance:
    """The state after q more queries; the same as after observing them one by one.

    Tokens that `state` does not know are the newest; they are appended. A query counts only for tokens that
    it could see. So a prefill of q queries weighs as much as q decode steps, and a generated token starts
    from its own first probability.

    Args:
        probabilities: [..., H, q, n], the softmax after `group_mean`.
        visible: bool [..., q, n] or [..., H, q, n]: causal, not padding, not evicted. Where it is False, the
            probability is ignored.

    Raises `ValueError` for shapes that do not fit, `visible` that is not bool, and fewer tokens than known.

    Sources: `mass` H2O (arXiv 2306.14048, algorithm 1); `ema` fade-kv 1.1.0; `window` SnapKV (arXiv
    2404.14469) and TOVA (arXiv 2401.06104).

    >>> one = observe(empty(1), torch.tensor([[[0.25, 0.75]]]), torch.tensor([[False, True]]))
    >>> one.mass.tolist(), one.queries.tolist()
    ([[0.0, 0.75]], [[0.0, 1.0]])
    """
    shape, known = tuple(probabilities.shape), state.mass.shape
    if len(shape) != len(known) + 1 or shape[:-2] != known[:-1] or shape[-1] < max(1, known[-1]):
        raise ValueError(f"probabilities {shape} do not fit a state of {tuple(known)}")
    visible = visible.unsqueeze(-3) if visible.dim() < len(shape) else visible
    visible = _expand("visible", visible, torch.bool, shape)
    probabilities = torch.where(visible, probabilities.double(), 0.0)
    state = append(state, shape[-1] - known[-1])
    queries, ema, hybrid = state.queries, state.ema, state.hybrid
    for p, seen in zip(probabilities.unbind(-2), visible.unbind(-2), strict=True):
        later = EMA_ALPHA * ema + (1 - EMA_ALPHA) * p
        ema = torch.where(seen, torch.where(queries == 0, p, later), ema)
        queries = queries + seen
        hybrid = baselines.hybrid(hybrid, p, seen)
    window = torch.cat([state.window, torch.where(visible, probabilities, math.nan)], dim=-2)
    window = window[..., shape[-2] :, :]  # the oldest q make room
    return Importance(state.mass + probabilities.sum(-2), queries, ema, window, hybrid)


def group_mean(probabilities: Tensor, kv_heads: int) -> Tensor:
    """Mean over the Hq/H consecutive heads that share a KV head: [..., Hq, q, n] gives [..., H, q, n].

    Raises `ValueError` unless `kv_heads` divides Hq.
    """
    if kv_heads < 1 or probabilities.shape[-3] % kv_heads:
        raise ValueError(f"{kv_heads} KV heads do not divide {probabilities.shape[-3]} query heads")
    return probabilities.double().unflatten(-3, (kv_heads, -1)).mean(-3)


def _expand(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    fits = all(a in (1, b) for a, b in zip(tensor.shape[::-1], shape[::-1], strict=False))
    if tensor.dtype != dtype or tensor.dim() > len(shape) or not fits:
        raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)}: {dtype} {shape} is needed")
    return tensor.expand(shape)


__getattr__ = lookup(__name__)
