"""Attention on codes: the partial of an integer tier, whose tokens are never decoded.

Four steps: scores of chunks of tokens, their statistics, weighted sums of value codes, and the merge
of the chunks. Compiled, each is one kernel, and every stored byte is read once:

- a field of a byte, masked in place and read as the bits of a float16, is code * 2^(shift - 24)
  exactly: no shift and no conversion. The powers of two go into the query, and into the sums;
- codes are the long side of both products and the few queries the short one, so that the tensor cores
  hardly multiply padding;
- scales, zeros, means, softcap and validity are applied to scores as they leave the first product;
  exponential and value scale to weights as they enter the second.

In float32 and float64 the same code makes numbers of the fields, and keeps nothing in float16.

Shapes: N = batch times KV heads, R query rows a KV head (group size times query length), S slots,
Z = N * S / chunk chunks, W bytes of codes a token, D = head_dim.
"""

import math

import torch
from torch import Tensor

from .compile import Compiled, tiles
from .merge import Partial, combine, empty
from .rotated import center

LOG2E = math.log2(math.e)
TOP = 2.0**14  # float16 weights are scaled by this, so that small ones stay normal numbers
LIMIT = 60_000.0  # where float16 scores are cut, in powers of two from the reference
EAGER_TILE = 2048  # slots whose codes become numbers at a time where nothing is fused


