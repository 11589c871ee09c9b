"""Scores that need arithmetic: neighbor pooling, scores from keys, and the learned network.

`fade_fast` imports this module and `plan`. They are the exception to the rule that it takes no numerics
from `fade_ref`. A second copy would only repeat these few lines, so comparing two copies would prove
nothing. Both modules are vectorized, never wait for a GPU, and keep the device of their input. Tests hold
them against slow loops written from the formulas.

Axes: `...` any batch dims, H KV heads, n tokens in any order, D head_dim. `position` is an integer tensor,
negative at padding and holes. Results are float64; a larger score is better.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Names and shapes of the network's tensors, as fade-kv 1.1.0 names them: 1,249 numbers.
MLP = {"net.0.weight": (32, 4), "net.2.weight": (32, 32), "net.4.weight": (1, 32)}
MLP |= {name.replace("weight", "bias"): shape[:1] for name, shape in MLP.items()}


def pool_neighbors(scores: Tensor, position: Tensor, size: int = 5) -> Tensor:
    """Mean of the `size` (odd) scores nearest by position: float64 [..., H, n] from float64 [..., H, n].

    `position` [..., H or 1, n], n > 0. NaN scores, holes and the places past both ends count as 0. The
    result does not depend on the order of the tokens. Source: SnapKV (arXiv 2404.14469), as in kvpress 0.5.5.

    >>> pool_neighbors(torch.tensor([5.0, 0, 10]).double(), torch.tensor([0, 1, 2]), size=3).tolist()
    [1.6666666666666667, 5.0, 3.3333333333333335]
    """
    order = position.argsort(dim=-1, stable=True).expand(scores.shape)  # holes first
    real = torch.where((position >= 0) & ~scores.isnan(), scores, 0.0).gather(-1, order)
    pooled = F.pad(real, (size // 2, size // 2)).unfold(-1, size, 1).mean(-1)
    return torch.empty_like(pooled).scatter_(-1, order, pooled)


def key_norm(keys: Tensor) -> Tensor:
    """-|k|: keys [..., H, n, D] of any float dtype give [..., H, n]. Source: Knorm, arXiv 2406.11430."""
    return -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float64)


def key_diff(keys: Tensor, valid: Tensor) -> Tensor:
    """-cos(k, mean of k/|k|): keys [..., H, n, D] of any float dtype give [..., H, n].

    `valid` is bool, [..., H or 1, n]; other tokens do not count in the mean. Source: KeyDiff,
    arXiv 2504.15364.
    """
    keys, valid = keys.double(), valid.unsqueeze(-1)
    unit = F.normalize(keys, dim=-1).masked_fill(~valid, 0.0)
    anchor = unit.sum(-2, keepdim=True) / valid.sum(-2, keepdim=True).clamp_min(1)
    return -F.cosine_similarity(keys, anchor, dim=-1)


def features(share: Tensor, position: Tensor, now: Tensor, depth: float) -> Tensor:
    """What the `learned` policy sees of each token: float64 in [0, 1], [..., H, n, 4].

    Feature 0 is the position and 1 the share, both min-max scaled over the real tokens, 0 if all are
    equal. 2 is the depth, and 3 the age divided by `now`. Source: fade-kv 1.1.0.

    Args:
        share: float64 [..., H, n], the mean probability that queries gave to the token.
        position: [..., H or 1, n].
        now: integer tensor, broadcastable to `position`: position of the newest token of the row.
        depth: of the layer, from 0 (first) to 1 (last).
    """
    hole = (position < 0).unsqueeze(-1)
    x = torch.stack(torch.broadcast_tensors(position.double(), share), dim=-1)
    low = x.masked_fill(hole, torch.inf).amin(-2, keepdim=True)
    high = x.masked_fill(hole, -torch.inf).amax(-2, keepdim=True)
    scaled = torch.where(low == high, 0.0, (x - low) / (high - low))
    age = ((now - position).double() / now.clamp_min(1)).expand(share.shape)
    rest = torch.stack([torch.full_like(age, depth), age], dim=-1)
    return torch.cat([scaled, rest], dim=-1).clamp(0, 1)


def keep_probability(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Probability that a token is worth keeping, [..., H, n], from its features x [..., H, n, 4].

    An MLP 4-32-32-1 with ReLU, ReLU and sigmoid. `weights` are float64, named and shaped as in `MLP`.
    Source: fade-kv 1.1.0.
    """
    for layer in ("net.0", "net.2"):
        x = F.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"]).relu()
    return F.linear(x, weights["net.4.weight"], weights["net.4.bias"]).sigmoid().squeeze(-1)
