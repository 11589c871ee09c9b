"""Attention on codes. Computes the partial attention of an integer tier without decoding its tokens.

There are four steps: the scores of chunks of tokens, their statistics, the weighted sums of value codes,
and the merge of the chunks. When compiled (`step.py`), each step is one kernel. Every stored byte is read
once:

- A field of a byte is masked in place and read as the bits of a float16. Its value is then exactly
  code * 2^(shift - 24), so the kernel needs no shift and no conversion. The query and the sums absorb
  the powers of two. They also absorb the powers of two for code bits that are spread over three bytes.
- The codes are the long side of both products, and the few queries are the short side. The tensor cores
  therefore multiply almost no padding.
- The first product's epilogue applies scales, zero points, means, softcap and validity to the scores.
  The second product's prologue applies the exponential and the value scale to the weights.

In float32 and float64 the same code converts the fields to numbers, and keeps nothing in float16.

Shapes: N = batch times KV heads. R = query rows per KV head (group size times query length). S = slots.
Z = N * S / chunk = chunks. W = bytes of codes per token. D = head_dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.page_gather import pages_of
from . import halves
from .merge import Partial, combine, empty
from .rope import as_sum, cos_sin, swap
from .rotated import Packed, center, dequantize, thirds

LOG2E = math.log2(math.e)
TOP = 2.0**14  # float16 weights are multiplied by this, so that small weights stay normal numbers
DENSE_TOP = 16.0  # the same factor for 16-bit values: the sum of a chunk must stay within float16
LIMIT = 60_000.0  # upper limit of float16 scores, in powers of two from the reference
LONG = 1 << 14  # slots of a long buffer, where extra slots for alignment cost little memory
EAGER_TILE = 2048  # slots per tile in eager mode: the codes of one tile are converted at a time
FEW_ROWS = 16  # up to so many query rows, a tile has twice as many slots: a step is mostly calls of PyTorch


class TierView(NamedTuple):
    """The tensors of a tier that the kernels read.

    Attributes:
        keys: codes [B, H, S, W] uint8. Scale and zero point (or None) are [B, H, S] float16.
        values: codes [B, H, W, S] uint8, with tokens as the last dimension. Scale and zero point have the
            same shapes as those of the keys.
        bound: [B, H]. At least as large as every valid value scale.
        means: [B, H, M, D] float16. The means of the keys: one mean per `per_mean` slots, or one mean for
            all slots.
        valid: bool [B, 1 or R, S]. False where a slot holds no token that the row sees. [B * H, 1 or R, S] if
            heads hold different tokens.
        read_at: int32 [B, 1, S]. The positions at which RoPE rotates the keys, if the tier stores keys from
            before RoPE. None if the tier stores keys after RoPE.
        block_table: int32 or int64 [B, n]. The pages of each row of the batch. All KV heads of a row share
            them. None if the slots of a row are contiguous.
        key_index: [B, H, S, W / 2] uint8, the upper bits of 4-bit key codes, if the tier stores them apart;
            the codes of `keys` are then the lower bits. `whole` joins both. None if the codes are whole.
        full: whether every slot that the step reads is valid for every row. Kernels may then ignore `valid`.
        beams: rows of the batch that share one row of this tier; they follow one another. If there are
            several, B is the number of texts, and the batch of the queries is B * beams. Each slot is read
            once for all beams.
        first: the first slot that the step reads, a multiple of `per_mean`. None: slot 0. The place then
            does not change from step to step.

    With a block table, codes, scales and zero points are stored in P pages. Key codes are [P, H, page, W],
    value codes are [P, H, W, page], scales and zero points are [P, H, page]. Slot i of row b is slot
    i % page of page `block_table[b, i // page]`. The other attributes do not change: `bound` and `means`
    belong to the rows, `valid` and `read_at` belong to the slots of the rows. If no slot of a block is
    valid, its table entry may be any number, because the kernels clamp entries to the existing pages. The
    page that they then read may contain NaN.

    All strides are allowed. For example, the bytes of a token may be contiguous in value codes too.

    `flat` merges batch and heads into one dimension N. It does not change `valid`, `read_at` and pages.
    """

    keys: Packed
    values: Packed
    bound: Tensor
    means: Tensor
    valid: Tensor
    per_mean: int
    read_at: Tensor | None = None
    block_table: Tensor | None = None
    key_index: Tensor | None = None
    full: bool = False
    beams: int = 1
    first: int | None = None

    @property
    def capacity(self) -> int:
        """Number of slots in each row."""
        return self.valid.shape[-1]

    @property
    def page_size(self) -> int:
        """Number of slots in a page."""
        return self.keys.codes.shape[2]

    def flat(self) -> "TierView":
        view = self._replace(bound=self.bound.flatten(0, 1), means=self.means.flatten(0, 1))
        if self.block_table is not None:
            return view
        keys, values = (
            Packed(*(None if x is None else x.flatten(0, 1) for x in side))
            for side in (self.keys, self.values)
        )
        index = None if self.key_index is None else self.key_index.flatten(0, 1)
        return view._replace(keys=keys, values=values, key_index=index)

    def whole(self) -> "TierView":
        """Return the same view as a tier that stores whole key codes has it, layout included.

        Products of equal layouts add up in one order, so results are equal to the bit.
        """
        if self.key_index is None:
            return self
        codes = halves.join(self.key_index, self.keys.codes)
        values = self.values._replace(codes=self.values.codes.contiguous())
        return self._replace(keys=self.keys._replace(codes=codes), values=values, key_index=None)

    def beginning(self, length: int) -> "TierView":
        """Return the first `length` slots, with whole key codes. The view is not flat and has no table."""
        cut = lambda x, axis=-1: None if x is None else x.narrow(axis, 0, length)  # noqa: E731
        keys, index = self.keys, cut(self.key_index, 2)
        keys = Packed(cut(keys.codes, 2), cut(keys.scale), cut(keys.zero))
        values, valid, read_at = Packed(*map(cut, self.values)), cut(self.valid), cut(self.read_at)
        view = self._replace(keys=keys, values=values, valid=valid, read_at=read_at, key_index=index)
        return view.whole()

    def text(self, index: int) -> "TierView":
        """Return the row of one text. The view is not flat, has no table and whole key codes."""
        row = lambda x: None if x is None else x.narrow(0, index, 1)  # noqa: E731
        keys, values = Packed(*map(row, self.keys)), Packed(*map(row, self.values))
        rest = dict(bound=row(self.bound), means=row(self.means), valid=row(self.valid))
        return self._replace(keys=keys, values=values, read_at=row(self.read_at), **rest)

    def leading(self, length: int) -> "TierView":
        """Return the first `length` slots of a flat view. Pages are not gathered."""
        return self._cut(0, length) if self.block_table is not None else self.narrow(0, length)

    def narrow(self, start: int, length: int) -> "TierView":
        """Return slots `start` to `start + length` of a flat view. `start` must be a multiple of `per_mean`.

        The result has no block table, because this method gathers the pages.
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
            key_index=None if self.key_index is None else self.key_index.narrow(1, start, length),
        )

    def _cut(self, start: int, length: int) -> "TierView":
        """Cut the tensors that are not stored in pages to these slots."""
        first, means = start // self.per_mean, -(-length // self.per_mean)
        if self.means.shape[1] == 1:
            first, means = 0, 1
        cut = lambda x: None if x is None else x.narrow(-1, start, length)  # noqa: E731
        return self._replace(
            means=self.means.narrow(1, first, means), valid=cut(self.valid), read_at=cut(self.read_at)
        )

    def paged(self) -> tuple[Packed, Packed]:
        """Return keys and values as `Pages`. The view must have a block table."""
        make = lambda x: None if x is None else Pages(x, self.block_table, self.capacity)  # noqa: E731
        return Packed(*map(make, self.keys)), Packed(*map(make, self.values))


