"""Attention on codes: the partial of an integer tier, whose tokens are never decoded.

Four steps: scores of chunks of tokens, their statistics, weighted sums of value codes, and the merge
of the chunks. Compiled (`step.py`), each is one kernel, and every stored byte is read once:

- a field of a byte, masked in place and read as the bits of a float16, is code * 2^(shift - 24)
  exactly: no shift and no conversion. The powers of two go into the query, and into the sums. So do
  those of the bits of a code that are spread over three bytes;
- codes are the long side of both products and the few queries the short one, so that the tensor cores
  hardly multiply padding;
- scales, zeros, means, softcap and validity are applied to scores as they leave the first product;
  exponential and value scale to weights as they enter the second.

In float32 and float64 the same code makes numbers of the fields, and keeps nothing in float16.

Shapes: N = batch times KV heads, R query rows a KV head (group size times query length), S slots,
Z = N * S / chunk chunks, W bytes of codes a token, D = head_dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.page_gather import pages_of
from .merge import Partial, combine, empty
from .rope import as_sum, cos_sin, swap
from .rotated import Packed, center, dequantize, thirds

LOG2E = math.log2(math.e)
TOP = 2.0**14  # float16 weights are scaled by this, so that small ones stay normal numbers
DENSE_TOP = 16.0  # the same for weights of 16-bit values: the sum of a chunk must stay within float16
LIMIT = 60_000.0  # where float16 scores are cut, in powers of two from the reference
LONG = 1 << 14  # slots of a buffer in which a few more for alignment are not many
EAGER_TILE = 2048  # slots whose codes become numbers at a time where nothing is fused


class TierView(NamedTuple):
    """What kernels read of a tier.

    Attributes:
        keys: codes [B, H, S, W] uint8, scale and zero (or None) [B, H, S] float16.
        values: codes [B, H, W, S] uint8, tokens last; scale and zero as for keys.
        bound: [B, H], at least every valid value scale.
        means: [B, H, M, D] float16, the means of the keys: one for each `per_mean` slots, or one for all.
        valid: bool [B, 1 or R, S], False where a slot holds no token that the row sees.
        read_at: int32 [B, 1, S], where RoPE reads keys that were encoded before it; None if they were
            encoded as they are read.
        block_table: int32 or int64 [B, n], the pages of each row of the batch, which all its KV heads
            share; None if slots lie side by side.

    With a block table, codes, scales and zeros are those of P pages: of keys [P, H, page, W], of values
    [P, H, W, page], scales and zeros [P, H, page]. Slot i of row b is slot i % page of page
    `block_table[b, i // page]`. All else means the same: `bound` and `means` belong to rows, `valid` and
    `read_at` to their slots. Where no slot of a block is valid, its entry may be any number, for
    an entry is cut to the pages that there are; the numbers of its page may be NaN.

    Strides are free: bytes of a token may lie side by side in value codes, too.

    `flat` is the same with batch and heads as one dimension of N, but for `valid`, `read_at` and pages.
    """

    keys: Packed
    values: Packed
    bound: Tensor
    means: Tensor
    valid: Tensor
    per_mean: int
    read_at: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.valid.shape[-1]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.keys.codes.shape[2]

    def flat(self) -> "TierView":
        view = self._replace(bound=self.bound.flatten(0, 1), means=self.means.flatten(0, 1))
        if self.block_table is not None:
            return view
        keys, values = (
            Packed(*(None if x is None else x.flatten(0, 1) for x in side))
            for side in (self.keys, self.values)
        )
        return view._replace(keys=keys, values=values)

    def first(self, length: int) -> "TierView":
        """Of a flat record, the first `length` slots; pages stay where they are."""
        return self._cut(0, length) if self.block_table is not None else self.narrow(0, length)

    def narrow(self, start: int, length: int) -> "TierView":
        """Of a flat record, slots `start` to `start + length`; `start` is a whole number of means.

        Without a block table: pages are gathered.
        """
        view = self._cut(start, length)
        if self.block_table is not None:
            (codes, *keys), (value_codes, *values) = self.paged()
            of = lambda x, axis=1: None if x is None else x.slots(start, length, axis)  # noqa: E731
            return view._replace(
                keys=Packed(of(codes), *map(of, keys)),
                values=Packed(of(value_codes, 2), *map(of, values)),
                block_table=None,
            )
        cut = lambda x: None if x is None else x.narrow(-1, start, length)  # noqa: E731
        return view._replace(
            keys=Packed(self.keys.codes.narrow(1, start, length), cut(self.keys.scale), cut(self.keys.zero)),
            values=Packed(*map(cut, self.values)),
        )

    def _cut(self, start: int, length: int) -> "TierView":
        """What does not lie in pages, of these slots."""
        first, means = start // self.per_mean, -(-length // self.per_mean)
        if self.means.shape[1] == 1:
            first, means = 0, 1
        cut = lambda x: None if x is None else x.narrow(-1, start, length)  # noqa: E731
        return self._replace(
            means=self.means.narrow(1, first, means), valid=cut(self.valid), read_at=cut(self.read_at)
        )

    def paged(self) -> tuple[Packed, Packed]:
        """Keys and values as `Pages`, of a record with a block table."""
        make = lambda x: None if x is None else Pages(x, self.block_table, self.capacity)  # noqa: E731
        return Packed(*map(make, self.keys)), Packed(*map(make, self.values))


class Pages(NamedTuple):
    """A field of a tier with a block table: what [N, S, ...] or, of value codes, [N, W, S] would hold.

    Attributes:
        pages: [P, H, page, ...], of value codes [P, H, W, page].
        table: [B, n]. length: S.
    """

    pages: Tensor
    table: Tensor
    length: int

    def slots(self, start: int, length: int, axis: int = 1) -> Tensor:
        """Slots `start` to `start + length`, along `axis`: 1, of value codes 2."""
        page = self.pages.shape[axis + 1]
        first, last = start // page, -(-(start + length) // page)
        found = self._of(self.table.narrow(1, first, last - first))  # [B, n, H, ...]
        found = found.movedim(1, axis + 1).flatten(axis + 1, axis + 2).flatten(0, 1)
        return found.narrow(axis, start - first * page, length)

    def chunks(self, chunk: int, axis: int = 1) -> Tensor:
        """As `_cut` makes them. The table is cut, and not what it gathers: the compiler then divides by
        constants only."""
        page, blocks = self.pages.shape[axis + 1], self.length // chunk
        if chunk % page:
            return _cut(self.slots(0, blocks * chunk, axis), chunk, axis)
        table = self.table.narrow(1, 0, blocks * (chunk // page)).unflatten(1, (blocks, chunk // page))
        found = self._of(table.transpose(0, 1))  # [blocks, B, chunk / page, H, ...]
        return found.movedim(2, axis + 2).flatten(axis + 2, axis + 3).flatten(0, 2)

    def _of(self, table: Tensor) -> Tensor:
        return pages_of(self.pages, table.clamp(0, self.pages.shape[0] - 1))


class Queries(NamedTuple):
    """Queries of a step as a tier needs them; computed once for all tiers.

    Attributes:
        plain: [N, R, D], scaled. turned: the same rotated by the codec, total: [N, R] its sum over D.
        reference: [N, R], a score near the row's largest. What is kept in float16 is the distance
            from it, so that the largest weights are exact; any value is right.
    """

    plain: Tensor
    rotated: Tensor
    total: Tensor
    reference: Tensor


class Decoder(NamedTuple):
    """What decodes keys that RoPE has yet to rotate: P [D, D], frequencies [d / 2], the style of pairs."""

    matrix: Tensor
    inv_freq: Tensor
    interleaved: bool


class Field(NamedTuple):
    """Codes as a matrix, one field of their bytes: `numbers` are unit * (code - centre), but in float16
    unit * code, of which `center_offset`, the centre, is still to be taken off."""

    numbers: Tensor
    unit: float
    center_offset: float


DENSE = 16  # bits of values that are stored in the model's dtype, neither rotated nor quantized
#: The fields of a byte, by bits a code: shift and width. Of the one-bit fields, see `rotated.thirds`.
FIELDS = {
    8: [(0, 8)],
    4: [(0, 4), (4, 4)],
    3: [(0, 3), (3, 3), (6, 1), (7, 1)],
    2: [(0, 2), (2, 2), (4, 2), (6, 2)],
}


def fields(codes: Tensor, bits: int, dtype: torch.dtype, axis: int) -> list[Field]:
    """Codes as matrices of `dtype`, whose bytes lie along `axis`.

    There are at least two matrices, halves where a byte has one field: the compiler keeps a single
    product in float16 and ends its kernel there; a sum of products stays in float32, and what
    follows stays in the kernel.
    """
    if bits == DENSE:
        return [Field(x, 1.0, 0.0) for x in codes.to(dtype).chunk(2, axis)]
    out = []
    for shift, width in FIELDS[bits]:
        unit, center_offset = 1.0, center(width)
        if dtype == torch.float16:
            masked = codes if width == 8 else codes & ((2**width - 1) << shift)
            numbers, unit = masked.to(torch.int16).view(dtype), 2.0 ** (shift - 24)
        else:
            numbers, center_offset = ((codes >> shift) & (2**width - 1)).to(dtype) - center_offset, 0.0
        out += [Field(x, unit, center_offset) for x in (numbers.chunk(2, axis) if width == 8 else [numbers])]
    return out


def field_width(bits: int, dim: int) -> int:
    """Rows of the matrices that `fields` makes of a token's bytes."""
    return dim * min(bits, 4) // 8


