"""The matched codec: symmetric codes of 8, 4, 3 or 2 bits, with matrices for each KV head.

`fade_ref.matched` derives the matrices and specifies the codes. This module encodes the same way, in float32
and in parallel over tokens. Channels come before tokens here, [B, H, D, n], because channels are rounded one
after another. Products are left to PyTorch; everything between two products is one compiled piece.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.compiled import Compiled, rounded, use_compiled
from . import rotated
from .rotated import LARGEST, Packed, center, pack

#: Distance between evenly spaced levels of N(0, 1) with the least squared error, by bits.
STEPS = {8: 0.0308, 4: 0.3352, 3: 0.5860, 2: 0.9957}
#: Scales that the encoder tries, relative to that of `STEPS`.
FACTORS = (0.7, 0.78, 0.86, 0.93, 1.0, 1.08, 1.17, 1.27, 1.4)
TOGETHER = 16  # channels between two products with the errors of all channels before


class Matrices(NamedTuple):
    """Matrices of one side (keys or values) of one layer, float32.

    Attributes:
        encode: A [H, D, D]. A centered row x is encoded as x A^T.
        decode_and_sum: A^-T, and below it the sum of its rows, [H, D + 1, D]. A row y of scaled codes
            decodes to y A^-T, and a query q meets codes as q A^-1.
        feedback: V [H, D, D], lower triangular. |V e|^2 is the damage that an error e of y does.
    """

    encode: Tensor
    decode_and_sum: Tensor
    feedback: Tensor

    @property
    def decode(self) -> Tensor:
        """A^-T [H, D, D], a view."""
        return self.decode_and_sum[:, :-1]


def quantize(y: Tensor, feedback: Tensor, bits: int) -> Packed:
    """Codes of vectors that are already centered and multiplied by A: float32 [B, H, n, D]."""
    return _quantize(y.mT.contiguous(), feedback, bits)


def _quantize(y: Tensor, feedback: Tensor, bits: int) -> Packed:
    """The same of `y` [B, H, D, n].

    Of `FACTORS`, the scale with the least squared error of plain rounding wins. Each channel is then rounded
    after the errors of the channels before were added, weighted by V_ij / V_ii. A product adds the errors of
    earlier blocks of `TOGETHER` channels, so that one compiled version of `_round_block` serves all blocks.

    Where compiled versions run, n is padded to a power of two, so that few versions serve all n.
    """
    dim, length = y.shape[2:]
    if use_compiled(y) and (more := rounded(length) - length):
        y = torch.nn.functional.pad(y, (0, more))
    step, limit = (torch.full((), x, device=y.device) for x in (STEPS[bits], center(bits)))
    unit, tried = _run(_in_units, y, step, limit)
    diagonal = feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [H, D, 1]
    weight, exposed = feedback / diagonal, feedback @ unit
    errors, codes, lost = torch.empty_like(unit), [], []
    for start in range(0, dim, TOGETHER):
        own = slice(start, min(start + TOGETHER, dim))
        before = weight[:, own, :start] @ errors[:, :, :start]
        block = weight[:, own, own].contiguous(), exposed[:, :, own], diagonal[:, own].contiguous()
        found = _run(_round_block, unit[:, :, own], before, *block, limit)
        for part, x in zip((codes, lost), found[::2]):
            part.append(x)
        errors[:, :, own] = found[1]
    packed, scale = _run(_finish, exposed, tried, lost, codes, bits=bits)
    return Packed(packed[:, :, :length], scale[:, :, :length], None)


def _in_units(dynamic_sizes, y: Tensor, step: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`y` [B, H, D, n] divided by the best scale of each vector, and these scales [B, H, n].

    The first of equally good scales wins. `step` and `limit` are tensors, so that one compiled version serves
    all widths: the distance between levels of N(0, 1), and the largest centered code.
    """
    size = y.square().mean(2, keepdim=True).sqrt() * step
    tried = least = None
    for factor in FACTORS:
        scale = size * factor
        unit = y / torch.where(scale > 0, scale, 1.0)
        error = (y - scale * _nearest(unit, limit)).square().sum(2, keepdim=True)
        tried = scale if tried is None else torch.where(error < least, scale, tried)
        least = error if least is None else torch.minimum(error, least)
    return y / torch.where(tried > 0, tried, 1.0), tried.squeeze(2)


