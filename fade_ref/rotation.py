"""The rotated codec: subtract a mean, rotate, quantise each vector on its own.

A random rotation makes the coordinates of any vector nearly independent Gaussians of one variance
(TurboQuant, arXiv 2504.19874, section 3.1). So one scale a vector is enough, and a stored token
depends on no other. An offset shared by all keys would waste codes: their mean is subtracted first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import quantize
from .moved import lookup
from .tiers import INTEGER_TIERS, packed_bytes, token_bytes

LEVELS = "linear"  # the kind of the Lloyd-Max levels: evenly spaced, so that a code is a number


def qr_rotation(dim: int, seed: int = 0) -> Tensor:
    """A uniformly random orthogonal P [dim, dim], float64; use: y = x @ P.T, x = y @ P.

    QR of a seeded Gaussian matrix; the signs of R's diagonal make it unique (the same on every
    machine, to rounding) and its law uniform (Haar; Mezzadri, math-ph/0609050, section 5).

    >>> round(abs(qr_rotation(64, seed=1).det().item()), 9)
    1.0
    """
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def key_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the tokens of x [..., n, D], `stored` (fp16): [..., 1, D], ready to subtract.

    Tokens (padding) where `valid`, bool [..., n], is False are left out; of no token it is 0.
    """
    valid = torch.ones_like(x[..., :1], dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    total = x.to(torch.float64).where(valid, 0.0).sum(-2, keepdim=True)
    return quantize.stored(total / valid.sum(-2, keepdim=True).clamp(min=1))


class Record(NamedTuple):
    """Stored vectors: packed codes uint8 [..., D*bits/8], scale [...], zero [...] (8, 4 bits)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, eq=False)
class RotatedCodec:
    """Vectors of `head_dim` as records of `bits` bits an element, by `rotation` [D, D].

    Uniform codes (scale, zero) at 8 and 4 bits; Lloyd-Max codes (unbiased norm) of `LEVELS`
    at 3 and 2.
    Raises ValueError for other widths, odd head_dim and a matrix that is not orthogonal.

    >>> codec, x = RotatedCodec(4, 64, qr_rotation(64)), torch.ones(10, 64)
    >>> record = codec.encode(x, mean=key_mean(x))
    >>> codec.bytes_per_token, record.codes.shape, (codec.decode(record, key_mean(x)) == x).all()
    (36, torch.Size([10, 32]), tensor(True))
    """

    bits: int
    head_dim: int
    rotation: Tensor

    def __post_init__(self):
        if self.bits not in INTEGER_TIERS:
            raise ValueError(f"bits={self.bits!r}: one of {tuple(INTEGER_TIERS)} is allowed")
        packed_bytes(self.bits, self.head_dim)
        P, eye = self.rotation, torch.eye(self.head_dim, dtype=torch.float64)
        if P.shape != eye.shape or not torch.allclose(P @ P.T, eye, atol=1e-9):
            raise ValueError(f"rotation must be orthogonal, {self.head_dim} x {self.head_dim}")

    @property
    def bytes_per_token(self) -> int:
        """Of one vector: packed codes, the fp16 scale, the fp16 zero where there is one."""
        return token_bytes(self.bits, self.head_dim)

    def encode(self, x: Tensor, mean: Tensor | None = None) -> Record:
        """x [..., D] less `mean` (broadcast to x), rotated and quantised, each vector alone."""
        x = x.to(torch.float64)
        return self._encode_rotated((x if mean is None else x - mean) @ self.rotation.T)

    def decode(self, record: Record, mean: Tensor | None = None) -> Tensor:
        """Undo `encode`: float64 [..., D], with `mean` added back."""
        x = self._decode_rotated(record) @ self.rotation
        return x if mean is None else x + mean

    def requantize(self, record: Record, other: "RotatedCodec") -> Record:
        """`record` as `other`'s, in the rotated domain; ValueError unless both share a rotation."""
        if not torch.equal(self.rotation, other.rotation):
            raise ValueError("requantize needs two codecs of one rotation")
        return other._encode_rotated(self._decode_rotated(record))

    def _encode_rotated(self, y: Tensor) -> Record:
        if self.bits >= 4:
            codes, scale, *zero = quantize.uniform_encode(y, self.bits)
        else:
            codes, scale, *zero = quantize.lloyd_encode(y, self.bits, LEVELS)
        return Record(quantize.pack(codes, self.bits), scale, zero[0] if zero else None)

    def _decode_rotated(self, record: Record) -> Tensor:
        codes = quantize.unpack(record.codes, self.bits, self.head_dim)
        if self.bits >= 4:
            return quantize.uniform_decode(codes, record.scale, record.zero)
        return quantize.lloyd_decode(codes, record.scale, self.bits, LEVELS)


__getattr__ = lookup(__name__)
