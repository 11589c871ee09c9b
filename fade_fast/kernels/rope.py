"""Rotate keys by a position or by a position difference, in the style of the model's own RoPE."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RoPE(NamedTuple):
    """How a layer rotates its keys: frequencies [d / 2], radians per position, and the style of pairs.

    `interleaved`: pairs are channels (2i, 2i + 1) as in Cohere and GLM, else (i, i + d / 2).
    """

    inv_freq: Tensor
    interleaved: bool


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """R(position) x: a pure rotation, because keys already carry the attention scaling.

    Args:
        x: [..., n, D]. The leading `2 * len(inv_freq)` channels are rotated, the others stay.
        position: [..., n], integer, broadcast to `x`; may be negative (an inverse rotation).
        inv_freq: [d / 2], radians per position.
        interleaved: whether pairs are channels (2i, 2i + 1) (Cohere, GLM), not (i, i + d / 2).
    """
    return apply_rope(x, *cos_sin(position, inv_freq, x.dtype), interleaved)


def cos_sin(position: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `apply_rope`: [..., n, d / 2] of `dtype`.

    The angle is counted in full turns in float64: in float32, an angle of 1e5 radians is off by 4e-3. Whole
    turns are dropped before the sine is computed, so the sine can be computed in `dtype`.
    """
    turns = position.unsqueeze(-1).double() * (inv_freq.double() / math.tau)
    angle = ((turns - turns.round()) * math.tau).to(dtype)
    return angle.cos(), angle.sin()


def as_sum(cos: Tensor, sin: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Factors c and s [..., n, D], such that `apply_rope(x, cos, sin)` is c * x + s * swap(x)."""
    axis, rest = (-1 if interleaved else -2), dim - 2 * cos.shape[-1]
    cos, sin = torch.stack((cos, cos), axis).flatten(-2), torch.stack((-sin, sin), axis).flatten(-2)
    if rest:  # by `cat`, because `pad` would tie a compiled graph to one token count
        shape = (*cos.shape[:-1], rest)
        cos, sin = (torch.cat((x, x.new_full(shape, n)), dim=-1) for x, n in ((cos, 1.0), (sin, 0.0)))
    return cos, sin


def swap(x: Tensor, width: int, interleaved: bool) -> Tensor:
    """x [..., D] with the two channels of each pair exchanged, in the first `width` channels."""
    rotated, rest = x.split((width, x.shape[-1] - width), dim=-1)
    rotated = rotated.unflatten(-1, (-1, 2) if interleaved else (2, -1)).flip(-1 if interleaved else -2)
    return torch.cat((rotated.flatten(-2), rest), dim=-1) if rest.shape[-1] else rotated.flatten(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rotate` with given cosine and sine."""
    width = 2 * cos.shape[-1]
    rotated, rest = x.split((width, x.shape[-1] - width), dim=-1)
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((rotated, rest), dim=-1)
