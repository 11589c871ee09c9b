"""Rotating keys by a position or a position difference, in the style of the model's own RoPE."""

import math

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """R(position) x: a pure rotation, without the attention scaling that keys carry already.

    Args:
        x: [..., n, D]; the leading `2 * len(inv_freq)` channels are rotated, the rest pass.
        position: [..., n], integer, broadcast to `x`; may be negative (a rotation back).
        inv_freq: [d / 2], radians a position.
        interleaved: whether pairs are channels (2i, 2i + 1) (Cohere, GLM) or (i, i + d / 2).

    Turns are counted in float64: in float32, an angle of 1e5 radians is off by 4e-3. Whole turns are
    dropped before the sine is taken, so that it can be taken in the dtype of `x`.
    """
    turns = position.unsqueeze(-1).double() * (inv_freq.double() / math.tau)
    angle = ((turns - turns.round()) * math.tau).to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    width = 2 * inv_freq.shape[-1]
    turned, rest = x.split((width, x.shape[-1] - width), dim=-1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)
