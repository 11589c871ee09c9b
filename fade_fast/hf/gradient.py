"""Where gradients end: what is cached is data, and a gradient through it would be wrong or missing."""

import torch
from torch import Tensor

REASON = (
    "no gradient goes through a tiered cache: what it holds is detached, and compressed. Train without "
    "a cache, or with transformers' DynamicCache"
)


class _Refused(torch.autograd.Function):
    """The identity, whose backward pass says why there is none."""

    @staticmethod
    def forward(ctx, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(REASON)


def without_gradient(output: Tensor, *inputs: Tensor) -> Tensor:
    """`output`, computed from `inputs` and a cache; going backward through it raises `RuntimeError`.

    A forward pass alone works as always, with or without `torch.no_grad`.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Refused.apply(output, *inputs)
    return output
