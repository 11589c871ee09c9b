"""Choosing pages by their mass, and the pages that stay on the GPU. Shapes are static, and no host waits."""

import torch
from torch import Tensor

PAGE_BITS = 32  # of a sorting key that number the page


def choose(mass: Tensor, pages: int, share: float | None = None) -> tuple[Tensor, Tensor | None]:
    """The heaviest pages of each query and KV head, heaviest first; of equal pages, the newer one first.

    Args:
        mass: [B, H, q, P], not negative.
        pages: how many to choose, at most P.
        share: stop as soon as the chosen pages hold this share of the mass.

    Returns pages int64 [B, H, q, pages], and bool of the same shape, which of them are to be read; None: all.
    """
    # One number per page: first its mass, as bits that sort like the number, then its age. No two are equal,
    # so every device chooses the same pages in the same order.
    bits = mass.to(torch.float32).view(torch.int32).to(torch.int64)
    key = (bits << PAGE_BITS) | torch.arange(mass.shape[-1], device=mass.device)
    index = key.topk(pages, dim=-1).indices
    if share is None:
        return index, None
    weight = mass.gather(-1, index)
    before = weight.cumsum(-1) - weight
    keep = before < share
    keep[..., 0] = True
    return index, keep