class Pages(NamedTuple):
    """One tensor of a tier with a block table.

    It represents a tensor [N, S, ...], or [N, W, S] for value codes.

    Attributes:
        pages: [P, H, page, ...]. Value codes are [P, H, W, page].
        table: [B, n].
        length: S.
    """

    pages: Tensor
    table: Tensor
    length: int

    def slots(self, start: int, length: int, axis: int = 1) -> Tensor:
        """Return slots `start` to `start + length` along `axis`. The axis is 1, or 2 for value codes."""
        page = self.pages.shape[axis + 1]
        first, last = start // page, -(-(start + length) // page)
        found = self._of(self.table.narrow(1, first, last - first))  # [B, n, H, ...]
        found = found.movedim(1, axis + 1).flatten(axis + 1, axis + 2).flatten(0, 1)
        return found.narrow(axis, start - first * page, length)

    def chunks(self, chunk: int, axis: int = 1) -> Tensor:
        """Return the same chunks as `_cut`.

        This method cuts the table and not the gathered tensor. The compiler then divides by constants only.
        """
        page, blocks = self.pages.shape[axis + 1], self.length // chunk
        if chunk % page:
            return _cut(self.slots(0, blocks * chunk, axis), chunk, axis)
        table = self.table.narrow(1, 0, blocks * (chunk // page)).unflatten(1, (blocks, chunk // page))
        found = self._of(table.transpose(0, 1))  # [blocks, B, chunk / page, H, ...]
        return found.movedim(2, axis + 2).flatten(axis + 2, axis + 3).flatten(0, 2)

    def _of(self, table: Tensor) -> Tensor:
        return pages_of(self.pages, table.clamp(0, self.pages.shape[0] - 1))


class Queries(NamedTuple):
    """The queries of a step, in the forms that a tier needs. They are computed once for all tiers.

    Attributes:
        plain: [N, R, D], the scaled queries.
        rotated: [N, R, D], `plain` rotated by the codec.
        total: [N, R], the sum of `rotated` over D.
        reference: [N, R], a score near the largest score of the row. The code keeps the distance from the
            reference in float16, so that the largest weights are exact. Any reference gives a correct result.
    """

    plain: Tensor
    rotated: Tensor
    total: Tensor
    reference: Tensor


class Decoder(NamedTuple):
    """Decodes keys that were stored before RoPE.

    Attributes:
        matrix: P [D, D], the rotation of the codec, or the matrix of each row, [N, D, D].
        inv_freq: [d / 2], the frequencies of RoPE.
        interleaved: the style of the RoPE pairs.
    """

    matrix: Tensor
    inv_freq: Tensor
    interleaved: bool


class Field(NamedTuple):
    """One field of the bytes of the codes, as a matrix.

    `numbers` contain unit * (code - center). In float16 they contain unit * code, and the caller must still
    subtract `center_offset`, which is the center.
    """

    numbers: Tensor
    unit: float
    center_offset: float


DENSE = 16  # bits of values that are stored in the model's dtype: they are not rotated and not quantized
#: The fields of a byte as (shift, width), by bits per code. `rotated.thirds` explains the one-bit fields.
FIELDS = {
    8: [(0, 8)],
    4: [(0, 4), (4, 4)],
    3: [(0, 3), (3, 3), (6, 1), (7, 1)],
    2: [(0, 2), (2, 2), (4, 2), (6, 2)],
}


def fields(codes: Tensor, bits: int, dtype: torch.dtype, axis: int) -> list[Field]:
    """Convert codes to matrices of `dtype`. The bytes of a token lie along `axis`.

    There are always at least two matrices. If a byte has one field, the matrix is split into halves. The
    reason is the compiler: it keeps a single product in float16 and ends the kernel there. It keeps a sum of
    products in float32 and fuses the next operations into the kernel.
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
    """Return the number of rows in the matrices that `fields` makes from the bytes of a token."""
    return dim * min(bits, 4) // 8


def operands(x: Tensor, bits: int) -> list[Tensor]:
    """Split channels [..., D] into the operands that the fields are multiplied with.

    If a byte holds one bit of a code, its channel appears three times, multiplied by the weights of the bits.
    """
    if bits != 3:
        return list(x.split(field_width(bits, x.shape[-1]), dim=-1))
    first, second, *cut = x.split(thirds(x.shape[-1]), dim=-1)
    worth = (1 << torch.arange(3, device=x.device)).to(x.dtype).unsqueeze(-1)
    return [first, second, *((c.unsqueeze(-2) * worth).flatten(-2) for c in cut)]


def channels(parts: list[Tensor], bits: int) -> list[Tensor]:
    """Convert the sums of the fields, [N, W, R] each, to sums of the channels: D rows in total, in order."""
    if bits != 3:
        return parts
    first, second, *cut = parts
    low, middle, high = zip(*(x.chunk(3, 1) for x in cut))
    return [first, second, *(a + 2 * b + 4 * c for a, b, c in zip(low, middle, high))]


def offset(bits: int, dtype: torch.dtype) -> float:
    """Return the center that must still be subtracted from every code. See `Field`."""
    return center(bits) if dtype == torch.float16 else 0.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 for float16 products, otherwise `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `x` to `dtype` and replace NaN and infinity by 0. Slots without a token may contain them."""
    x = x.to(dtype)
    return torch.where(x.abs() <= 65504.0, x, 0.0)


def force_materialize(x: Tensor) -> Tensor:
    """Return `x`, and force the compiled kernel to end here and write `x` to memory.

    The compiler needs `x` in memory for a view by strides. Without this view, each consumer may compute `x`
    again.
    """
    return x.as_strided(x.shape, x.stride())


def products(query: Queries, bias: Tensor, view: TierView, *, bits, chunk, dtype) -> Tensor:
    """Compute scores [Z, chunk, R] from codes. `bias` [N, R, M] is the contribution of the key means."""
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
        if not center_offset:  # the zero point belongs to stored codes, but these codes are centered
            zero = zero + center(bits) * scale
        out = out * (scale / largest) + zero * total
    return out + _spread(bias.mT, view.per_mean, blocks, chunk)


def decoded_products(query: Queries, decoder: Decoder, view: TierView, *, bits, chunk, dtype) -> Tensor:
    """Compute scores [Z, chunk, R] of keys that are first decoded and rotated to their read positions."""
    heads, batch = query.total.shape[0], view.read_at.shape[0]
    blocks = view.capacity // chunk
    position = _cut(view.read_at.squeeze(1), chunk)
    codes = Packed(*(None if x is None else _cut(x, chunk) for x in view.keys))
    rotated = dequantize(codes, bits, wide(dtype)).to(dtype)
    # Computed once for all heads. Otherwise each head would compute the sines again.
    angles = [force_materialize(x) for x in cos_sin(position, decoder.inv_freq, wide(dtype))]
    factors = as_sum(*angles, rotated.shape[-1], decoder.interleaved)
    width, keys = 2 * angles[0].shape[-1], 0.0
    # RoPE has two terms. With two products, the kernel that decodes can also apply RoPE at its end.
    for factor, swapped in zip(factors, (False, True)):
        to = (lambda x: swap(x, width, decoder.interleaved)) if swapped else lambda x: x
        matrix = to(decoder.matrix).to(dtype)
        matrix = matrix.expand(heads, -1, -1) if matrix.dim() == 2 else matrix
        part = torch.bmm(rotated, _chunks(matrix, blocks))
        mean = _spread(to(view.means).to(wide(dtype)), view.per_mean, blocks, chunk)
        factor = factor.unsqueeze(1).expand(-1, heads // batch, -1, -1).flatten(0, 1)
        keys = keys + (part.to(wide(dtype)) + mean) * factor
    keys = force_materialize(keys.to(dtype))  # otherwise the product computes sines for every tile it loads
    halves = zip(keys.chunk(2, -1), query.plain.to(dtype).chunk(2, -1))  # see `fields`
    return sum(torch.bmm(k, _chunks(q, blocks).mT).to(wide(dtype)) for k, q in halves)


def scores(
    query: Queries, bias, view: TierView, decoder: Decoder | None, *, bits, chunk, softcap, dtype
) -> Tensor:
    """Compute base-2 scores minus the reference of the row: [Z, R, chunk]. They are -inf without a token."""
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
    if dtype == torch.float16:  # a very low score may become -inf, which gives a weight of 0
        scores = torch.where(scores > LIMIT, LIMIT, scores)
    batch, rows, _ = valid.shape
    seen = valid.reshape(batch, 1, rows, blocks, chunk).expand(-1, heads // batch, -1, -1, -1)
    scores = torch.where(seen.permute(3, 0, 1, 4, 2).reshape(-1, chunk, rows), scores, -torch.inf)
    return force_materialize(scores.to(dtype).mT.clone(memory_format=torch.contiguous_format))


def statistics(scores: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int):
    """Compute the statistics of each chunk.

    Returns four tensors [Z, R]: the row maximum, the sum of weights, the sum of weights times scales, and the
    sum of weights times the value that the center code represents. The last is None if that value is 0. The
    third and the last are None if there is no scale.
    """
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
    """Compute weighted sums of centered value codes, divided by `bound`: [Z, W, R] for each of the `fields`.

    `codes` [N, W, S] are stored with tokens as the last dimension. `bound` [N] is at least as large as every
    valid scale. 16-bit values have no scale; for them, `bound` is at least as large as every valid absolute
    value. After the division by `bound`, no value overflows float16. Slots without a token may contain larger
    numbers or NaN; these become 0.
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
    """Return `top` [Z, R] as [Z, R, 1]. Each row selects its number from all numbers instead of loading it.

    One thread then computes each weight. Otherwise several threads compute the same weight. At 8 bits, with
    suitable tiles, this saves 1.4 % of a step. At fewer bits it saves nothing (docs/lab-notebook.md).
    """
    row = torch.arange(top.shape[1], device=top.device).unsqueeze(-1)
    best = top.narrow(1, 0, 1).unsqueeze(-1)
    for r in range(1, top.shape[1]):
        best = torch.where(row == r, top.narrow(1, r, 1).unsqueeze(-1), best)
    return best


def _shrink(bits: int, chunk: int) -> float:
    """Return a power of two. Divided by it, the sum of the codes of a chunk stays within float16."""
    if bits == DENSE:
        return 1.0
    return 2.0 ** max(0, math.ceil(math.log2((2**bits - 1) * chunk / 60_000)))


def join(parts, top, total, shift, reference, bound, *, bits, chunk, dtype):
    """Merge all chunks into one partial: the sums of the fields [N, W, R], `top` and `total`, all one shape.

    The statistics are broadcast over the bytes of a token, so that all reductions have the same shape.
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
    """Run all four steps on a flat view. Returns the results of `join`, and the scores."""
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
    """Cut [N, S, ...] into chunks [Z, chunk, ...]. It uses two steps, so that the compiler sees whole chunks.

    The slots may also be on `axis` 2. The heads are the inner part of Z, because their number is a constant.
    A program finds its head with a division by this constant. The number of chunks is data, and a division by
    it would use 64 bits.
    """
    if isinstance(x, Pages):
        return x.chunks(chunk, axis)
    return x.unflatten(axis, (x.shape[axis] // chunk, chunk)).movedim(axis, 0).flatten(0, 1)


def _chunks(x: Tensor, blocks: int) -> Tensor:
    """Repeat [N, ...] for each chunk: [blocks * N, ...]."""
    return x.expand(blocks, *x.shape).flatten(0, 1)


def _spread(x: Tensor, per_mean: int, blocks: int, chunk: int) -> Tensor:
    """Spread [N, M, X], which has one row per mean, over the slots of each chunk: [Z, chunk, X]."""
    if x.shape[1] == 1:
        return _chunks(x, blocks).expand(-1, chunk, -1)
    if chunk % per_mean == 0:
        x = x.unflatten(1, (blocks, chunk // per_mean)).unsqueeze(3).expand(-1, -1, -1, per_mean, -1)
        return x.flatten(2, 3).transpose(0, 1).flatten(0, 1)
    x = x.unsqueeze(2).expand(-1, -1, per_mean, -1).flatten(1, 2).narrow(1, 0, blocks * chunk)
    return _cut(x, chunk)


def tiles(view: TierView, rows: int | None = None) -> list[tuple[int, int]]:
    """Return `(start, length)` of each tile. Eager attention processes the tiles one by one.

    `rows` is the number of query rows; None: many.
    """
    length, per = view.capacity, view.per_mean
    few = rows is not None and rows <= FEW_ROWS
    tile = max(1, EAGER_TILE * (2 if few else 1) // per) * per
    return [(start, min(tile, length - start)) for start in range(0, length, tile)]


def attend(
    query: Queries,
    bias: Tensor,
    view: TierView,
    decoder: Decoder | None,
    bits: tuple[int, int],
    softcap: float | None = None,
) -> Partial:
    """Compute the partial attention of an integer tier, tile by tile. Its `acc` is in the rotated domain.

    Args:
        query: float32 or float64, [N, R, D].
        bias: [N, R, M], the products of the query with the means. None if there is a decoder.
        view: the flat view of the tier.
        decoder: decodes keys that were stored before RoPE. None for keys that were stored after RoPE.
        bits: bits per code of keys and values.
        softcap: c in c * tanh(s / c), or None.

    Returns a `Partial` with N in place of [B, H].
    """
    whole = empty(query.plain)
    for start, length in tiles(view, query.plain.shape[1]):
        tile = view.narrow(start, length).whole()
        parts, top, total, _ = attend_chunks(
            query, _near(bias, start, tile), tile, decoder,
            bits=bits, chunk=length, softcap=softcap, dtype=query.plain.dtype,
        )  # fmt: skip
        acc = torch.cat(channels(parts, bits[1]), dim=1).mT
        whole = combine(whole, Partial(acc, top[:, 0], total[:, 0]))
    return whole


def attend_texts(
    query: Queries,
    bias: Tensor | None,
    view: TierView,
    decoder: Decoder | None,
    bits: tuple[int, int],
    softcap: float | None = None,
) -> Partial:
    """Compute the same as `attend` for a view that is not flat, text by text.

    The rows of texts lie apart in memory where beams share them, so a flat view would be a copy.
    """
    texts = view.valid.shape[0]
    each = lambda x: [None] * texts if x is None else x.chunk(texts)  # noqa: E731
    matrices = [None] * texts
    if decoder is not None:
        by_row = decoder.matrix.dim() == 3
        matrices = each(decoder.matrix) if by_row else [decoder.matrix] * texts
    parts = []
    for i, (asked, near, matrix) in enumerate(zip(zip(*map(each, query)), each(bias), matrices)):
        own = None if decoder is None else decoder._replace(matrix=matrix)
        parts.append(attend(Queries(*asked), near, view.text(i).flat(), own, bits, softcap))
    return Partial(*map(torch.cat, zip(*parts)))


def probabilities(found: Tensor, level: Tensor) -> Tensor:
    """Compute attention probabilities [N, S], summed over rows, from scores [Z, R', chunk] with R' >= R rows.

    `level` [N, R] is the reference of a row minus its log-sum-exp, in powers of two.
    """
    heads, rows = level.shape
    blocks = found.shape[0] // heads
    scores = found.narrow(1, 0, rows).to(level.dtype) + _chunks(level, blocks).unsqueeze(-1)
    return torch.exp2(scores).sum(1).unflatten(0, (blocks, heads)).transpose(0, 1).flatten(1)


def probabilities_by_tile(query: Queries, bias, view: TierView, decoder, level, *, bits, softcap) -> Tensor:
    """Compute the same as `probabilities` where the scores are not kept. The scores are computed again."""
    out, options = [], dict(softcap=softcap, dtype=query.plain.dtype)
    for start, length in tiles(view, query.plain.shape[1]):
        tile = view.narrow(start, length)
        found = scores(query, _near(bias, start, tile), tile, decoder, bits=bits, chunk=length, **options)
        out.append(probabilities(found, level))
    return torch.cat(out, dim=1)


def _near(bias: Tensor | None, start: int, tile: TierView) -> Tensor | None:
    """Return the part of `bias` for a tile that begins at slot `start`."""
    if bias is None or bias.shape[-1] == 1:
        return bias
    return bias.narrow(-1, start // tile.per_mean, tile.means.shape[1])


def chunk_of(heads: int, length: int, rows: int, bits: int = 4, paged: bool = False) -> int:
    """Return how many tokens one program of the second product sums.

    The numbers were measured on an H100 (docs/lab-notebook.md). 8-bit values use shorter chunks, because
    tensor cores round sums down, and the center is the largest part of 8-bit codes. A block table also uses
    shorter chunks. Programs do not prefetch there, so there must be more programs.
    """
    total = heads * length
    chunk = 2048 if total >= 1 << 20 else 512 if total >= 1 << 18 else 256 if total >= 1 << 17 else 128
    return min(chunk, 512) if rows > 4 or paged else min(chunk, 1024) if bits == 8 else chunk


def bucket(heads: int, length: int, paged: bool = False) -> int:
    """Return how many slots a step reads when `length` slots are in use, if the buffer has that many.

    `paged`: a block table says where they are, so chunks are shorter (`chunk_of`).

    The result is a whole number of chunks. It is rounded up, so that a growing text needs few different
    launches. Slots after those in use are masked. With a large rounding step, kernels read more slots than
    they need. With a small rounding step, a graph is captured more often, and a capture takes as long as
    about ten decode steps. The best rounding step shrinks with the square root of `heads`.
    """
    return _rounded(heads, length, _best_step(heads), paged)


def roomy(heads: int, length: int) -> int:
    """Return how many slots to allocate for `length` tokens of a growing text.

    At most about an eighth more than `length`, to save memory. There are eight such numbers in each octave,
    because kernels are compiled for a number of slots.
    """
    return _rounded(heads, length, (1 << max(0, length - 1).bit_length()) // 16)


def whole(heads: int, length: int) -> int:
    """Return the smallest number of slots that is at least `length` and a whole number of chunks."""
    return _rounded(heads, length, 1)


def coarsest(heads: int) -> int:
    """Return a number that no rounding step of `bucket` exceeds."""
    return max(2048, _best_step(heads))


def _best_step(heads: int) -> int:
    return 1 << (13 - (heads - 1).bit_length() // 2)


def _rounded(heads: int, length: int, step: int, paged: bool = False) -> int:
    step = max(chunk_of(heads, length, 1, paged=paged), step)
    found = -(-length // step) * step
    # The rounded length may use longer chunks.
    return _rounded(heads, found, step, paged) if found % chunk_of(heads, found, 1, paged=paged) else found


def spare(view: int) -> int:
    """Return how many slots a CUDA buffer has beyond the largest number of slots read.

    If a step could read all slots, the graph would confuse the number of slots read with the capacity. Long
    buffers get enough extra slots to start each row of value codes at a multiple of a cache line. This saves
    3 % of a step.
    """
    return 128 if view >= LONG else 32


def longest(heads: int, capacity: int) -> int:
    """Return the largest number of slots that a step reads from such a buffer."""
    room = max(0, capacity - spare(capacity))
    return room - room % chunk_of(heads, room, 1)