def number(codes: Tensor, field: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Field `field` of each byte as a number of `dtype`.

    In float16 it is the code times `unit`, else the code less its centre: products of float16 have
    `center` times the sum of the other operand taken off afterwards.
    """
    if dtype == torch.float16:
        masked = codes if bits == 8 else codes & ((2**bits - 1) << bits * field)
        return masked.to(torch.int16).view(torch.float16)
    return ((codes >> bits * field) & (2**bits - 1)).to(dtype) - center(bits)


def unit(field: int, bits: int, dtype: torch.dtype) -> float:
    """The power of two that `number` multiplies a code by."""
    return 2.0 ** (bits * field - 24) if dtype == torch.float16 else 1.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: float32 for products of float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, 0 where it is NaN or infinite, as slots may be that hold no token."""
    x = x.to(dtype)
    return torch.where(x.abs() <= 65504.0, x, 0.0)


def written(x: Tensor) -> Tensor:
    """`x`, at a place where a compiled kernel has to end and write it.

    To the compiler, a view by strides needs memory to view; without it, a consumer may compute `x` anew.
    """
    return x.as_strided(x.shape, x.stride())


def scores(query, reference, bias, valid, codes, scale, zero, *, bits, chunk, softcap, dtype) -> Tensor:
    """Scores in base 2, less the row's reference: [Z, R, chunk], -inf where there is no token."""
    heads, length, width = codes.shape
    rows, blocks, count = query.shape[1], length // chunk, 8 // bits
    out_dtype, last = wide(dtype), unit(count - 1, bits, dtype)
    # With one field, the compiler keeps the product in float16: lift it out of the subnormal numbers.
    gain = 256.0 if count == 1 and dtype == torch.float16 else 1.0
    rounded = query.to(dtype)
    # Of the query as rounded: what zeros and the codes' centre add then cancels exactly.
    total = _chunks(rounded.to(out_dtype).sum(-1), blocks).unsqueeze(1)
    out = 0.0
    for field in range(count):
        part = query.narrow(-1, field * width, width).to(dtype) * (gain * last / unit(field, bits, dtype))
        codes_of = number(codes.reshape(-1, chunk, width), field, bits, dtype)
        out = out + torch.bmm(codes_of, _chunks(part, blocks).mT).to(out_dtype)
    each = lambda x: x.reshape(-1, chunk, 1).to(out_dtype)  # noqa: E731
    if dtype == torch.float16:
        out = out / (gain * last) - center(bits) * total
    out = out * each(scale)
    if zero is not None:
        out = out + (each(zero) + center(bits) * each(scale)) * total
    means = bias.shape[-1]  # each covers length / means slots
    spread = bias.mT.reshape(heads, means, 1, rows).expand(-1, -1, length // means, -1)
    out = out + spread.reshape(-1, chunk, rows)
    if softcap is not None:
        out = softcap * torch.tanh(out / softcap)
    out = (out - _chunks(reference, blocks).unsqueeze(1)) * LOG2E
    if dtype == torch.float16:
        out = out.clamp(-LIMIT, LIMIT)
    batch = valid.shape[0]
    seen = valid.reshape(batch, 1, blocks, chunk).expand(-1, heads // batch, -1, -1).reshape(-1, chunk, 1)
    out = torch.where(seen, out, -torch.inf)
    return written(out.to(dtype).mT.clone(memory_format=torch.contiguous_format))


def statistics(scores: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int):
    """Of each chunk, [Z, R] each: the maximum, and the sums of weights, of weights times scales, and of
    weights times what a value code at its centre stands for (None where that is 0)."""
    dtype, chunk = wide(scores.dtype), scores.shape[-1]
    scores = scores.to(dtype)
    top = scores.amax(-1, keepdim=True).clamp_min(-65504.0)
    weights = torch.exp2(scores - top)
    scale = finite(scale, dtype).reshape(-1, 1, chunk)
    total, scaled, shift = weights.sum(-1), (weights * scale).sum(-1), None
    if zero is not None:
        shift = (weights * (finite(zero, dtype).reshape(-1, 1, chunk) + center(bits) * scale)).sum(-1)
    return top.squeeze(-1), total, scaled, shift


def sums(scores, top, scaled, codes, scale, bound, *, bits, chunk, dtype) -> list[Tensor]:
    """Weighted sums of value codes less their centre, over bound: [Z, W, R] for each field of a byte.

    `codes` [N, W, S] are stored tokens last; `bound` [N] is at least every valid scale.
    """
    heads, width, length = codes.shape
    blocks = length // chunk
    codes = codes.reshape(heads, width, blocks, chunk).transpose(1, 2).reshape(-1, width, chunk)
    factor = _chunks((TOP if dtype == torch.float16 else 1.0) / bound, blocks).reshape(-1, 1, 1)
    lean = scaled.unsqueeze(1) / _chunks(bound, blocks).reshape(-1, 1, 1)
    weights = torch.exp2(scores.to(wide(dtype)) - top.unsqueeze(-1))
    weights = (weights * (finite(scale, wide(dtype)).reshape(-1, 1, chunk) * factor)).to(dtype).mT
    out = []
    for field in range(8 // bits):
        product = torch.bmm(number(codes, field, bits, dtype), weights).to(wide(dtype))
        if dtype == torch.float16:
            product = product * (1 / (unit(field, bits, dtype) * TOP))
            product = (product - center(bits) * lean) * (1 / _shrink(bits, chunk))
        out.append(written(product.to(dtype)))
    return out


def _shrink(bits: int, chunk: int) -> float:
    """A power of two that keeps a chunk's sum of codes within float16."""
    return 2.0 ** max(0, math.ceil(math.log2((2**bits - 1) * chunk / 60_000)))


def join(parts, top, total, shift, reference, bound, *, bits, chunk, dtype):
    """One partial of all chunks: the fields' sums [N, W, R], and `top` and `total` [N, R].

    Statistics are broadcast over the bytes of a token, so that all reductions have one shape.
    """
    heads, (width, rows) = bound.shape[0], parts[0].shape[1:]
    blocks = parts[0].shape[0] // heads
    wider = lambda x: x.reshape(heads, blocks, 1, rows).expand(-1, -1, width, -1)  # noqa: E731
    best = wider(top).amax(1)
    weight = torch.exp2(wider(top) - best.unsqueeze(1))
    offset = 0.0 if shift is None else (weight * wider(shift)).sum(1)
    sum_all = (weight * wider(total)).sum(1)
    factor = bound.reshape(-1, 1, 1) * (_shrink(bits, chunk) if dtype == torch.float16 else 1.0)
    out = [
        (part.reshape(heads, blocks, width, rows).to(wide(dtype)) * weight).sum(1) * factor + offset
        for part in parts
    ]
    return out, best.select(1, 0) / LOG2E + reference, sum_all.select(1, 0)


def attend_chunks(
    query, reference, bias, valid,
    key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, bound,
    *, bits, chunk, softcap, dtype,
):  # fmt: skip
    """All four steps: see `attend`. Returns what `join` does."""
    rows = query.shape[1]
    if rows == 1:  # a product of one column would not run on tensor cores
        query, reference, bias = (x.expand(-1, 2, *x.shape[2:]) for x in (query, reference, bias))
    key_bits, value_bits = bits
    found = scores(
        query, reference, bias, valid, key_codes, key_scale, key_zero,
        bits=key_bits, chunk=chunk, softcap=softcap, dtype=dtype,
    )  # fmt: skip
    top, total, scaled, shift = statistics(found, value_scale, value_zero, bits=value_bits)
    parts = sums(
        found, top, scaled, value_codes, value_scale, bound, bits=value_bits, chunk=chunk, dtype=dtype
    )
    parts, top, total = join(
        parts, top, total, shift, reference, bound, bits=value_bits, chunk=chunk, dtype=dtype
    )
    return [x[..., :rows] for x in parts], top[:, :rows], total[:, :rows]


def _chunks(x: Tensor, blocks: int) -> Tensor:
    """One [N, ...] for each chunk: [N * blocks, ...]."""
    return x.unsqueeze(1).expand(-1, blocks, *x.shape[1:]).reshape(-1, *x.shape[1:])


_compiled = Compiled(attend_chunks)


def attend(
    query: Tensor,
    reference: Tensor,
    bias: Tensor,
    valid: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    values: tuple[Tensor, Tensor, Tensor | None],
    bound: Tensor,
    bits: tuple[int, int],
    softcap: float | None = None,
    half: bool = False,
) -> Partial:
    """Partial attention of an integer tier; its `acc` is in the rotated domain.

    Args:
        query: [B, H, R, D] float32 or float64, scaled and rotated.
        reference: [B, H, R], a score near the row's largest. What is kept in float16 is the distance
            from it, so that the largest weights are exact; any value is right.
        bias: [B, H, R, M], what the keys' means add to the scores; mean m is that of slots
            m * S / M onwards.
        valid: bool [B, 1, S] or [B, H, S], False where a slot holds no token.
        keys: codes [B, H, S, W] uint8, scale and zero (or None) [B, H, S] float16.
        values: codes [B, H, W, S] uint8, tokens last; scale and zero as for keys.
        bound: [B, H], at least every valid value scale.
        bits: widths of keys and values; 3-bit codes are not read here.
        softcap: c in c * tanh(s / c), or None.
        half: whether to compute with float16 products. Relative error below 2e-3, otherwise 1e-5.

    On CUDA, with `half`, and if S is a multiple of 128, the compiled twin runs; else the function
    itself, tile by tile.
    """
    batch, heads, rows, dim = query.shape
    length = keys[0].shape[2]
    dtype = torch.float16 if half else query.dtype
    flat = lambda x: None if x is None else x.flatten(0, 1)  # noqa: E731
    fixed = [flat(query), flat(reference)]
    bias, valid = flat(bias), valid.flatten(0, 1)
    keys, values, bound = [flat(x) for x in keys], [flat(x) for x in values], flat(bound).to(wide(dtype))
    options = dict(bits=bits, softcap=softcap, dtype=dtype)

    def shaped(parts, top, total) -> Partial:
        acc = torch.cat(parts, dim=1).mT
        return Partial(*(x.unflatten(0, (batch, heads)) for x in (acc, top, total)))

    if half and query.is_cuda and length % 128 == 0:
        chunk = best_chunk(batch * heads, length, rows)
        pinned = tiles(rows, batch * heads, length, chunk, keys[0].shape[2], values[0].shape[1])
        return shaped(*_compiled(pinned, *fixed, bias, valid, *keys, *values, bound, chunk=chunk, **options))
    whole = empty(query)
    per_mean = length // bias.shape[-1]
    tile = (
        length if bias.shape[-1] == 1 and length <= EAGER_TILE else max(1, EAGER_TILE // per_mean) * per_mean
    )
    tile = min(tile, EAGER_TILE) if bias.shape[-1] == 1 else tile
    for start in range(0, length, tile):
        s = slice(start, min(start + tile, length))
        means = bias if bias.shape[-1] == 1 else bias[..., s.start // per_mean : -(-s.stop // per_mean)]
        part = attend_chunks(
            *fixed, means, valid[:, s], *(x if x is None else x[:, s] for x in keys),
            values[0][..., s], *(x if x is None else x[:, s] for x in values[1:]), bound,
            chunk=s.stop - s.start, **options,
        )  # fmt: skip
        whole = combine(whole, shaped(*part))
    return whole


def bucket(length: int) -> int:
    """The smallest of a few lengths that holds `length` slots: eight to a doubling, multiples of 128.

    The compiled twin is a graph a length; slots beyond those in use are masked.
    """
    step = max(128, (1 << max(0, length - 1).bit_length()) // 16)
    return -(-length // step) * step


def best_chunk(heads: int, length: int, rows: int) -> int:
    """Tokens a program of the second product sums: measured on an H100 (docs/lab-notebook.md)."""
    total = heads * length
    wanted = 2048 if total >= 1 << 20 else 512 if total >= 1 << 19 else 256 if total >= 1 << 17 else 128
    wanted = min(wanted, 512) if rows > 4 else wanted
    while length % wanted:
        wanted //= 2
    return wanted
