"""The matched codec: symmetric codes of 8, 4, 3 or 2 bits, with matrices for each KV head.

`fade_ref.matched` derives the matrices and specifies the codes. This module encodes the same way, in float32
and in parallel over tokens. Channels come before tokens here, because channels are rounded one after another.
The tokens of all rows are one axis: [H, D, T]. Products are left to PyTorch. All between two products is one
compiled piece, which serves any number of heads and tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.compiled import CompiledForSizes, use_compiled
from ..compile.replay import Replayed
from ..compile.tiles import channel_tiles, long_element_tiles
from . import rotated
from .rotated import LARGEST, Packed, center, pack

#: Distance between evenly spaced levels of N(0, 1) with the least squared error, by bits.
STEPS = {8: 0.0308, 4: 0.3352, 3: 0.5860, 2: 0.9957}
#: Scales that the encoder tries, relative to that of `STEPS`.
FACTORS = (0.7, 0.78, 0.86, 0.93, 1.0, 1.08, 1.17, 1.27, 1.4)
#: Smallest of these scales that is used, by bits. At 2 bits the best one for plain rounding clips too much.
LEAST = {8: 0.7, 4: 0.7, 3: 0.7, 2: 1.2}
#: Scales with which all channels of a key are rounded, relative to the one found so, by bits.
SEARCHED = {8: (1.0,), 4: (1.0,), 3: (0.88, 0.95, 1.02, 1.09, 1.17), 2: (0.8, 0.88, 0.96, 1.04, 1.14)}
#: The same for values. Attention adds values up, and a small scale clips many of them in one direction.
SEARCHED_FOR_VALUES = SEARCHED | {2: (1.0,)}
TWICE = (3, 2)  # bits of codes whose channels are rounded once more
MOST_OF_BOTH = 1 << 21  # elements of keys that are encoded with their values: half of a replayed tile
MOST_SEARCHED = 1 << 25  # elements of vectors in all scales that are rounded at a time
TOGETHER = 8  # channels of a compiled block
GROUP = 32  # channels between two products with the errors of all channels before


class Matrices(NamedTuple):
    """Matrices of one side (keys or values) of one layer, fp16, or float32 with the same values.

    Attributes:
        encode: A [H, D, D]. A centered row x is encoded as x A^T.
        decode_and_sum: A^-T, and below it the sum of its rows, [H, D + 1, D]. A row y of scaled codes
            decodes to y A^-T, and a query q meets codes as q A^-1. Only kernels that compute in fp16 read
            the sum.
        feedback: V [H, D, D], lower triangular. |V e|^2 is the damage that an error e of y does, up to a
            factor.
    """

    encode: Tensor
    decode_and_sum: Tensor
    feedback: Tensor

    @property
    def decode(self) -> Tensor:
        """A^-T [H, D, D], a view."""
        return self.decode_and_sum[:, :-1]


def quantize(y: Tensor, feedback: Tensor, bits: int, of_values: bool = False) -> Packed:
    """Codes of vectors that are already centered and multiplied by A: float32 [B, H, n, D].

    `of_values`: whether they are values, see `SEARCHED_FOR_VALUES`.
    """
    return _of_rows(_quantize(_by_head(y).mT.contiguous(), feedback, bits, of_values), len(y))


def quantize_to_nearest(y: Tensor, bits: int) -> Packed:
    """Codes of vectors [..., D] without feedback: each channel gets the code that is nearest to it.

    Of the scales by `FACTORS`, as they are stored, the one with the least squared error wins, the first of
    equal ones. This takes few operations and no product, and is for what feedback would improve little.
    Computed in the dtype of `y`.

    Returns codes uint8 [..., D], which are not packed, and scales fp16 [...].
    """
    limit = center(bits)
    size = y.square().mean(-1, keepdim=True).sqrt() * STEPS[bits]
    best, least = None, None
    for factor in FACTORS:
        scale = (size * factor).clamp_max(LARGEST).half().to(y.dtype)
        codes = _nearest(torch.where(scale > 0, y / scale, 0.0), limit, 2 * limit)
        error = (y - scale * codes).square().sum(-1, keepdim=True)
        better = None if best is None else error < least
        best = scale if best is None else torch.where(better, scale, best)
        least = error if least is None else torch.minimum(error, least)
    codes = _nearest(torch.where(best > 0, y / best, 0.0), limit, 2 * limit) + limit
    return Packed(codes.round().to(torch.uint8), best.squeeze(-1).half(), None)


def _by_head(x: Tensor) -> Tensor:
    """[B, H, n, D] as [H, B * n, D]."""
    return x.transpose(0, 1).flatten(1, 2)


def _of_rows(found: tuple[Tensor, Tensor], batch: int) -> Packed:
    """Codes [H, B * n, bytes] and scales [H, B * n] as those of B rows."""
    return Packed(*(x.unflatten(1, (batch, -1)).transpose(0, 1) for x in found), None)


def _quantize(y: Tensor, feedback: Tensor, bits: int, of_values: bool) -> tuple[Tensor, Tensor]:
    """Packed codes [H, T, D * bits / 8] and scales [H, T] of `y` [H, D, T].

    Of `FACTORS`, the scale with the least squared error of plain rounding wins, unless it is below that of
    `LEAST`. Channels are then rounded with feedback, with each scale of `SEARCHED`. At 3 and 2 bits, those of
    the best scale are rounded once more, given the errors of all others.
    """
    known = STEPS[bits], LEAST[bits], center(bits)
    step, smallest, limit = (torch.full((), x, device=y.device) for x in known)
    unit, tried = _run(_in_units, y, step, smallest, limit)
    feedback = feedback.float()
    diagonal = feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [H, D, 1]
    weight, exposed = feedback / diagonal, feedback @ unit
    factors, lost = (SEARCHED_FOR_VALUES if of_values else SEARCHED)[bits], None
    if len(factors) > 1:
        pieces = max(1, -(-unit.numel() * len(factors) // MOST_SEARCHED))  # 1 for no vectors
        parts = zip(unit.chunk(pieces, -1), exposed.chunk(pieces, -1))
        searched = [_search(*part, weight, diagonal, limit, factors) for part in parts]
        errors, factor = (x[0] if pieces == 1 else torch.cat(x, dim=-1) for x in zip(*searched))
        unit, exposed = (x / factor.unsqueeze(1) for x in (unit, exposed))
        tried = tried * factor
    else:
        errors = torch.empty_like(unit)
        lost = [x[:, 0] for x in _round(unit, errors, weight, exposed, diagonal, limit)]
    if bits in TWICE:
        moment = feedback.mT @ feedback  # an error e of a vector does the damage e^T moment e
        own = moment.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        _round(unit, errors, moment / own, exposed, own, limit, again=True)
        lost = None
    if lost is None:  # rounding did not tell it of these codes
        lost = [(exposed * (feedback @ errors)).sum(1)]
    return _run(_finish, unit, errors, exposed, tried, lost, limit, bits=bits)


def _round(
    unit: Tensor,
    errors: Tensor,
    weight: Tensor,
    exposed: Tensor,
    diagonal: Tensor,
    limit: Tensor,
    again: bool = False,
) -> list[Tensor]:
    """Write the errors of the codes of `unit` [H, D, T] into `errors`, channel after channel.

    Each channel is rounded after the errors of others were added, times `weight` [H, D, D]: those of the
    channels before, or, if it is rounded `again`, those of all others, which `errors` holds.

    Products add the errors of other blocks of `TOGETHER` channels, so that one compiled version of
    `_round_block` serves all blocks: a product for each `GROUP` adds those outside the group, and one for
    each block those before it in the group. So most errors are read once for 32 channels, and not for 8.

    Returns [H, 2, T] for each block: its part of <Vu, Ve> and of |Ve|^2, as `_round_block` computes them.
    They mean nothing if channels are rounded again.
    """
    sums = []
    for start in range(0, unit.shape[1], TOGETHER):
        own, group = slice(start, start + TOGETHER), start // GROUP * GROUP
        if start == group:
            rows, far = slice(start, start + GROUP), weight[:, start : start + GROUP, :start]
            if again:  # within the group, channels after each one have not changed yet
                parts = far, weight[:, rows, rows].triu(1), weight[:, rows, start + GROUP :]
                far = torch.cat(parts, dim=-1)
            of_groups = far @ errors[:, : far.shape[-1]]
        before = of_groups[:, start - group : start - group + TOGETHER]
        within = weight[:, own, group:start] @ errors[:, group:start]  # 0 for the first block of a group
        block = weight[:, own, own, None], exposed[:, own], diagonal[:, own]
        found = _run(_round_block, unit[:, own], before, within, *block, limit)
        errors[:, own] = found[:, :-2]
        sums.append(found[:, -2:])
    return sums


def _search(
    unit: Tensor,
    exposed: Tensor,
    weight: Tensor,
    diagonal: Tensor,
    limit: Tensor,
    factors: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Errors [H, D, T] of the codes of `unit` over the best of `factors`, and that factor [H, T].

    The best one has the smallest angle between Vu and Vc, for centered codes c. With Vc = Vu - Ve, this needs
    no product with the codes. The first of equal ones wins.
    """
    every = lambda x: torch.cat([x / factor for factor in factors], dim=-1)  # noqa: E731
    apart = lambda x: x.unflatten(-1, (len(factors), -1))  # noqa: E731
    units, exposed = every(unit), every(exposed)
    errors = torch.empty_like(units)
    lost, damage = sum(_round(units, errors, weight, exposed, diagonal, limit)).unbind(1)
    whole = exposed.square().sum(1)
    aligned, size = (whole - lost).clamp_min(0), whole * (whole - 2 * lost + damage)
    cosine = torch.where(size > 0, aligned.square() / torch.where(size > 0, size, 1.0), 0.0)
    best = apart(cosine).argmax(1, keepdim=True)  # [H, 1, T]
    known = torch.stack([torch.full_like(unit[:, 0], factor) for factor in factors], dim=1)
    errors = apart(errors).take_along_dim(best.unsqueeze(1), dim=2)
    return errors.squeeze(2), known.take_along_dim(best, dim=1).squeeze(1)


