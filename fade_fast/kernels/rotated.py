"""The integer tiers: codes of 8, 4, 3 or 2 bits of the `rotated` codec.

A vector is centered (keys only), rotated by an orthogonal matrix P, and quantized independently of the
others. 8 and 4 bits are uniform codes with a scale and a zero point. 3 and 2 bits are Lloyd-Max codes of
evenly spaced levels, with a scale that makes the decoded vector unbiased.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.compiled import Compiled, use_compiled

#: Distance between quantization levels of N(0, 1), by bits; `fade_ref.quantize.levels(bits, "linear")`
#: derives it.
STEPS = {3: 0.5860194414434866, 2: 0.995686685943507}
SMALLEST_SCALE = 2.0**-14  # the smallest normal fp16 number: scales never become subnormal
LARGEST = 65504.0  # the largest finite fp16 number


class Packed(NamedTuple):
    """Codes of n tokens of one tier, keys or values, with their scales and zero points.

    Shapes: `codes` [B, H, n, D * bits / 8] uint8, `scale` and `zero` (zero point) [B, H, n] fp16. `zero` is
    None if codes are centered on zero: at 3 and 2 bits, and in the matched codec.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def rotation(dim: int, seed: int = 0) -> Tensor:
    """Seeded Haar-random orthogonal matrix P [dim, dim], float64, made on the CPU.

    QR of a Gaussian matrix with the signs fixed (TurboQuant, arXiv 2504.19874, section 3). Every machine gets
    the same matrix. A vector is rotated by `x @ P.T` and back by `y @ P`.
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def with_sum(matrix: Tensor) -> Tensor:
    """P [D, D] with the sum of its rows below, which gives the sum of a rotated query: [D + 1, D]."""
    return torch.cat((matrix, matrix.sum(0, keepdim=True)))


def is_uniform(bits: int) -> bool:
    """Whether codes of this width have a zero point. Codes of 3 and 2 bits are centered on zero."""
    return bits >= 4


def center(bits: int) -> float:
    """The center of the codes of a width."""
    return (2**bits - 1) / 2


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] to bytes [..., D * bits / 8]; `fade_ref.quantize.pack` draws the layout."""
    if bits == 8:
        return codes
    if bits == 3:
        first, second, *cut = codes.split(thirds(codes.shape[-1]), dim=-1)
        bit = torch.arange(3, device=codes.device, dtype=torch.uint8).unsqueeze(-1)
        low, high = ((torch.bitwise_right_shift(c.unsqueeze(-2), bit) & 1).flatten(-2) for c in cut)
        return first | (second << 3) | (low << 6) | (high << 7)
    parts = codes.unflatten(-1, (8 // bits, -1)).to(torch.int32)
    shift = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32).unsqueeze(-1)
    return (parts << shift).sum(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: bytes [..., D * bits / 8] to codes [..., D], as int32."""
    packed = packed.to(torch.int32)
    if bits == 8:
        return packed
    if bits == 3:
        bit = torch.arange(3, device=packed.device, dtype=torch.int32).unsqueeze(-1)
        cut = ((packed >> shift & 1).unflatten(-1, (3, -1)) for shift in (6, 7))
        cut = ((x << bit).sum(-2, dtype=torch.int32) for x in cut)
        return torch.cat((packed & 7, packed >> 3 & 7, *cut), dim=-1)
    shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.int32).unsqueeze(-1)
    return (torch.bitwise_right_shift(packed.unsqueeze(-2), shift) & (2**bits - 1)).flatten(-2)


def thirds(dim: int) -> list[int]:
    """Channels of the four fields of a byte at 3 bits.

    The first two fields hold a whole code. The last two hold one bit of a code.
    """
    return [3 * dim // 8, 3 * dim // 8, dim // 8, dim // 8]


def levels(codes: Tensor, bits: int, dtype: torch.dtype, centered: bool) -> Tensor:
    """The number that the scale multiplies: the code, minus the center if there is no zero point."""
    return codes.to(dtype) - center(bits) if centered else codes.to(dtype)


def quantize(rotated: Tensor, bits: int) -> Packed:
    """Codes of vectors that are already centered and rotated: float32 [B, H, n, D]."""
    codes, scale, zero = quantize_apart(rotated, bits)
    return Packed(pack(codes, bits), scale, zero)  # Dynamo of torch 2.11 cannot return what `_replace` makes


def quantize_apart(rotated: Tensor, bits: int) -> Packed:
    """`quantize`, with each code in a byte of its own: uint8 [B, H, n, D]."""
    steps = 2**bits - 1
    if is_uniform(bits):
        low, high = rotated.aminmax(dim=-1, keepdim=True)
        zero = low.clamp(-LARGEST, LARGEST).half()
        scale = ((high - low) / steps).clamp(SMALLEST_SCALE, LARGEST).half()
        codes = ((rotated - zero.float()) / scale.float()).round().clamp(0, steps)
        return Packed(codes.to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1))
    norm = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True)
    unit = rotated / norm.clamp_min(torch.finfo(norm.dtype).tiny) * rotated.shape[-1] ** 0.5
    table = levels(torch.arange(steps + 1, device=rotated.device), bits, rotated.dtype, True)
    ends = (table[1:] + table[:-1]) / 2 * STEPS[bits]
    codes = torch.bucketize(unit, ends)
    # Unbiased: the inner product of decoded and original vector is the squared norm of the original.
    aligned = (rotated * table[codes]).sum(-1).clamp_min(torch.finfo(norm.dtype).tiny)
    scale = (norm.squeeze(-1).square() / aligned).clamp_max(LARGEST).half()
    return Packed(codes.to(torch.uint8), scale, None)


def dequantize(packed: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """Vectors [B, H, n, D] in the rotated, centered domain."""
    return scaled(packed._replace(codes=unpack(packed.codes, bits)), bits, dtype)


def scaled(apart: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """`dequantize` for codes in bytes of their own, as `quantize_apart` returns them."""
    codes = levels(apart.codes, bits, dtype, apart.zero is None)
    decoded = codes * apart.scale.to(dtype).unsqueeze(-1)
    return decoded if apart.zero is None else decoded + apart.zero.to(dtype).unsqueeze(-1)


def encode(x: Tensor, mean: Tensor | None, matrix: Tensor, bits: int) -> Packed:
    """Center, rotate and quantize.

    Args:
        x: [..., D], any floating dtype; computed in float32.
        mean: broadcastable to `x`, or None for values.
        matrix: P [D, D] float32.
        bits: 8, 4, 3 or 2.
    """
    x = x.float()
    return quantize((x if mean is None else x - mean.float()) @ matrix.mT, bits)


def encode_both(
    keys: Tensor, values: Tensor, mean: Tensor, matrix: Tensor, bits: tuple[int, int], recurs: bool = True
) -> tuple[Packed, Packed]:
    """`encode` for the keys and values of some tokens, in tiles that limit the memory in float32.

    Args:
        keys, values: [B, H, n, D].
        mean: [B, H, m, D], means of the keys; each is the mean of n / m tokens.
        matrix: P [D, D] float32.
        bits: widths of keys and values.
        recurs: whether this token count recurs (then a compiled version pays).

    On CUDA everything is compiled, except a few tokens whose count does not recur. Up to `SMALL` tokens are
    encoded in one piece. More are encoded in tiles of three sizes, the last tile padded, so that a few graphs
    serve prompts of all lengths.
    """
    eager, compiled = (functools.partial(f, *x) for f, x in ((_encode_both, [[]]), (_compiled, [[], dict])))
    return in_tiles(compiled, eager, keys, values, mean, [matrix], bits, recurs)


def in_tiles(
    compiled: Callable,
    eager: Callable,
    keys: Tensor,
    values: Tensor,
    mean: Tensor,
    tables: list[Tensor],
    bits: tuple[int, int],
    recurs: bool,
    most: int | None = None,
) -> tuple[Packed, Packed]:
    """Codes of keys and values by `eager` or its `compiled` version; see `encode_both`.

    `most` is the number of elements of keys in the largest compiled tile, `MOST` by default.
    """
    (batch, heads, length, dim), means = keys.shape, mean.shape[2]
    if recurs and use_compiled(keys) and 0 < length <= SMALL:
        return compiled(keys, values, mean, *tables, bits=bits)
    each = length // means if means > 1 else 1  # a tile holds whole groups
    pads = use_compiled(keys) and length > SMALL
    parts = []
    for start, stop, size in _tiles(length, (most or MOST) // (batch * heads * dim) if pads else None, each):
        groups = mean if means == 1 else mean[:, :, start // each : stop // each]
        part = keys[:, :, start:stop], values[:, :, start:stop], groups
        if pads:
            sizes = size, size, 1 if means == 1 else size // each
            part = [_padded(x, n) for x, n in zip(part, sizes)]
            sides = compiled(*part, *tables, bits=bits)
            parts.append([[x if x is None else x[:, :, : stop - start] for x in side] for side in sides])
        else:
            parts.append(eager(*part, *tables, bits=bits))
    return tuple(Packed(*(_join(x) for x in zip(*side))) for side in zip(*parts))


def key_mean(keys: Tensor, real: Tensor | None) -> Tensor:
    """Mean of the real tokens of each group: keys [B, H, G, n, D] to fp16 [B, H, G, D].

    `real` is bool [B, 1, G, n]; None: all tokens count. A group without a real token has mean 0. The sum is
    in float64, so that its order leaves no trace in the fp16 result. A few groups are summed at a time,
    because PyTorch copies the summands to float64.
    """
    step = max(1, ELEMENTS_SUMMED // max(1, keys[:, :, :1].numel()))
    masks = itertools.repeat(None) if real is None else real.split(step, dim=2)
    means = [_key_mean(*part) for part in zip(keys.split(step, dim=2), masks)]
    return means[0] if len(means) == 1 else torch.cat(means, dim=2)


def _key_mean(keys: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        mean = keys.sum(-2, dtype=torch.float64) / keys.shape[-2]
    else:
        total = keys.masked_fill(~real[..., None], 0).sum(-2, dtype=torch.float64)
        mean = total / real[..., None].sum(-2).clamp_min(1)
    return mean.clamp(-LARGEST, LARGEST).half()


ELEMENTS_SUMMED = 1 << 24  # elements that are copied to float64 at a time
TILE = 2048  # tokens per tile without compilation, and of a compiled one for short prompts
MOST = 1 << 24  # elements of keys in the largest compiled tile, if its encoder names no other number
MOST_TOKENS = 1 << 14  # most tokens of the largest compiled tile
SMALL = 256  # tokens of the smallest compiled tile, and most tokens of a block with its own compiled version


def _tiles(length: int, most: int | None, step: int) -> list[tuple[int, int, int]]:
    """`(start, stop, size)` of the tiles of `length` tokens. Sizes are multiples of `step`.

    A tile has `most` tokens, `TILE` or half of `most`, whichever is less, or `SMALL`; if `most` is None, it
    has `TILE` tokens. At most half of a tile is padding, except in tiles of the smallest size.
    """
    large = TILE if most is None else min(MOST_TOKENS, max(SMALL, most))
    sizes = [TILE] if most is None else [large, max(SMALL, min(TILE, large // 2)), SMALL]
    sizes = [max(1, n // step) * step for n in sizes]
    tiles, start = [], 0
    while start < length or not tiles:
        size = next((n for n in sizes if length - start > n // 2), sizes[-1])
        tiles.append((start, min(start + size, length), size))
        start += size
    return tiles


def _padded(x: Tensor, size: int) -> Tensor:
    """`x` [B, H, n, D] padded with zeros to n = `size`; contiguous, so strides do not depend on n."""
    return torch.nn.functional.pad(x, (0, 0, 0, size - x.shape[2])).contiguous()


def _join(parts: tuple) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, dim=2)


def _encode_both(dynamic_sizes, keys, values, mean, matrix, *, bits) -> tuple[Packed, Packed]:
    groups = keys.unflatten(2, (mean.shape[2], keys.shape[2] // mean.shape[2]))
    side = encode(groups, mean.unsqueeze(3), matrix, bits[0])
    sides = side, Packed(values, None, None) if bits[1] == 16 else encode(values, None, matrix, bits[1])
    return Packed(*(x if x is None else x.flatten(2, 3) for x in sides[0])), sides[1]


def decode(packed: Packed, mean: Tensor | None, matrix: Tensor, bits: int, dtype) -> Tensor:
    """Vectors [B, H, n, D] as they were before `encode`, up to quantization.

    `matrix` is P [D, D], or that of each KV head, [H, D, D].
    """
    if bits == 16:  # values in the model's dtype
        return packed.codes.to(dtype)
    x = dequantize(packed, bits, dtype) @ matrix.to(dtype)
    return x if mean is None else x + mean.to(dtype)


# Codes are defined by the stored scales and zero points, which are rounded.
_compiled = Compiled(_encode_both, options={"emulate_precision_casts": True})