def operands(x: Tensor, bits: int) -> list[Tensor]:
    """Channels [..., D] as what the fields are multiplied with: where a byte has one bit of a code, the
    channel three times, by what its bits are worth."""
    if bits != 3:
        return list(x.split(field_width(bits, x.shape[-1]), dim=-1))
    first, second, *cut = x.split(thirds(x.shape[-1]), dim=-1)
    worth = (1 << torch.arange(3, device=x.device)).to(x.dtype).unsqueeze(-1)
    return [first, second, *((c.unsqueeze(-2) * worth).flatten(-2) for c in cut)]


def channels(parts: list[Tensor], bits: int) -> list[Tensor]:
    """Sums of the fields, [N, W, R] each, as those of the channels: D rows in all, in order."""
    if bits != 3:
        return parts
    first, second, *cut = parts
    low, middle, high = zip(*(x.chunk(3, 1) for x in cut))
    return [first, second, *(a + 2 * b + 4 * c for a, b, c in zip(low, middle, high))]


def offset(bits: int, dtype: torch.dtype) -> float:
    """What every code still lacks: see `Field`."""
    return center(bits) if dtype == torch.float16 else 0.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: float32 for products of float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, 0 where it is NaN or infinite, as slots may be that hold no token."""
    x = x.to(dtype)
    return torch.where(x.abs() <= 65504.0, x, 0.0)


def force_materialize(x: Tensor) -> Tensor:
    """`x`, at a place where a compiled kernel has to end and write it.

    To the compiler, a view by strides needs memory to view; without it, a consumer may compute `x` anew.
    """
    return x.as_strided(x.shape, x.stride())


def products(query: Queries, bias: Tensor, view: TierView, *, bits, chunk, dtype) -> Tensor:
    """Scores from codes, [Z, chunk, R]; `bias` [N, R, M] is what the keys' means add."""
    codes, *rest = view.keys
    blocks, sum_dtype = view.capacity // chunk, wide(dtype)
    parts = fields(_cut(codes, chunk), bits, dtype, -1)
    largest, center_offset = parts[-1].unit, offset(bits, dtype)
    total = _chunks(query.total, blocks).unsqueeze(1)
    out = 0.0
    for field, part in zip(parts, operands(query.rotated, bits)):
        part = part.to(dtype) * (largest / field.unit)
        out = out + torch.bmm(field.numbers, _chunks(part, blocks).mT).to(sum_dtype)
    scale, zero = (None if x is None else _cut(x, chunk).unsqueeze(-1).to(sum_dtype) for x in rest)
    if zero is None:
        out = (out / largest - center_offset * total) * scale
    else:
        if not center_offset:  # codes as stored are counted from their zero, others from their centre
            zero = zero + center(bits) * scale
        out = out * (scale / largest) + zero * total
    return out + _spread(bias.mT, view.per_mean, blocks, chunk)