def _in_units(
    dynamic_sizes, y: Tensor, step: Tensor, smallest: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """`y` [H, D, T] divided by the best scale of each vector, and these scales [H, T].

    The first of equally good scales wins. `step`, `smallest` and `limit` are tensors, so that one compiled
    version serves all widths: the distance between levels of N(0, 1), the smallest factor that is used, and
    the largest centered code.
    """
    size = y.square().mean(1, keepdim=True).sqrt() * step
    unit = y / torch.where(size > 0, size, 1.0)
    best, least, last = None, None, 2 * limit
    for factor in FACTORS:
        error = (unit - factor * _nearest(unit / factor, limit, last)).square().sum(1, keepdim=True)
        best = torch.full_like(error, factor) if best is None else torch.where(error < least, factor, best)
        least = error if least is None else torch.minimum(error, least)
    best = torch.maximum(best, smallest)
    return unit / best, (size * best).squeeze(1)


def _round_block(
    dynamic_sizes,
    unit: Tensor,
    before: Tensor,
    within: Tensor,
    weight: Tensor,
    exposed: Tensor,
    diagonal: Tensor,
    limit: Tensor,
) -> Tensor:
    """Errors of the codes of one block, and after its C channels the parts of the block in <Vu, Ve> and in
    |Ve|^2: [H, C + 2, T].

    u are the vectors in units of the distance between levels, and e the errors of their centered codes. The
    damage V e is a by-product of rounding: V_ii times what is left of channel i.

    The arguments: u as `unit`, the weighted errors of earlier groups as `before` and of earlier blocks of the
    group as `within`, and Vu as `exposed`, [H, C, T]; `weight` [H, C, C, 1], that between the channels of the
    block, and `diagonal` of V [H, C, 1]; `limit` as in `_in_units`.
    """
    # For tensors of any size, each operation costs the compiler tens of milliseconds, more if its operands
    # are not contiguous. So there are few, on contiguous channels. The kernel copies nothing.
    compiles, places = torch.compiler.is_compiling(), range(unit.shape[1])
    apart = _apart if compiles else lambda x: x.unbind(1)
    each = apart(weight.flatten(1, 2)) if compiles else ()  # [H, 1], C * C of them
    offset, last = apart(unit + before + within), 2 * limit
    errors, lost, damage = [], torch.zeros_like(offset[0]), torch.zeros_like(offset[0])
    for i, wanted, own, share, by in zip(places, offset, *map(apart, (unit, exposed, diagonal))):
        if compiles:  # one kernel keeps the block in registers
            for j, error in enumerate(errors):
                wanted = wanted + each[i * len(offset) + j] * error
        elif errors:
            wanted = wanted + (weight[:, i : i + 1, :i, 0] @ torch.stack(errors, dim=1)).squeeze(1)
        near = _nearest(wanted, limit, last)
        left = by * (wanted - near)
        lost, damage = lost + share * left, damage + left * left
        errors.append(own - near)
    # One result of more than 8 tensors: Inductor stacks up to 8 in a kernel of their own, which would compute
    # the block again for each of them.
    return torch.stack((*errors, lost, damage), dim=1)


def _apart(x: Tensor) -> tuple[Tensor, ...]:
    """The channels of `x` [H, C, ...], contiguous."""
    return x.transpose(0, 1).contiguous().unbind(0)


def _nearest(unit: Tensor, limit: Tensor | float, last: Tensor | float) -> Tensor:
    """The centered code that is nearest to each element of `unit`; `last` is 2 * limit."""
    code = (unit + limit).round().clamp_min(0)
    return (torch.minimum(code, last) if isinstance(last, Tensor) else code.clamp_max(last)) - limit


def _finish(
    dynamic_sizes,
    unit: Tensor,
    errors: Tensor,
    exposed: Tensor,
    tried: Tensor,
    lost: list[Tensor],
    limit: Tensor,
    *,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Packed codes [H, T, D * bits / 8] and stored scales fp16 [H, T].

    The stored scale makes the vector unbiased in the metric of V, and stays within a factor of 2 of the scale
    that was `tried` [H, T]. The gain <Vu, Vc> / <Vu, Vu> of centered codes c needs no product with the codes,
    because Vc = Vu - Ve. A zero vector has the gain 1.

    Vectors u, `errors` e of their centered codes, and Vu as `exposed`: [H, D, T]. A centered code is u - e up
    to rounding. `lost` are the parts of <Vu, Ve>, from `_round_block`.
    """
    whole = exposed.square().sum(1)
    gain = torch.where(whole > 0, 1 - sum(lost) / torch.where(whole > 0, whole, 1.0), 1.0)
    scale = torch.where(gain > 0, tried / gain.clamp(0.5, 2.0), tried)
    codes = (unit - errors + limit).round().to(torch.uint8)
    return pack(codes.mT, bits).contiguous(), scale.clamp_max(LARGEST).half()


def encode(
    x: Tensor, mean: Tensor | None, matrix: Tensor, feedback: Tensor, bits: int, of_values: bool = False
) -> Packed:
    """Center, multiply by A and quantize.

    Args:
        x: [B, H, n, D] of any floating dtype; computed in float32.
        mean: [B, H, m, D], each the mean of n / m vectors, or None for values.
        matrix, feedback: A and V [H, D, D].
        bits: 8, 4, 3 or 2.
        of_values: as in `quantize`.
    """
    turned = matrix.float() @ _by_head(_centered(x, mean)).mT
    return _of_rows(_quantize(turned, feedback, bits, of_values), len(x))


def _centered(x: Tensor, mean: Tensor | None) -> Tensor:
    """`x` in float32, less its means; arguments as in `encode`."""
    x = x.float()
    if mean is None:
        return x
    groups = x.unflatten(2, (mean.shape[2], x.shape[2] // mean.shape[2]))
    return (groups - mean.float().unsqueeze(3)).flatten(2, 3)


def encode_both(
    keys: Tensor,
    values: Tensor,
    mean: Tensor,
    matrices: tuple[Matrices, Matrices],
    bits: tuple[int, int],
    recurs: bool = True,
) -> tuple[Packed, Packed]:
    """`encode` for the keys and values of some tokens; arguments as in `rotated.encode_both`."""
    tables = [x for side in matrices for x in (side.encode, side.feedback)]
    # Both versions are the same function, because it calls compiled pieces. It takes so many kernels that
    # only replays keep a GPU busy.
    return rotated.in_tiles(_replayed, _replayed, keys, values, mean, tables, bits, recurs, MOST_REPLAYED)


def _encode_both(keys, values, mean, *tables, bits) -> tuple[Packed, Packed]:
    """`tables`: `encode` and `feedback` of keys, then of values."""
    # Together they need twice the memory at a time, and only a GPU waits for launches.
    together = use_compiled(keys) and keys.numel() <= MOST_OF_BOTH
    if not (together and as_heads_of_one_side(bits)):
        packed = encode(keys, mean, *tables[:2], bits[0])
        if bits[1] == 16:
            return packed, Packed(values, None, None)
        return packed, encode(values, None, *tables[2:], bits[1], of_values=True)
    both = torch.cat((_centered(keys, mean), values.float()), dim=1)
    matrix, feedback = (torch.cat(pair) for pair in zip(tables[:2], tables[2:]))
    found = encode(both, None, matrix, feedback, bits[0])
    return tuple(Packed(*side, None) for side in zip(*(x.chunk(2, dim=1) for x in found[:2])))


def as_heads_of_one_side(bits: tuple[int, int]) -> bool:
    """Whether keys and values are encoded together, which takes half as many kernels: they need one width,
    and the same scales to search.
    """
    key, value = bits
    return key == value and SEARCHED[key] == SEARCHED_FOR_VALUES[value]


def _run(function: Callable, *args, **constants):
    """`function`, compiled where compiled versions run."""
    return _compiled[function.__name__].run(args[0], *args, **constants)


MOST_REPLAYED = 1 << 22  # elements of the keys of a call that is replayed: 4,096 tokens of 8 heads of 128
_replayed = Replayed(_encode_both, MOST_REPLAYED)

# Codes are defined by the stored scales, which are rounded. A block of channels is one kernel, although it
# has more operations than Inductor would fuse.
_options = {"emulate_precision_casts": True, "max_fusion_size": 1024}
_of_channels = lambda y, *others: channel_tiles(y.shape[1])  # noqa: E731
_compiled = {
    "_in_units": CompiledForSizes(_in_units, _options, _of_channels),
    "_round_block": CompiledForSizes(_round_block, _options, lambda *args: long_element_tiles(), False),
    "_finish": CompiledForSizes(_finish, _options, _of_channels, False),
}
