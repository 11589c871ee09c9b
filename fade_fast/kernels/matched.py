"""The matched codec: symmetric codes of 8, 4, 3 or 2 bits, with matrices for each KV head.

`fade_ref.matched` derives the matrices and specifies the codes. This module encodes the same way, in float32
and in parallel over tokens. Channels come before tokens here, [H, D, T], because channels are rounded one
after another.
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


def round_with_feedback(unit: Tensor, feedback: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of `unit` [H, D, T], which is in units of the distance between levels, and their gain.

    Each channel is rounded after the errors of the channels before were added, weighted by V_ij / V_ii. A
    product adds the errors of earlier blocks of `TOGETHER` channels, so that one compiled version of
    `_round_block` serves all blocks.

    Returns codes uint8 [H, D, T], and <Vu, Vc> / <Vu, Vu> of vectors u and centered codes c, [H, T]; 1 for
    zero vectors. The damage V e of the errors is a by-product of rounding: V_ii times what is left of channel
    i. So Vc = Vu - Ve needs no product with the codes.
    """
    diagonal = feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [H, D, 1]
    weight, exposed, dim = feedback / diagonal, feedback @ unit, unit.shape[1]
    codes, errors = torch.empty_like(unit, dtype=torch.uint8), torch.empty_like(unit)
    limit, lost = torch.full((), center(bits), device=unit.device), []
    for start in range(0, dim, TOGETHER):
        own = slice(start, min(start + TOGETHER, dim))
        before = weight[:, own, :start] @ errors[:, :start]
        block = weight[:, own, own].contiguous(), exposed[:, own], diagonal[:, own].contiguous()
        codes[:, own], errors[:, own], loss = _run(_round_block, unit[:, own], before, *block, limit)
        lost.append(loss)
    return codes, _run(_gain, exposed, torch.stack(lost))


def _round_block(
    dynamic_sizes,
    unit: Tensor,
    before: Tensor,
    weight: Tensor,
    exposed: Tensor,
    diagonal: Tensor,
    limit: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of one block uint8 [H, C, T], their errors [H, C, T], and its part of <Vu, Ve> [H, T].

    The arguments: `unit`, the weighted errors of earlier blocks `before`, and `exposed`, that is Vu,
    [H, C, T]; `weight` [H, C, C], that between the channels of the block, and `diagonal` of V [H, C, 1];
    `limit`, the largest centered code, a tensor, so that one compiled version serves all widths.
    """
    codes, errors, lost = [], [], torch.zeros_like(unit[:, 0])
    for i in range(unit.shape[1]):
        wanted = unit[:, i] + before[:, i]
        if torch.compiler.is_compiling():  # one kernel keeps the block in registers
            for j, error in enumerate(errors):
                wanted = wanted + weight[:, i, j].unsqueeze(-1) * error
        elif errors:
            wanted = wanted + (weight[:, i : i + 1, :i] @ torch.stack(errors, dim=1)).squeeze(1)
        near = _nearest(wanted, limit)
        lost = lost + exposed[:, i] * (diagonal[:, i] * (wanted - near))
        codes.append((near + limit).to(torch.uint8))
        errors.append(unit[:, i] - near)
    return torch.stack(codes, dim=1), torch.stack(errors, dim=1), lost


def _gain(dynamic_sizes, exposed: Tensor, lost: Tensor) -> Tensor:
    """<Vu, Vc> / <Vu, Vu> [H, T] from Vu [H, D, T] and the parts of <Vu, Ve>, [blocks, H, T]."""
    whole = exposed.square().sum(1)
    return torch.where(whole > 0, 1 - lost.sum(0) / torch.where(whole > 0, whole, 1.0), 1.0)


def _nearest(unit: Tensor, limit: Tensor) -> Tensor:
    """The centered code that is nearest to each element of `unit`."""
    return (unit + limit).round().clamp(torch.zeros_like(limit), 2 * limit) - limit


def quantize(y: Tensor, feedback: Tensor, bits: int) -> Packed:
    """Codes of vectors that are already centered and multiplied by A: float32 [B, H, n, D].

    Of `FACTORS`, the scale with the least squared error of plain rounding wins. The stored scale makes the
    vector unbiased in the metric of V, and stays within a factor of 2 of the scale that was tried.

    Where compiled versions run, n is padded to a power of two, so that few versions serve all n.
    """
    batch, _, length, _ = y.shape
    if use_compiled(y):
        y = torch.nn.functional.pad(y, (0, 0, 0, rounded(length) - length))
    y = y.permute(1, 3, 0, 2).flatten(2)  # [H, D, T]
    step, limit = (torch.full((), x, device=y.device) for x in (STEPS[bits], center(bits)))
    unit, tried = _run(_in_units, y, step, limit)
    codes, gain = round_with_feedback(unit, feedback, bits)
    # The stored scale stays within a factor of 2 of the scale that was tried.
    scale = torch.where(gain > 0, tried.squeeze(1) / gain.clamp(0.5, 2.0), tried.squeeze(1))
    scale = scale.clamp_max(LARGEST).half()
    codes, scale = codes.mT.unflatten(1, (batch, -1)), scale.unflatten(1, (batch, -1))
    codes, scale = (x.transpose(0, 1)[:, :, :length] for x in (codes, scale))
    return Packed(pack(codes.contiguous(), bits), scale.contiguous(), None)


def _in_units(dynamic_sizes, y: Tensor, step: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`y` [H, D, T] divided by the best scale of each vector, and these scales [H, 1, T].

    The first of equally good scales wins.
    """
    size = y.square().mean(1, keepdim=True).sqrt() * step
    tried = least = None
    for factor in FACTORS:
        scale = size * factor
        unit = y / torch.where(scale > 0, scale, 1.0)
        error = (y - scale * _nearest(unit, limit)).square().sum(1, keepdim=True)
        tried = scale if tried is None else torch.where(error < least, scale, tried)
        least = error if least is None else torch.minimum(error, least)
    return y / torch.where(tried > 0, tried, 1.0), tried


def encode(x: Tensor, mean: Tensor | None, matrix: Tensor, feedback: Tensor, bits: int) -> Packed:
    """Center, multiply by A and quantize: x [B, H, n, D] of any floating dtype, computed in float32."""
    x = x.float()
    y = (x if mean is None else x - mean.float()) @ matrix.mT
    return quantize(y, feedback, bits)


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
    each = keys.shape[2] // mean.shape[2]
    mean = mean.unsqueeze(3).expand(-1, -1, -1, each, -1).flatten(2, 3)
    packed = encode(keys, mean, *tables[:2], bits[0])
    return packed, Packed(values, None, None) if bits[1] == 16 else encode(values, None, *tables[2:], bits[1])


def _run(function: Callable, *args: Tensor):
    """`function`, compiled where compiled versions run."""
    return _compiled[function]([], dict, *args) if use_compiled(args[0]) else function([], *args)


# Codes are defined by the stored scales, which are rounded.
_compiled = {
    function: Compiled(function, options={"emulate_precision_casts": True})
    for function in (_in_units, _round_block, _gain)
}
