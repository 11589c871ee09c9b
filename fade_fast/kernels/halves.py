"""Two halves of 4-bit codes: the upper two bits of each code, and the lower two.

Each half is packed as 2-bit codes are. A few operations on bytes make the halves of packed codes, and packed
codes of the halves; no code is ever unpacked. The upper half is a 2-bit code of the same vector, which the
index reads (`fade_ref.select.coarse`).
"""

import torch
from torch import Tensor

EVEN, ODD = 0x33, 0xCC  # the lower and the upper two bits of each half of a byte
CELL = 4  # codes that share their upper bits
MIDDLE = 1.5  # the middle of such codes, from the first of them


def split(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower halves, uint8 [..., D / 4] each, of packed 4-bit codes [..., D / 2].

    Byte j of the codes holds channels j and j + D / 2. So bytes j and j + D / 4 together hold the four
    channels of byte j of a half.
    """
    first, second = codes.chunk(2, dim=-1)
    upper = ((first >> 2) & EVEN) | (second & ODD)
    lower = (first & EVEN) | ((second & EVEN) << 2)
    return upper, lower


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Undo `split`: packed 4-bit codes [..., D / 2]."""
    first = (lower & EVEN) | ((upper & EVEN) << 2)
    second = ((lower >> 2) & EVEN) | (upper & ODD)
    return torch.cat((first, second), dim=-1)


def coarse(scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with which the upper half is a 2-bit code of the vector.

    A code c = 4 u + l is read as 4 u + 1.5. With a zero point z, the vector is (4 s) u + (z + 1.5 s). Without
    one, codes are centered: (4 u + 1.5 - 7.5) s is (u - 1.5) (4 s).
    """
    scale = scale.to(dtype)
    return CELL * scale, None if zero is None else zero.to(dtype) + MIDDLE * scale
