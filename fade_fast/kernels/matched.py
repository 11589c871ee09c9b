"""The matched codec: symmetric codes of 8, 4, 3 or 2 bits, with matrices for each KV head.

`fade_ref.matched` derives the matrices and specifies the codes. This module encodes the same way, in float32
and in parallel over tokens. Channels come before tokens here, [H, D, T], because channels are rounded one
after another.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.compiled import Compiled
from . import rotated
from .rotated import LARGEST, Packed, center, pack

#: Distance between evenly spaced levels of N(0, 1) with the least squared error, by bits.
STEPS = {8: 0.0308, 4: 0.3352, 3: 0.5860, 2: 0.9957}
FACTORS = (0.75, 0.9, 1.0, 1.15, 1.35)  # scales that the encoder tries, relative to that of `STEPS`
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


def round_with_feedback(unit: Tensor, feedback: Tensor, bits: int) -> Tensor:
    """Centered codes (code - center) of `unit` [H, D, T], in units of the distance between levels.

    Each channel is rounded after the errors of the channels before were added, weighted by V_ij / V_ii.
    """
    weight = feedback / feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    top, middle, dim = 2**bits - 1, center(bits), unit.shape[1]
    rounded, errors = [], []
    for start in range(0, dim, TOGETHER):
        channels = range(start, min(start + TOGETHER, dim))
        wanted, block = unit[:, start : channels.stop], []
        if start:
            before = torch.cat(errors, dim=1)
            wanted = wanted + weight[:, start : channels.stop, :start] @ before
        for i in channels:
            own = wanted[:, i - start]
            if torch.compiler.is_compiling():  # one kernel keeps the block in registers
                for j, error in zip(range(start, i), block):
                    own = own + weight[:, i, j].unsqueeze(-1) * error
            elif block:
                own = own + (weight[:, i : i + 1, start:i] @ torch.stack(block, dim=1)).squeeze(1)
            rounded.append((own + middle).round().clamp(0, top) - middle)
            block.append(unit[:, i] - rounded[-1])
        errors.append(torch.stack(block, dim=1))
    return torch.stack(rounded, dim=1)


def quantize(y: Tensor, feedback: Tensor, bits: int) -> Packed:
    """Codes of vectors that are already centered and multiplied by A: float32 [B, H, n, D].

    Of `FACTORS`, the scale that does the least damage wins. The stored scale makes the vector unbiased in the
    metric of V, and stays within a factor of 2 of the scale that was tried.
    """
    batch, heads, length, dim = y.shape
    y = y.permute(1, 3, 0, 2).flatten(2)  # [H, D, T]
    size = y.square().mean(1, keepdim=True).sqrt() * STEPS[bits]
    factors = torch.tensor(FACTORS, device=y.device).reshape(-1, 1)
    tried = (size.unsqueeze(2) * factors).flatten(2)  # [H, 1, F * T]
    safe = torch.where(tried > 0, tried, 1.0)
    unit = (y.unsqueeze(2) / safe.unflatten(2, (len(FACTORS), -1))).flatten(2)
    codes = round_with_feedback(unit, feedback, bits)
    seen, wanted = feedback @ codes, feedback @ y  # [H, D, F * T] and [H, D, T]
    error = wanted.unsqueeze(2) - (tried * seen).unflatten(2, (len(FACTORS), -1))
    best = error.square().sum(1, keepdim=True).argmin(2, keepdim=True)  # [H, 1, 1, T]

    def chosen(x: Tensor) -> Tensor:
        x = x.unflatten(2, (len(FACTORS), -1))
        return x.gather(2, best.expand(-1, x.shape[1], -1, -1)).squeeze(2)

    codes, seen, tried = chosen(codes), chosen(seen), chosen(tried).squeeze(1)
    aligned = (wanted * seen).sum(1)
    scale = wanted.square().sum(1) / torch.where(aligned > 0, aligned, 1.0)
    scale = torch.where(aligned > 0, scale, tried)
    scale = torch.minimum(torch.maximum(scale, tried / 2), tried * 2).clamp_max(LARGEST).half()
    codes = (codes + center(bits)).to(torch.uint8).unflatten(2, (batch, length)).permute(2, 0, 3, 1)
    return Packed(pack(codes, bits), scale.unflatten(1, (batch, length)).transpose(0, 1).contiguous(), None)


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
    return rotated.in_tiles(_compiled, _encode_both, keys, values, mean, tables, bits, recurs, len(FACTORS))


def _encode_both(dynamic_sizes, keys, values, mean, *tables, bits) -> tuple[Packed, Packed]:
    """`tables`: `encode` and `feedback` of keys, then of values."""
    each = keys.shape[2] // mean.shape[2]
    mean = mean.unsqueeze(3).expand(-1, -1, -1, each, -1).flatten(2, 3)
    packed = encode(keys, mean, *tables[:2], bits[0])
    return packed, Packed(values, None, None) if bits[1] == 16 else encode(values, None, *tables[2:], bits[1])


# Codes are defined by the stored scales, which are rounded.
_compiled = Compiled(_encode_both, options={"emulate_precision_casts": True})