def decoded_products(query: Queries, decoder: Decoder, view: TierView, *, bits, chunk, dtype) -> Tensor:
    """Scores [Z, chunk, R] of keys that are decoded, and rotated to where they are read."""
    heads, batch = query.total.shape[0], view.read_at.shape[0]
    blocks = view.capacity // chunk
    position = _cut(view.read_at.squeeze(1), chunk)
    codes = Packed(*(None if x is None else _cut(x, chunk) for x in view.keys))
    rotated = dequantize(codes, bits, wide(dtype)).to(dtype)
    # Once for all heads, or each would take sines of its own.
    angles = [force_materialize(x) for x in cos_sin(position, decoder.inv_freq, wide(dtype))]
    factors = as_sum(*angles, rotated.shape[-1], decoder.interleaved)
    width, keys = 2 * angles[0].shape[-1], 0.0
    # RoPE's two terms as two products: then it ends the kernel that decodes.
    for factor, swapped in zip(factors, (False, True)):
        to = (lambda x: swap(x, width, decoder.interleaved)) if swapped else lambda x: x
        part = torch.bmm(rotated, to(decoder.matrix).to(dtype).expand(rotated.shape[0], -1, -1))
        mean = _spread(to(view.means).to(wide(dtype)), view.per_mean, blocks, chunk)
        factor = factor.unsqueeze(1).expand(-1, heads // batch, -1, -1).flatten(0, 1)
        keys = keys + (part.to(wide(dtype)) + mean) * factor
    keys = force_materialize(keys.to(dtype))  # or the product would take sines of every tile it loads
    halves = zip(keys.chunk(2, -1), query.plain.to(dtype).chunk(2, -1))  # see `fields`
    return sum(torch.bmm(k, _chunks(q, blocks).mT).to(wide(dtype)) for k, q in halves)


def scores(
    query: Queries, bias, view: TierView, decoder: Decoder | None, *, bits, chunk, softcap, dtype
) -> Tensor:
    """Scores in base 2, less the row's reference: [Z, R, chunk], -inf where there is no token."""
    options = dict(bits=bits, chunk=chunk, dtype=dtype)
    if decoder is None:
        scores = products(query, bias, view, **options)
    else:
        scores = decoded_products(query, decoder, view, **options)
    reference, valid = query.reference, view.valid
    heads = reference.shape[0]
    blocks = scores.shape[0] // heads
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores * LOG2E - _chunks(reference * LOG2E, blocks).unsqueeze(1)
    if dtype == torch.float16:  # below, it may become -inf: a weight of 0
        scores = torch.where(scores > LIMIT, LIMIT, scores)
    batch, rows, _ = valid.shape
    seen = valid.reshape(batch, 1, rows, blocks, chunk).expand(-1, heads // batch, -1, -1, -1)
    scores = torch.where(seen.permute(3, 0, 1, 4, 2).reshape(-1, chunk, rows), scores, -torch.inf)
    return force_materialize(scores.to(dtype).mT.clone(memory_format=torch.contiguous_format))


def statistics(scores: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int):
    """Of each chunk, [Z, R] each: the maximum, and the sums of weights, of weights times scales, and of
    weights times what a value code at its centre stands for (None where that is 0)."""
    dtype, chunk = wide(scores.dtype), scores.shape[-1]
    each = lambda x: finite(_cut(x, chunk), dtype).unsqueeze(1)  # noqa: E731
    scores = scores.to(dtype)
    top = scores.amax(-1, keepdim=True).clamp_min(-65504.0)
    weights = torch.exp2(scores - top)
    if scale is None:
        return top.squeeze(-1), weights.sum(-1), None, None
    scale = each(scale)
    total, scaled, shift = weights.sum(-1), (weights * scale).sum(-1), None
    if zero is not None:
        shift = (weights * (each(zero) + center(bits) * scale)).sum(-1)
    return top.squeeze(-1), total, scaled, shift


def sums(scores, top, scaled, codes, scale, bound, *, bits, chunk, dtype) -> list[Tensor]:
    """Weighted sums of value codes less their centre, over bound: [Z, W, R] for each of the `fields`.

    `codes` [N, W, S] are stored tokens last; `bound` [N] is at least every valid scale. Values of 16 bits
    have no scale: `bound` is at least every valid absolute value. Divided by it, no value overflows float16,
    and slots without a token, which may hold anything larger or NaN, become 0.
    """
    blocks, codes = scores.shape[0] // bound.shape[0], _cut(codes, chunk, 2)
    bounds, most = _chunks(bound, blocks), TOP if dtype == torch.float16 else 1.0
    top = _chosen(top) if bits == 8 and dtype == torch.float16 and top.shape[1] <= 4 else top.unsqueeze(-1)
    weights = torch.exp2(scores.to(wide(dtype)) - top)
    if bits == DENSE:
        numbers = codes.to(wide(dtype))
        bounds = bounds.reshape(-1, 1, 1)
        codes = torch.where(numbers.abs() <= bounds, numbers / bounds, 0.0)
        weights, lean = (weights * DENSE_TOP).to(dtype).mT, 0.0
    else:
        factor = _chunks(most / bound, blocks).reshape(-1, 1, 1)
        lean = scaled.unsqueeze(1) / bounds.reshape(-1, 1, 1)
        weights = (weights * (finite(_cut(scale, chunk), wide(dtype)).unsqueeze(1) * factor)).to(dtype).mT
    out = []
    for field in fields(codes, bits, dtype, -2):
        product = torch.bmm(field.numbers, weights).to(wide(dtype))
        if bits == DENSE:
            product = product * (1 / DENSE_TOP)
        elif dtype == torch.float16:
            product = product * (1 / (field.unit * TOP)) - field.center_offset * lean
            product = product * (1 / _shrink(bits, chunk))
        out.append(force_materialize(product.to(dtype)))
    return out


def _chosen(top: Tensor) -> Tensor:
    """`top` [Z, R] as [Z, R, 1], each row's number chosen from all instead of loaded.

    Then each weight is formed by one thread, where a few would each form it: of 8 bits 1.4 % of a step, with
    tiles that suit it; of fewer bits nothing (docs/lab-notebook.md).
    """
    row = torch.arange(top.shape[1], device=top.device).unsqueeze(-1)
    best = top.narrow(1, 0, 1).unsqueeze(-1)
    for r in range(1, top.shape[1]):
        best = torch.where(row == r, top.narrow(1, r, 1).unsqueeze(-1), best)
    return best


def _shrink(bits: int, chunk: int) -> float:
    """A power of two that keeps a chunk's sum of codes within float16."""
    if bits == DENSE:
        return 1.0
    return 2.0 ** max(0, math.ceil(math.log2((2**bits - 1) * chunk / 60_000)))


def join(parts, top, total, shift, reference, bound, *, bits, chunk, dtype):
    """One partial of all chunks: the fields' sums [N, W, R], and `top` and `total` of the same shape.

    Statistics are broadcast over the bytes of a token, so that all reductions have one shape.
    """
    heads, width = bound.shape[0], parts[0].shape[1]
    wider = lambda x: x.unflatten(0, (-1, heads)).unsqueeze(2).expand(-1, -1, width, -1)  # noqa: E731
    best = wider(top).amax(0)
    weight = torch.exp2(wider(top) - best)
    offset = 0.0 if shift is None else (weight * wider(shift)).sum(0)
    sum_all = (weight * wider(total)).sum(0)
    factor = bound.reshape(-1, 1, 1) * (_shrink(bits, chunk) if dtype == torch.float16 else 1.0)
    out = [
        (part.unflatten(0, (-1, heads)).to(wide(dtype)) * weight).sum(0) * factor + offset for part in parts
    ]
    return out, best / LOG2E + reference.unsqueeze(1), sum_all


def attend_chunks(
    query: Queries, bias, view: TierView, decoder: Decoder | None, *, bits, chunk, softcap, dtype
):
    """All four steps on a flat record. Returns what `join` does, and the scores."""
    options = dict(chunk=chunk, dtype=dtype)
    if view.block_table is not None:
        view = view._replace(**dict(zip(("keys", "values"), view.paged())))
    found = scores(query, bias, view, decoder, bits=bits[0], softcap=softcap, **options)
    codes, scale, zero = view.values
    bound = view.bound.to(wide(dtype))
    top, total, scaled, shift = statistics(found, scale, zero, bits=bits[1])
    parts = sums(found, top, scaled, codes, scale, bound, bits=bits[1], **options)
    return *join(parts, top, total, shift, query.reference, bound, bits=bits[1], **options), found


def _cut(x: Tensor | Pages, chunk: int, axis: int = 1) -> Tensor:
    """[N, S, ...] as chunks: [Z, chunk, ...]. In two steps, for the compiler to see whole chunks.

    Slots may be the other `axis`, 2. Heads are the inner ones of Z, for their number is a constant: a
    program finds its own by dividing by it, and not by a number of chunks that is data, in 64 bits.
    """
    if isinstance(x, Pages):
        return x.chunks(chunk, axis)
    return x.unflatten(axis, (x.shape[axis] // chunk, chunk)).movedim(axis, 0).flatten(0, 1)


def _chunks(x: Tensor, blocks: int) -> Tensor:
    """One [N, ...] for each chunk: [blocks * N, ...]."""
    return x.expand(blocks, *x.shape).flatten(0, 1)


def _spread(x: Tensor, per_mean: int, blocks: int, chunk: int) -> Tensor:
    """[N, M, X], one a mean, for the slots of each chunk: [Z, chunk, X]."""
    if x.shape[1] == 1:
        return _chunks(x, blocks).expand(-1, chunk, -1)
    if chunk % per_mean == 0:
        x = x.unflatten(1, (blocks, chunk // per_mean)).unsqueeze(3).expand(-1, -1, -1, per_mean, -1)
        return x.flatten(2, 3).transpose(0, 1).flatten(0, 1)
    x = x.unsqueeze(2).expand(-1, -1, per_mean, -1).flatten(1, 2).narrow(1, 0, blocks * chunk)
    return _cut(x, chunk)


def tiles(view: TierView) -> list[tuple[int, int]]:
    """`(start, length)` of the tiles that are attended one by one where nothing is fused."""
    length, per = view.capacity, view.per_mean
    tile = max(1, EAGER_TILE // per) * per
    return [(start, min(tile, length - start)) for start in range(0, length, tile)]


def attend(
    query: Queries,
    bias: Tensor,
    view: TierView,
    decoder: Decoder | None,
    bits: tuple[int, int],
    softcap: float | None = None,
) -> Partial:
    """Partial attention of an integer tier, tile by tile; its `acc` is in the rotated domain.

    Args:
        query: float32 or float64, [N, R, D].
        bias: [N, R, M], the products of the query with the means; None where there is a decoder.
        view: the tier, flat.
        decoder: where keys were encoded before RoPE.
        bits: widths of keys and values.
        softcap: c in c * tanh(s / c), or None.

    Returns a `Partial` with N for [B, H].
    """
    whole = empty(query.plain)
    for start, length in tiles(view):
        tile = view.narrow(start, length)
        parts, top, total, _ = attend_chunks(
            query, _near(bias, start, tile), tile, decoder,
            bits=bits, chunk=length, softcap=softcap, dtype=query.plain.dtype,
        )  # fmt: skip
        acc = torch.cat(channels(parts, bits[1]), dim=1).mT
        whole = combine(whole, Partial(acc, top[:, 0], total[:, 0]))
    return whole


def probabilities(found: Tensor, level: Tensor) -> Tensor:
    """Attention probabilities [N, S] summed over rows, from scores [Z, R', chunk] of R' >= R rows.

    `level` [N, R] is what lies between a row's reference and its log-sum-exp, in powers of two.
    """
    heads, rows = level.shape
    blocks = found.shape[0] // heads
    scores = found.narrow(1, 0, rows).to(level.dtype) + _chunks(level, blocks).unsqueeze(-1)
    return torch.exp2(scores).sum(1).unflatten(0, (blocks, heads)).transpose(0, 1).flatten(1)


def probabilities_by_tile(query: Queries, bias, view: TierView, decoder, level, *, bits, softcap) -> Tensor:
    """The same where scores are not kept: they are formed again."""
    out, options = [], dict(softcap=softcap, dtype=query.plain.dtype)
    for start, length in tiles(view):
        tile = view.narrow(start, length)
        found = scores(query, _near(bias, start, tile), tile, decoder, bits=bits, chunk=length, **options)
        out.append(probabilities(found, level))
    return torch.cat(out, dim=1)


def _near(bias: Tensor | None, start: int, tile: TierView) -> Tensor | None:
    """The part of `bias` that a tile from slot `start` on needs."""
    if bias is None or bias.shape[-1] == 1:
        return bias
    return bias.narrow(-1, start // tile.per_mean, tile.means.shape[1])


def chunk_of(heads: int, length: int, rows: int, bits: int = 4, paged: bool = False) -> int:
    """Tokens a program of the second product sums: measured on an H100 (docs/lab-notebook.md).

    Fewer where values have 8 bits: tensor cores round sums down, and codes of that width are mostly centre.
    Fewer through a block table: programs do not load ahead there, so that there must be more of them.
    """
    total = heads * length
    chunk = 2048 if total >= 1 << 20 else 512 if total >= 1 << 18 else 256 if total >= 1 << 17 else 128
    return min(chunk, 512) if rows > 4 or paged else min(chunk, 1024) if bits == 8 else chunk


def bucket(heads: int, length: int) -> int:
    """Slots that are read of `length` in use, if there are as many: one of few numbers, in whole chunks.

    What is read is rounded up, so that few different launches serve a growing text; slots beyond those
    in use are masked. Long steps read more than they need, short ones capture a graph more often, which
    takes as long as some ten steps: the best one shrinks with the root of `heads`.
    """
    return _rounded(heads, length, _best_step(heads))


def roomy(heads: int, length: int) -> int:
    """Slots to make for `length` in a text that grows: the same, but an eighth more at most, for memory."""
    return _rounded(heads, length, min(_best_step(heads), (1 << max(0, length - 1).bit_length()) // 8))


def whole(heads: int, length: int) -> int:
    """The smallest number of whole chunks that holds `length` slots, in slots."""
    return _rounded(heads, length, 1)


def _best_step(heads: int) -> int:
    return 1 << (13 - (heads - 1).bit_length() // 2)


def _rounded(heads: int, length: int, step: int) -> int:
    step = max(chunk_of(heads, length, 1), step)
    found = -(-length // step) * step
    # Rounded up, it may belong to longer chunks.
    return _rounded(heads, found, step) if found % chunk_of(heads, found, 1) else found


def spare(view: int) -> int:
    """Slots of a buffer on CUDA beyond the longest span: a graph would take a span of all for the capacity.

    In long buffers, so many that rows of value codes begin at multiples of a cache line: 3 % of a step.
    """
    return 128 if view >= LONG else 32


def longest(heads: int, capacity: int) -> int:
    """The longest span of such a buffer."""
    room = max(0, capacity - spare(capacity))
    return room - room % chunk_of(heads, room, 1)
