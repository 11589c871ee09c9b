"""What FADE is compared with, and never runs in `fade_fast`: codecs, a rotation and two policies.

Reals and codes are as in `quantize`. `LayerCache` refuses these codecs. In some of them the codes of a token
depend on its neighbors, so the token could not be moved; the others take more bytes.
"""

import math

import torch
from torch import Tensor

from .quantize import FP16_TINY, finite, min_max, nearest, stored, uniform_decode, uniform_encode

HYBRID_DECAY, HYBRID_ATTENTION = 0.95, 0.7  # akv-cache 1.0.0, importance.py


# -- codecs


def group_encode(x: Tensor, bits: int, n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform codes of x [..., D] in groups of n channels (KIVI's values, arXiv 2402.02750, section 3).

    Returns codes uint8 [..., D], scale and zero point [..., D/n]. A vector takes D*bits/8 + 4*D/n bytes.
    Raises `ValueError` unless n divides D.
    """
    if x.shape[-1] % n:
        raise ValueError(f"{x.shape[-1]} values do not make whole groups of {n}")
    codes, scale, zero = uniform_encode(x.unflatten(-1, (-1, n)), bits)
    return codes.flatten(-2), scale, zero


def group_decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Undo `group_encode`: float64 [..., D]."""
    return uniform_decode(codes.unflatten(-1, (scale.shape[-1], -1)), scale, zero).flatten(-2)


def channel_encode(x: Tensor, bits: int, n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform codes of x [..., S, D], per channel in blocks of n tokens (KIVI's keys, section 3).

    Returns codes uint8 [..., S, D], scale and zero point [..., S/n, D]. A token takes D*bits/8 + 4*D/n bytes.
    Raises `ValueError` unless n divides S.
    """
    return tuple(part.mT for part in group_encode(x.mT, bits, n))


def channel_decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Undo `channel_encode`: float64 [..., S, D]."""
    return group_decode(codes.mT, scale.mT, zero.mT).mT


def symmetric_encode(x: Tensor, over: int = -1) -> tuple[Tensor, Tensor]:
    """The INT4 of fade-kv 1.1.0: scale = max|x| / 7 along dimension `over` of x [..., S, D].

    Keys take `over=-2`, scale [..., 1, D]: one a channel. Values take `over=-1`, scale [..., S, 1]: one a
    token. Codes are uint8: round(x / scale) in -7 .. 7 as a two's complement nibble, for `pack(codes, 4)`.
    A token takes D/2 bytes, plus 2*D/S (keys) or 2 (values).
    """
    scale = stored((finite(x).abs().amax(over, keepdim=True) / 7).clamp(min=FP16_TINY))
    return torch.round(x / scale).clamp(-8, 7).to(torch.int8).to(torch.uint8) & 15, scale


def symmetric_decode(codes: Tensor, scale: Tensor) -> Tensor:
    """scale * (the signed value of the nibble): float64, the shape of codes."""
    return scale * ((codes.long() ^ 8) - 8)


def akv_encode(x: Tensor, bits: int, n: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer of akv-cache 1.0.0: zero-padded groups of n channels, with scales in fp32.

    x [..., D] gives codes uint8 [..., D'], scale and zero point [..., D'/n]. D' is D rounded up to whole
    groups, so D = 64 costs double. A vector takes D'*bits/8 + 8*D'/n bytes.
    """
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % n)).unflatten(-1, (-1, n))
    scale, zero = min_max(padded, bits, 1e-10)  # this least scale would be 0 in fp16
    return nearest(padded, scale, zero, bits).flatten(-2), scale, zero


def akv_decode(codes: Tensor, scale: Tensor, zero: Tensor, dim: int) -> Tensor:
    """Undo `akv_encode`: float64 [..., dim], without the padding."""
    return group_decode(codes, scale, zero)[..., :dim]


# -- a rotation


def hadamard_rotation(dim: int, seed: int = 0, rounds: int = 3) -> Tensor:
    """Randomized Hadamard rotation P [dim, dim], float64: P = (H D_r) ... (H D_1) / dim^(r/2).

    H is the +-1 Walsh-Hadamard matrix, D_k a diagonal of random signs (QuaRot, arXiv 2404.00456, section 3,
    has one round). One round fails on vectors with one or two large entries; three match `qr_rotation`.
    Raises `ValueError` unless dim is a power of two.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two, not dim={dim}")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < dim:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    generator = torch.Generator().manual_seed(seed)
    P = torch.eye(dim, dtype=torch.float64)
    for sign in torch.randint(2, (rounds, dim), generator=generator):
        P = H @ ((1.0 - 2.0 * sign).unsqueeze(-1) * P) / math.sqrt(dim)
    return P


def hadamard_rotate(x: Tensor, seed: int = 0, rounds: int = 3) -> Tensor:
    """x [..., D] rotated, float64. Kernels do it in D log2(D) additions a round; the matrix is plainer."""
    return x.double() @ hadamard_rotation(x.shape[-1], seed, rounds).T


# -- policies


def hybrid(score: Tensor, p: Tensor, seen: Tensor) -> Tensor:
    """AKV's score after one more query: a mixture of decayed attention and recency, fed back into itself.

    `score` and `p`, the query's probabilities, are float64 [..., n]; `seen` is bool [..., n], what the query
    could see. s <- 0.95 s + p, then 0.7 s / max(s) + 0.3 recency. Recency runs from 0 to 1 over the tokens
    seen. Source: akv-cache 1.0.0, there for each call and the mean over rows and heads.
    """
    decayed = torch.where(seen, HYBRID_DECAY * score + p, 0.0)
    share = decayed / decayed.amax(-1, keepdim=True).clamp(min=1e-10)
    recency = (seen.double().cumsum(-1) - 1) / (seen.sum(-1, keepdim=True) - 1).clamp(min=1)
    return torch.where(seen, HYBRID_ATTENTION * share + (1 - HYBRID_ATTENTION) * recency, score)


def expected_attention(
    keys: Tensor, values: Tensor, mean: Tensor, covariance: Tensor, valid: Tensor
) -> Tensor:
    """Attention that Gaussian queries N(mu, Sigma) are expected to pay, times |v|: float64 [..., H, n].

    The softmax over n of k.mu / sqrt(D) + k' Sigma k / (2 D), its mean over the group, times |v|. Source:
    arXiv 2510.00636, kvpress 0.5.5. Raises `ValueError` for heads that do not fit.

    Args:
        keys, values: [..., H, n, D], keys rotated to their positions.
        mean, covariance: [..., Hq, D] and [..., Hq, D, D], of the queries before RoPE, mapped by the mean
            rotation of the next 512 positions.
        valid: bool [..., H or 1, n], False at padding and holes.
    """
    heads, dim = keys.shape[-3], keys.shape[-1]
    if mean.shape[-2] % heads or covariance.shape[-3:] != (mean.shape[-2], dim, dim):
        raise ValueError(f"{heads} KV heads, but queries {mean.shape}, {covariance.shape}")
    k = keys.double()
    mu, sigma = mean.double().unflatten(-2, (heads, -1)), covariance.double().unflatten(-3, (heads, -1))
    logits = torch.einsum("...hgd,...hnd->...hgn", mu, k) / math.sqrt(dim)
    logits = logits + torch.einsum("...hnd,...hgde,...hne->...hgn", k, sigma, k) / (2 * dim)
    attention = logits.masked_fill(~valid.unsqueeze(-2), -math.inf).softmax(-1).mean(-2)
    return attention * values.double().norm(dim=-1)
