"""Attention of a step of one token on a CPU, over all tiers of a layer, in loops that Inductor generates.

An eager step converts codes to float32 in memory, field by field and tile by tile. These loops convert them in
registers: each stored byte is read once, and only scores are written. One compiled version serves every batch
size and every number of tokens. It exists for many tokens only, because compiling takes seconds.
"""

import functools

import torch
from torch import Tensor

from ..compile.compiled import use_compiled
from ..compile.loops import Loops, available
from . import packed
from .packed import TierView, force_materialize
from .rotated import center

LEAST = 2048  # slots of a tier from which on a step runs in compiled loops
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
    rows = query.reshape(batch * heads, q_heads // heads, dim).float() * scaling
    by_head = lambda x: x if x.dim() == 2 else x.expand(batch, -1, -1, -1).flatten(0, 1)  # noqa: E731
    matrix = by_head(matrix.narrow(-2, 0, dim))
    stored = [_tier(view, count, batch, heads) for view, count in zip(tiers, slots_read)]
    per_mean = tuple(view.per_mean if view.means.shape[2] > 1 else 0 for view in tiers)
    output, sums = _loops(
        rows, rows @ matrix.mT, keys.flatten(0, 1), values.flatten(0, 1), _rows(seen, batch, heads), stored,
        bits=tuple(bits), per_mean=per_mean,
    )  # fmt: skip
    output = output + sums @ (matrix if value_matrix is None else by_head(value_matrix))
    return output.reshape(batch, 1, q_heads, dim).to(query.dtype)


def _tier(view: TierView, count: int, batch: int, heads: int) -> list[Tensor | None]:
    """The tensors of a tier, rows and heads merged, cut to `count` slots.

    They are cut here: if the compiler saw the whole buffer, a full one would be a case of its own.
    """
    cut = lambda x, axis=1: None if x is None else x.flatten(0, 1).narrow(axis, 0, count)  # noqa: E731
    (codes, *rest), (value_codes, *value_rest), means = view.keys, view.values, view.means.flatten(0, 1)
    if means.shape[1] > 1:
        means = means.narrow(1, 0, -(-count // view.per_mean))
    valid = _rows(view.valid.narrow(2, 0, count), batch, heads)
    return [cut(codes), *map(cut, rest), cut(value_codes, 2), *map(cut, value_rest), means, valid]


def _rows(seen: Tensor, batch: int, heads: int) -> Tensor:
    """A mask [B or B * H, 1, n] for rows and heads: [B * H, n], contiguous."""
    if len(seen) == batch and heads > 1:
        seen = seen.expand(-1, heads, -1)
    return seen.reshape(batch * heads, -1).contiguous()


def _attend(query, rotated, keys, values, seen, tiers, *, bits, per_mean) -> tuple[Tensor, Tensor]:
    """Attention of rows [N, R, D]: the part of the uncompressed tokens, and that of the tiers, still rotated.

    There is one softmax over all tokens, so nothing has to be merged.
    """
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
    share = 1 / total.clamp_min(torch.finfo(torch.float32).tiny)
    values = values.float()
    values = torch.where(values.abs() <= torch.finfo(torch.float32).max, values, 0.0)  # 0 * NaN is NaN
    output = torch.stack([(values * w.unsqueeze(-1)).sum(1) for w in weights[0]], dim=1)
    sums = 0.0
    for own, (*_, codes, scale, zero, _, valid), (_, width) in zip(weights[1:], tiers, bits):
        sums = sums + _sums(own, codes, scale, zero, valid, width)
    return output * share, sums * share


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
        scores.append(force_materialize(torch.where(valid, found, -torch.inf)))
    return scores


def _sums(weights: list[Tensor], codes, scale, zero, valid, width: int) -> Tensor:
    """Weighted sums of the values of a tier, before they are rotated back: [N, R, D]."""
    scale = torch.where(valid, scale.float(), 0.0)  # slots without a token may hold anything
    zero = None if zero is None else torch.where(valid, zero.float(), 0.0) + center(width) * scale
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


def _lengths(query, rotated, keys, values, seen, tiers):
    """Dimensions that differ between calls: rows, and tokens of each kind."""
    yield from ((x, 0) for x in (query, rotated))
    yield from ((x, dim) for x in (keys, values, seen) for dim in (0, 1))
    for codes, scale, zero, value_codes, value_scale, value_zero, means, valid in tiers:
        numbers = (x for x in (scale, zero, value_scale, value_zero) if x is not None)
        yield from ((x, dim) for x in (codes, *numbers, valid) for dim in (0, 1))
        yield from ((value_codes, dim) for dim in (0, 2))
        yield from ((means, dim) for dim in ((0, 1) if means.shape[1] > 1 else (0,)))


_loops = Loops(_attend, _lengths)