def _round_block(
    dynamic_sizes,
    unit: Tensor,
    before: Tensor,
    weight: Tensor,
    exposed: Tensor,
    diagonal: Tensor,
    limit: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of one block uint8 [B, H, C, n], their errors [B, H, C, n], its part of <Vu, Ve> [B, H, n].

    u are the vectors in units of the distance between levels, and e the errors of their centered codes. The
    damage V e is a by-product of rounding: V_ii times what is left of channel i.

    The arguments: u as `unit`, the weighted errors of earlier blocks as `before`, and Vu as `exposed`,
    [B, H, C, n]; `weight` [H, C, C], that between the channels of the block, and `diagonal` of V [H, C, 1];
    `limit` as in `_in_units`.
    """
    codes, errors, lost = [], [], torch.zeros_like(unit[:, :, 0])
    for i in range(unit.shape[2]):
        wanted = unit[:, :, i] + before[:, :, i]
        if torch.compiler.is_compiling():  # one kernel keeps the block in registers
            for j, error in enumerate(errors):
                wanted = wanted + weight[:, i, j].unsqueeze(-1) * error
        elif errors:
            wanted = wanted + (weight[:, i : i + 1, :i] @ torch.stack(errors, dim=2)).squeeze(2)
        near = _nearest(wanted, limit)
        lost = lost + exposed[:, :, i] * (diagonal[:, i] * (wanted - near))
        codes.append((near + limit).to(torch.uint8))
        errors.append(unit[:, :, i] - near)
    return torch.stack(codes, dim=2), torch.stack(errors, dim=2), lost


def _nearest(unit: Tensor, limit: Tensor) -> Tensor:
    """The centered code that is nearest to each element of `unit`."""
    return (unit + limit).round().clamp(torch.zeros_like(limit), 2 * limit) - limit


def _finish(
    dynamic_sizes, exposed: Tensor, tried: Tensor, lost: list[Tensor], codes: list[Tensor], *, bits: int
) -> tuple[Tensor, Tensor]:
    """Packed codes [B, H, n, D * bits / 8] and stored scales fp16 [B, H, n].

    The stored scale makes the vector unbiased in the metric of V, and stays within a factor of 2 of the scale
    that was `tried` [B, H, n]. The gain <Vu, Vc> / <Vu, Vu> of centered codes c needs no product with the
    codes, because Vc = Vu - Ve. A zero vector has the gain 1.

    `exposed` is Vu [B, H, D, n]. `lost` and `codes` are the results of `_round_block`.
    """
    whole = exposed.square().sum(2)
    gain = torch.where(whole > 0, 1 - sum(lost) / torch.where(whole > 0, whole, 1.0), 1.0)
    scale = torch.where(gain > 0, tried / gain.clamp(0.5, 2.0), tried)
    return pack(torch.cat(codes, dim=2).mT, bits).contiguous(), scale.clamp_max(LARGEST).half()


def encode(x: Tensor, mean: Tensor | None, matrix: Tensor, feedback: Tensor, bits: int) -> Packed:
    """Center, multiply by A and quantize.

    Args:
        x: [B, H, n, D] of any floating dtype; computed in float32.
        mean: [B, H, m, D], each the mean of n / m vectors, or None for values.
        matrix, feedback: A and V [H, D, D].
        bits: 8, 4, 3 or 2.
    """
    few = rounded(x.shape[2]) == x.shape[2]  # then few compiled versions serve all lengths
    x = (_run if few else _eagerly)(_centered, x, mean)
    return _quantize(matrix @ x.mT, feedback, bits)


def _centered(dynamic_sizes, x: Tensor, mean: Tensor | None) -> Tensor:
    """`x` less its means, float32 [B, H, n, D]."""
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
    # Both versions are the same function, because it calls compiled pieces.
    return rotated.in_tiles(_encode_both, _encode_both, keys, values, mean, tables, bits, recurs)


def _encode_both(keys, values, mean, *tables, bits) -> tuple[Packed, Packed]:
    """`tables`: `encode` and `feedback` of keys, then of values."""
    packed = encode(keys, mean, *tables[:2], bits[0])
    return packed, Packed(values, None, None) if bits[1] == 16 else encode(values, None, *tables[2:], bits[1])


def _run(function: Callable, *args, **constants):
    """`function`, compiled where compiled versions run."""
    if use_compiled(args[0]):
        return _compiled[function]([], dict, *args, **constants)
    return _eagerly(function, *args, **constants)


def _eagerly(function: Callable, *args, **constants):
    return function([], *args, **constants)


# Codes are defined by the stored scales, which are rounded. A block of channels is one kernel, although it
# has more operations than Inductor would fuse.
_PRECISE = {"emulate_precision_casts": True}
_compiled = {function: Compiled(function, options=_PRECISE) for function in (_centered, _in_units, _finish)}
_compiled[_round_block] = Compiled(_round_block, options=_PRECISE | {"max_fusion_size": 1024})
