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
FACTORS = (0.75, 0.9, 1.0, 1.15, 1.35)  # scales that the encoder tries, relative to that of `STEPS`
TOGETHER = 16  # channels between two products with the errors of all channels before
COPIES = 8  # float32 copies of its keys that the encoder holds at a time, as a power of two


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


def round_with_feedback(unit: Tensor, feedback: Tensor, bits: int) -> Tensor:
    """Centered codes (code - center) of `unit` [H, D, T], in units of the distance between levels.

    Each channel is rounded after the errors of the channels before were added, weighted by V_ij / V_ii. A
    product adds the errors of earlier blocks of `TOGETHER` channels, so that one compiled version of
    `_round_block` serves all blocks.
    """
    weight = feedback / feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    codes, errors, dim = torch.empty_like(unit), torch.empty_like(unit), unit.shape[1]
    limit = torch.full((), center(bits), device=unit.device)
    for start in range(0, dim, TOGETHER):
        own = slice(start, min(start + TOGETHER, dim))
        before = weight[:, own, :start] @ errors[:, :start]
        codes[:, own] = _run(_round_block, unit[:, own], before, weight[:, own, own].contiguous(), limit)
        torch.sub(unit[:, own], codes[:, own], out=errors[:, own])
    return codes


def _round_block(dynamic_sizes, unit: Tensor, before: Tensor, weight: Tensor, limit: Tensor) -> Tensor:
    """Centered codes of one block: `unit` and the weighted errors of earlier blocks `before` [H, C, T].

    `weight` [H, C, C] is that between the channels of the block. `limit` is the largest centered code, a
    tensor, so that one compiled version serves all widths.
    """
    codes, errors = [], []
    for i in range(unit.shape[1]):
        wanted = unit[:, i] + before[:, i]
        if torch.compiler.is_compiling():  # one kernel keeps the block in registers
            for j, error in enumerate(errors):
                wanted = wanted + weight[:, i, j].unsqueeze(-1) * error
        elif errors:
            wanted = wanted + (weight[:, i : i + 1, :i] @ torch.stack(errors, dim=1)).squeeze(1)
        codes.append((wanted + limit).round().clamp(torch.zeros_like(limit), 2 * limit) - limit)
        errors.append(unit[:, i] - codes[-1])
    return torch.stack(codes, dim=1)


def quantize(y: Tensor, feedback: Tensor, bits: int) -> Packed:
    """Codes of vectors that are already centered and multiplied by A: float32 [B, H, n, D].

    Of `FACTORS`, the scale that does the least damage wins. The stored scale makes the vector unbiased in the
    metric of V, and stays within a factor of 2 of the scale that was tried.

    Where compiled versions run, n is padded to a power of two, so that few versions serve all n.
    """
    batch, _, length, _ = y.shape
    if use_compiled(y):
        y = torch.nn.functional.pad(y, (0, 0, 0, rounded(length) - length))
    y = y.permute(1, 3, 0, 2).flatten(2)  # [H, D, T]
    step = torch.full((), STEPS[bits], device=y.device)
    unit, tried = _run(_in_units, y, step)
    codes = round_with_feedback(unit, feedback, bits)
    seen, wanted = feedback @ codes, feedback @ y  # [H, D, F * T] and [H, D, T]
    codes, scale = _run(_best, codes, seen, wanted, tried)
    codes = (codes + center(bits)).to(torch.uint8).mT
    codes, scale = (x.unflatten(1, (batch, -1)).transpose(0, 1)[:, :, :length] for x in (codes, scale))
    return Packed(pack(codes.contiguous(), bits), scale.contiguous(), None)


def _in_units(dynamic_sizes, y: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """`y` [H, D, T] divided by every scale that is tried, [H, D, F * T], and these scales [H, 1, F * T]."""
    size = y.square().mean(1, keepdim=True).sqrt() * step
    factors = torch.tensor(FACTORS, device=y.device).reshape(-1, 1)
    tried = size.unsqueeze(2) * factors
    unit = y.unsqueeze(2) / torch.where(tried > 0, tried, 1.0)
    return unit.flatten(2), tried.flatten(2)


def _best(dynamic_sizes, codes: Tensor, seen: Tensor, wanted: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
    """Centered codes [H, D, T] and scales [H, T] fp16, of the scale that does the least damage.

    The arguments: `codes` and `seen`, V times the codes, [H, D, F * T]; `tried` [H, 1, F * T].
    `wanted` is V times the vectors, [H, D, T].
    """
    codes, seen, tried = (x.unflatten(2, (len(FACTORS), -1)) for x in (codes, seen, tried))
    damage = (wanted.unsqueeze(2) - tried * seen).square().sum(1, keepdim=True)
    best = damage.argmin(2, keepdim=True)  # [H, 1, 1, T]
    each = (x.gather(2, best.expand(-1, x.shape[1], -1, -1)).squeeze(2) for x in (codes, seen, tried))
    codes, seen, tried = each
    tried = tried.squeeze(1)
    aligned = (wanted * seen).sum(1)
    scale = wanted.square().sum(1) / torch.where(aligned > 0, aligned, 1.0)
    scale = torch.where(aligned > 0, scale, tried)
    scale = torch.minimum(torch.maximum(scale, tried / 2), tried * 2).clamp_max(LARGEST).half()
    return codes, scale


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
    return rotated.in_tiles(_encode_both, _encode_both, keys, values, mean, tables, bits, recurs, COPIES)


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
    for function in (_in_units, _round_block, _best)
}
