"""Attention of a step of one token on a CPU, over all tiers of a layer, in loops that Inductor generates.

An eager step converts codes to float32 in memory, field by field and tile by tile. These loops convert them
in registers: each stored byte is read once, and only scores are written. One compiled version serves every
batch size and every number of tokens. Steps over few tokens are eager, because compiling takes seconds.
"""

import functools
import math

import torch
from torch import Tensor

from ..compile.compiled import use_compiled
from ..compile.loops import Loops, available
from . import packed
from .packed import TierView, force_materialize
from .rotated import center

LEAST = 2048  # slots of a tier from which on a step runs in compiled loops
ONE_THREAD = 1 << 16  # slots of all rows and heads up to which one thread works: threads wait for each other
MOST_ROWS = 8  # query rows of a KV head: each has sums of its own in every loop


def takes(
    query: Tensor,
    keys: Tensor,
    tiers: list[TierView],
    bits: list[tuple[int, int]],
    slots_read: list[int],
) -> bool:
    """Whether `attend` serves such a step, for arguments as in `decode.attend`."""
    group, new = query.shape[1] // keys.shape[1], query.shape[2]
    if query.device.type != "cpu" or use_compiled(query) or new != 1 or group > MOST_ROWS:
        return False
    if max(slots_read, default=0) < LEAST or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    if any(width in (3, packed.DENSE) for pair in bits for width in pair):
        return False
    if any(x.read_at is not None or x.block_table is not None or x.key_index is not None for x in tiers):
        return False
    if any(x.beams > 1 or x.first is not None for x in tiers):
        return False
    return available()


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    matrix: Tensor,
    value_matrix: Tensor | None,
    tiers: list[TierView],
    *,
    bits: list[tuple[int, int]],
    slots_read: list[int],
    scaling: float,
) -> Tensor:
    """The same as `decode.attend`, for arguments that it takes (`takes`): [B, 1, Hq, D]."""
    (batch, q_heads, _, dim), heads = query.shape, keys.shape[1]
    rows = query.reshape(batch * heads, q_heads // heads, dim)
    tables = [matrix, matrix[..., :dim, :] if value_matrix is None else value_matrix]
    by_head = [x.dim() == 3 for x in tables]  # whether each KV head has a matrix of its own
    tables = [x.expand(batch, -1, -1, -1).flatten(0, 1) if own else x for x, own in zip(tables, by_head)]
    alone = batch * heads * sum(slots_read) < ONE_THREAD
    output = _loops(
        1 if alone else torch.get_num_threads(),
        (rows, keys.flatten(0, 1), values.flatten(0, 1), _rows(seen, batch, heads), *tables),
        [_tier(view, count, batch, heads) for view, count in zip(tiers, slots_read)],
        scaling=scaling, bits=tuple(bits), per_mean=tuple(map(_per_mean, tiers)),
        # What the compiled version depends on beside these: it sees no other values. Dtypes as text, because
        # a file of a compiled function cannot hold a dtype that the function does not use.
        kind=(
            rows.shape[1:], *(str(x.dtype) for x in (query, keys, matrix)), *by_head, *(x.full for x in tiers)
        ),
    )  # fmt: skip
    return output.reshape(batch, 1, q_heads, dim)


def _per_mean(view: TierView) -> int:
    """Slots of a mean; 0 where one mean is for all."""
    return view.per_mean if view.means.shape[2] > 1 else 0


def _tier(view: TierView, count: int, batch: int, heads: int) -> list[Tensor | None]:
    """The tensors of a tier, rows and heads merged, cut to `count` slots; no mask where all slots are valid.

    They are cut here: if the compiler saw the whole buffer, a full one would be a case of its own.
    """
    rows = batch * heads

    def cut(x: Tensor | None) -> Tensor | None:  # one operation instead of two
        if x is None:
            return None
        if not x.is_contiguous():
            return x.flatten(0, 1).narrow(1, 0, count)
        slots, *width = x.shape[2:]
        each = math.prod(width)
        strides = (slots * each, each, 1)[: 2 + len(width)]
        return x.as_strided((rows, count, *width), strides, x.storage_offset())

    (codes, *rest), (value_codes, *value_rest), means = view.keys, view.values, view.means.flatten(0, 1)
    if means.shape[1] > 1:
        means = means.narrow(1, 0, -(-count // view.per_mean))
    valid = None if view.full else _rows(view.valid.narrow(2, 0, count), batch, heads)
    value_codes = value_codes.flatten(0, 1).narrow(2, 0, count)
    return [cut(codes), *map(cut, rest), value_codes, *map(cut, value_rest), means, valid]


def _rows(seen: Tensor, batch: int, heads: int) -> Tensor:
    """A mask [B or B * H, 1, n] for rows and heads: [B * H, n], contiguous."""
    if len(seen) == batch and heads > 1:
        seen = seen.expand(-1, heads, -1)
    return seen.reshape(batch * heads, -1).contiguous()


def _attend(dense, tiers, *, scaling, bits, per_mean, kind) -> Tensor:
    """Attention of rows [N, R, D]. There is one softmax over all tokens, so nothing has to be merged."""
    query, keys, values, seen, *matrices = dense
    dtype, query = query.dtype, query.float() * scaling
    matrix, value_matrix = (x.float() for x in matrices)
    matrix = matrix.narrow(-2, 0, query.shape[-1])
    rotated = force_materialize(_product(query, matrix))
    scores = [[torch.where(seen, x, -torch.inf) for x in _products(keys, query)]]
    for (codes, scale, zero, *_, means, valid), (width, _), per in zip(tiers, bits, per_mean):
        bias = [force_materialize(x) for x in _products(means, query)]
        if per:
            spread = (x.unsqueeze(-1).expand(-1, -1, per).flatten(1) for x in bias)
            bias = [x.narrow(1, 0, codes.shape[1]) for x in spread]
        scores.append(_scores(rotated, codes, scale, zero, bias, valid, width))
    tops = [[x.amax(-1, keepdim=True) for x in each] for each in scores]
    lowest = torch.finfo(torch.float32).min
    top = [functools.reduce(torch.maximum, each).clamp_min(lowest) for each in zip(*tops)]
    weights = [[torch.exp(x - t) for x, t in zip(each, top)] for each in scores]
    total = torch.stack([sum(w.sum(-1, keepdim=True) for w in each) for each in zip(*weights)], dim=1)
    values = values.float()
    values = torch.where(values.abs() <= torch.finfo(torch.float32).max, values, 0.0)  # 0 * NaN is NaN
    output = torch.stack([(values * w.unsqueeze(-1)).sum(1) for w in weights[0]], dim=1)
    sums = 0.0
    for own, (*_, codes, scale, zero, _, valid), (_, width) in zip(weights[1:], tiers, bits):
        sums = sums + _sums(own, codes, scale, zero, valid, width)
    output = output + _product(force_materialize(sums), value_matrix.mT)
    return (output / total.clamp_min(torch.finfo(torch.float32).tiny)).to(dtype)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """The product of rows [N, R, D] with the rows of a matrix [D, D], or with those of a matrix for each N.

    It is a loop like all others: a call of a library would take longer than this small product.
    """
    return (rows.unsqueeze(2) * matrix.unsqueeze(-3)).sum(-1)


def _products(vectors: Tensor, query: Tensor) -> list[Tensor]:
    """Products of vectors [N, n, D] with each query row: [N, n] each."""
    return [(vectors.float() * query[:, r : r + 1]).sum(-1) for r in range(query.shape[1])]


def _scores(rotated, codes, scale, zero, bias, valid, width: int) -> list[Tensor]:
    """Scores of a tier, [N, S] for each query row."""
    parts = zip(_fields(codes, width), rotated.split(codes.shape[-1], dim=-1))
    parts = [(x, q * unit) for (x, unit), q in parts]
    scale = scale.float()
    zero = 0.0 if zero is None else zero.float() + center(width) * scale
    total = rotated.sum(-1, keepdim=True)
    scores = []
    for r, mean in enumerate(bias):
        dot = sum(x * q[:, r : r + 1] for x, q in parts).sum(-1)
        found = dot * scale + zero * total[:, r] + mean
        scores.append(force_materialize(found if valid is None else torch.where(valid, found, -torch.inf)))
    return scores


def _sums(weights: list[Tensor], codes, scale, zero, valid, width: int) -> Tensor:
    """Weighted sums of the values of a tier, before they are rotated back: [N, R, D]."""
    known = lambda x: x.float() if valid is None else torch.where(valid, x.float(), 0.0)  # noqa: E731
    scale = known(scale)  # slots without a token may hold anything
    zero = None if zero is None else known(zero) + center(width) * scale
    fields, out = _fields(codes, width), []
    for own in weights:
        shift = 0.0 if zero is None else (own * zero).sum(-1, keepdim=True)
        scaled = force_materialize(own * scale).unsqueeze(1)
        out.append(torch.cat([(x * scaled).sum(-1) * unit for x, unit in fields], dim=-1) + shift)
    return torch.stack(out, dim=1)


def _fields(codes: Tensor, width: int) -> list[tuple[Tensor, float]]:
    """The centered codes of each field of the bytes, as float32, and the unit of these numbers.

    No bit moves: a field is masked in place, and the unit is a power of two.
    """
    if width == 8:
        return [(codes.float() - center(8), 1.0)]
    fields = []
    for shift, bits in packed.FIELDS[width]:
        mask = (2**bits - 1) << shift
        fields.append(((codes & mask).float() - mask / 2, 2.0**-shift))
    return fields


def _lengths(dense, tiers):
    """Dimensions that differ between calls: rows, and tokens of each kind."""
    query, keys, values, seen, *matrices = dense
    yield from ((x, 0) for x in (query, *matrices) if x.dim() == 3)
    yield from ((x, dim) for x in (keys, values, seen) for dim in (0, 1))
    for codes, scale, zero, value_codes, value_scale, value_zero, means, valid in tiers:
        each = (codes, scale, zero, value_scale, value_zero, valid)
        yield from ((x, dim) for x in each for dim in (0, 1) if x is not None)
        yield from ((value_codes, dim) for dim in (0, 2))
        yield from ((means, dim) for dim in ((0, 1) if means.shape[1] > 1 else (0,)))


_loops = Loops(_attend, _lengths)
