"""Parts of 4-bit codes: the upper bits of each code, and the lower ones.

With two upper bits, each part is packed as 2-bit codes are. With one, a byte of the upper part holds
one bit of eight channels. The lower part is then the second bit of each code, packed alike, and after it the
lower two bits. A few operations on bytes make the parts of packed codes, and packed codes of the parts; no
code is ever unpacked. The upper part is a coarse code of the same vector, which the index reads
(`fade_ref.select.coarse`).
"""

import torch
from torch import Tensor

EVEN, ODD = 0x33, 0xCC  # the lower and the upper two bits of each half of a byte
LOW, HIGH = 0x55, 0xAA  # the lower and the upper bit of each quarter of a byte
#: Of codes with 2 or 1 upper bits: the step between levels of a 2-bit code, in codes, and the lowest level.
LEVELS = {2: (4.0, 1.5), 1: (8.0 / 3.0, 3.5)}


def split(codes: Tensor, kept: int = 2) -> tuple[Tensor, Tensor]:
    """The upper `kept` bits, uint8 [..., D / 4] or [..., D / 8], and the lower bits, of packed 4-bit codes
    [..., D / 2].

    Byte j of the codes holds channels j and j + D / 2. So bytes j and j + D / 4 together hold the four
    channels of byte j of a half.
    """
    first, second = codes.chunk(2, dim=-1)
    upper = ((first >> 2) & EVEN) | (second & ODD)
    lower = (first & EVEN) | ((second & EVEN) << 2)
    if kept == 2:
        return upper, lower
    first, second = upper.chunk(2, dim=-1)
    upper = (first & HIGH) | ((second & HIGH) >> 1)
    next_bit = (first & LOW) | ((second & LOW) << 1)
    return upper, torch.cat((next_bit, lower), dim=-1)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Undo `split`: packed 4-bit codes [..., D / 2]. The sizes tell how many bits are in `upper`.

    Elements may be bytes, or integers of several bytes: no bit moves from one byte to another.
    """
    width = upper.shape[-1]
    even, odd, low, high = (_in_each_byte(mask, upper) for mask in (EVEN, ODD, LOW, HIGH))
    if lower.shape[-1] == 3 * width:
        next_bit, lower = lower.split((width, 2 * width), dim=-1)
        first = (upper & high) | (next_bit & low)
        second = ((upper & low) << 1) | ((next_bit >> 1) & low)
        upper = torch.cat((first, second), dim=-1)
    first = (lower & even) | ((upper & even) << 2)
    second = ((lower >> 2) & even) | (upper & odd)
    return torch.cat((first, second), dim=-1)


def _in_each_byte(mask: int, x: Tensor) -> int:
    """An integer for elements of `x` that has `mask` in each of its bytes."""
    bits = 8 * x.element_size()
    value = mask * ((1 << bits) - 1) // 255
    return value - (1 << bits) if x.dtype.is_signed and value >> (bits - 1) else value


def as_two_bits(upper: Tensor, kept: int) -> Tensor:
    """The upper part as 2-bit codes [..., D / 4]: of one bit, the codes 0 and 3."""
    if kept == 2:
        return upper
    first, second = upper & HIGH, upper & LOW
    return torch.cat((first | (first >> 1), second | (second << 1)), dim=-1)


def coarse(
    scale: Tensor, zero: Tensor | None, dtype: torch.dtype, kept: int = 2
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with which `as_two_bits` is a code of the vector.

    With two upper bits u, a code c = 4 u + l is read as 4 u + 1.5. With one, b, it is read as 8 b + 3.5, and
    the 2-bit code is 3 b. With a zero point z, the vector is (4 s) u + (z + 1.5 s). Without one, codes are
    centered: (4 u + 1.5 - 7.5) s is (u - 1.5) (4 s).
    """
    step, lowest = LEVELS[kept]
    scale = scale.to(dtype)
    return step * scale, None if zero is None else zero.to(dtype) + lowest * scale
