"""Refuse gradients through a cache: cached tokens are plain data, so a gradient would be wrong or missing."""

import torch
from torch import Tensor

REASON = (
    "no gradient goes through a tiered cache: what it holds is detached, and compressed. Train without "
    "a cache, or with transformers' DynamicCache"
)


class _Refused(torch.autograd.Function):
    """The identity. Its backward pass raises an error that gives the reason."""

    @staticmethod
    def forward(ctx, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(REASON)


def without_gradient(output: Tensor, *inputs: Tensor) -> Tensor:
    """`output`, computed from `inputs` and a cache. A backward pass through it raises `RuntimeError`.

    A forward pass alone works as usual, with or without `torch.no_grad`.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Refused.apply(output, *inputs)
    return output
