"""What is known about each token: the attention it received, and what its key looks like.

Axes: `...` any batch dims, H KV heads, Hq query heads, q queries, n live tokens in order of
arrival, w window queries, D head_dim. Input may be of any float dtype; every result is float64, so
half-precision overflow and ties do not exist here. `valid` (bool, broadcastable to [..., H, n]) is
False at padding and holes, which then count nowhere. Bad shapes and dtypes raise `ValueError`.
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

    A probability p is what one query gives to one token, averaged over the GQA group.
    """

    mass: Tensor  # sum of the probabilities of all queries so far, prefill and decode alike
    queries: Tensor  # how many queries could see the token
    ema: Tensor  # s <- alpha s + (1 - alpha) p at each query that sees it; the first p starts it
    window: Tensor  # p of the last w queries, newest last; NaN: not visible, or no such query
    hybrid: Tensor  # AKV's mixture of decayed attention and recency, fed back into itself


def empty(*shape: int, window: int = 64) -> Importance:
    """The state before any token; `shape` is the batch dims, then H. `ValueError` if window < 1."""
    if window < 1 or not shape:
        raise ValueError(f"shape={shape}, window={window}: heads and a window of 1 are needed")
    none = torch.zeros(*shape, 0, dtype=torch.float64)
    return Importance(none, none, none, none.unsqueeze(-2).expand(*shape, window, 0), none)


def append(state: Importance, count: int) -> Importance:
    """`count` new tokens at the end, seen by no query (`FRESH`). `ValueError` if negative."""
    if count < 0:
        raise ValueError(f"count={count}: tokens leave through keep()")
    return Importance(**{k: F.pad(getattr(state, k), (0, count), value=FRESH[k]) for k in FRESH})


def keep(state: Importance, index: Tensor) -> Importance:
    """The state of the surviving tokens: their scores move with them.

    `index` is int64, the slots to keep: [m] for all, [..., m] for each row or [..., H, m] for each
    head; -1 makes a hole, so that rows may keep different numbers. `ValueError`: no such slot.
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
    """The state after q more queries; the same as observing them one by one.

    Tokens that `state` does not know are the newest, and appended. A query counts only for tokens
    that it could see: a prefill of q queries weighs as much as q decode steps, and a generated
    token starts from its own first probability.

    Args:
        probabilities: [..., H, q, n] softmax output, see `group_mean`.
        visible: bool [..., q, n] (or [..., H, q, n]): causal, not padding, not evicted. Where it
            is False, the probability is ignored, whatever it is.

    Raises `ValueError`: shapes that do not fit, `visible` not bool, fewer tokens than known.

    Sources: `mass` H2O (arXiv 2306.14048, algorithm 1); `ema` fade-kv; `window` SnapKV (2404.14469)
    and TOVA (2401.06104); `hybrid` akv-cache: s <- .95 s + p, then .7 s / max(s) + .3 recency, 0 to
    1 over the tokens seen; here for each query and head (AKV: each call, mean over rows and heads).

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
    """[..., Hq, q, n] -> [..., H, q, n], mean over the Hq/H consecutive heads sharing a KV head."""
    if kv_heads < 1 or probabilities.shape[-3] % kv_heads:
        raise ValueError(f"{kv_heads} KV heads do not divide {probabilities.shape[-3]} query heads")
    return probabilities.double().unflatten(-3, (kv_heads, -1)).mean(-3)


def _expand(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    fits = all(a in (1, b) for a, b in zip(tensor.shape[::-1], shape[::-1], strict=False))
    if tensor.dtype != dtype or tensor.dim() > len(shape) or not fits:
        raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)}: {dtype} {shape} is needed")
    return tensor.expand(shape)


__getattr__ = lookup(__name__)
