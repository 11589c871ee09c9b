"""Scores of pages from a few numbers of each page. `fade_ref.summaries` explains them."""

import torch
from torch import Tensor

from .merge import of_rows

DEVIATIONS = 2.0  # standard deviations from the mean at which "deviation" scores a page
LOWEST = -3.0e38  # stands for -inf where -inf less -inf would be NaN
WIDEST = 65504.0  # of float16


def summarize(kind: str, keys: Tensor, real: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Two numbers of each channel of each page, float16 [B, H, P, D] each; 0 for a page without a token.

    Args:
        kind: "bounds": minimum and maximum. "deviation": mean and standard deviation.
        keys: [B, H, n, D], decoded; n a multiple of `page`. Slots without a token may hold anything.
        real: bool [B, 1 or H, n], which slots hold a token.
    """
    keys, real = keys.unflatten(2, (-1, page)), real.unflatten(2, (-1, page)).unsqueeze(-1)
    count = real.sum(3)  # [B, 1 or H, P, 1]
    if kind == "bounds":
        first = torch.where(real, keys, torch.inf).amin(3)
        second = torch.where(real, keys, -torch.inf).amax(3)
    else:
        own, most = torch.where(real, keys, 0.0), count.clamp_min(1)
        first = own.sum(3) / most
        apart = torch.where(real, own - first.unsqueeze(3), 0.0)
        second = (apart.square().sum(3) / most).sqrt()
    return tuple(
        torch.where(count > 0, x, 0.0).clamp(-WIDEST, WIDEST).to(torch.float16) for x in (first, second)
    )


def page_mass(
    kind: str,
    query: Tensor,
    first: Tensor,
    second: Tensor,
    valid: Tensor,
    page: int,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Probability mass of each page for each query and KV head, float32 or float64 [B, H, q, P].

    Args:
        kind: "bounds" or "deviation".
        query: [B, Hq, q, D].
        first, second: [B, H, P, D], from `summarize`. Pages without a token may hold anything.
        valid: bool [B, 1 or q, P * page], which tokens each query sees.
        page: tokens of a page.
        scaling, softcap: of scores.
    """
    heads, new = first.shape[1], query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = of_rows(query.to(dtype), heads)  # [B, H, G * q, D]
    first, second = first.to(dtype), second.to(dtype)
    if kind == "bounds":
        found = rows.clamp_min(0) @ second.mT + rows.clamp_max(0) @ first.mT
    else:
        found = rows @ first.mT + DEVIATIONS * (rows.square() @ second.square().mT).sqrt()
    found = scaling * found
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    count = valid.unflatten(-1, (-1, page)).sum(-1).unsqueeze(1)  # [B, 1, 1 or q, P]
    if count.shape[2] > 1:
        count = count.repeat(1, 1, rows.shape[2] // new, 1)
    found = torch.where(count > 0, found + count.to(dtype).log(), -torch.inf)
    weight = torch.exp(found - found.amax(-1, keepdim=True).clamp_min(LOWEST))
    mass = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return mass.unflatten(2, (-1, new)).mean(2)
