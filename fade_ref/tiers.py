"""Tiers: how many bits of a token are kept.

A **tier** says how much of a token survives. A **codec** (`quantize`, `rotation`, `matched`) chooses its
bits. A **plan** is a tensor of tier codes, one for each token.
"""

from enum import IntEnum


class Tier(IntEnum):
    """Tier of one token, best first. The integer values are part of the checkpoint format."""

    FP16 = 0  # the model's own dtype, whatever it is
    INT8 = 1
    INT4 = 2
    INT3 = 3
    INT2 = 4
    # 5 was product-quantized. Old checkpoints have it, so it means nothing else.
    EVICTED = 6


#: Width in bits -> integer tier.
INTEGER_TIERS = {8: Tier.INT8, 4: Tier.INT4, 3: Tier.INT3, 2: Tier.INT2}


def first_tier(key_bits: int, value_bits: int) -> Tier:
    """Tier of tokens with these widths: that of the side with more bits. 16 bits are not quantized.

    >>> first_tier(4, 8).name, first_tier(4, 16).name
    ('INT8', 'INT4')
    """
    return INTEGER_TIERS[max(bits for bits in (key_bits, value_bits) if bits in INTEGER_TIERS)]


def packed_bytes(bits: int, head_dim: int) -> int:
    """Bytes that hold `head_dim` codes of `bits` bits each.

    Raises `ValueError` if they do not fill whole bytes.

    >>> [packed_bytes(b, 64) for b in (8, 4, 3, 2)]
    [64, 32, 24, 16]
    """
    total = bits * head_dim
    if total % 8:
        raise ValueError(
            f"{head_dim} codes of {bits} bits do not fill whole bytes: use 8 bits, or 4 for an even head_dim"
        )
    return total // 8


def token_bytes(bits: int, head_dim: int) -> int:
    """Bytes of one rotated-codec vector (one key, or one value, of one KV head).

    `bits` 16 is an uncompressed vector of a 16-bit dtype. The integer tiers add an fp16 scale, and at 8 and 4
    bits (uniform codes) an fp16 zero point.

    >>> [token_bytes(b, 128) for b in (16, 8, 4, 3, 2)]
    [256, 132, 68, 50, 34]
    """
    if bits == 16:
        return 2 * head_dim
    return packed_bytes(bits, head_dim) + (4 if bits >= 4 else 2)
