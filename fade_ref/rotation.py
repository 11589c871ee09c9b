"""The rotated codec: subtract a mean, rotate, and quantize each vector on its own.

A random rotation makes the coordinates of any vector nearly independent Gaussians of one variance
(TurboQuant, arXiv 2504.19874, section 3.1). So one scale for each vector is enough, and a stored token
depends on no other. An offset that all keys share would waste codes, so their mean is subtracted first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import quantize
from .moved import lookup
from .tiers import INTEGER_TIERS, packed_bytes, token_bytes

LEVELS = "linear"  # evenly spaced Lloyd-Max levels: attention multiplies the codes directly


def qr_rotation(dim: int, seed: int = 0) -> Tensor:
    """A uniformly random orthogonal P [dim, dim], float64. Use: y = x @ P.T, x = y @ P.

    QR of a seeded Gaussian matrix. The signs of R's diagonal make P unique, so every machine has the same, up
    to rounding. They also make its distribution uniform (Haar; Mezzadri, math-ph/0609050, section 5).

    >>> round(abs(qr_rotation(64, seed=1).det().item()), 9)
    1.0
    """
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def key_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the tokens of x [..., n, D], rounded to fp16: float64 [..., 1, D].

    `valid`, bool [..., n], is False at padding, which does not count. Without any token the mean is 0.
    """
    valid = torch.ones_like(x[..., :1], dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    total = x.to(torch.float64).where(valid, 0.0).sum(-2, keepdim=True)
    return quantize.stored(total / valid.sum(-2, keepdim=True).clamp(min=1))


class Record(NamedTuple):
    """Stored vectors: codes uint8 [..., D*bits/8], scale [...], and zero point [...] at 8 and 4 bits."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, eq=False)
class RotatedCodec:
    """Vectors of `head_dim` channels as records of `bits` bits per element, rotated by `rotation` [D, D].

    Codes are uniform at 8 and 4 bits, and Lloyd-Max codes of `LEVELS` at 3 and 2. Raises `ValueError` for
    other widths, for a head_dim that does not fill whole bytes, and for a matrix that is not orthogonal.

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
        """Bytes of one vector: packed codes, fp16 scale, and fp16 zero point if there is one."""
        return token_bytes(self.bits, self.head_dim)

    def encode(self, x: Tensor, mean: Tensor | None = None) -> Record:
        """The record of x [..., D] less `mean` (broadcast to x)."""
        x = x.to(torch.float64)
        return self._encode_rotated((x if mean is None else x - mean) @ self.rotation.T)

    def decode(self, record: Record, mean: Tensor | None = None) -> Tensor:
        """Undo `encode`: float64 [..., D]; `mean` is added back."""
        x = self._decode_rotated(record) @ self.rotation
        return x if mean is None else x + mean

    def requantize(self, record: Record, other: "RotatedCodec") -> Record:
        """`record` in the codec `other`, without leaving the rotated domain.

        Raises `ValueError` unless both codecs share a rotation.
        """
        if not torch.equal(self.rotation, other.rotation):
            raise ValueError("requantize needs two codecs of one rotation")
        return other._encode_rotated(self._decode_rotated(record))

    def levels(self, record: Record) -> Tensor:
        """The numbers that scale and zero point apply to, [..., D]."""
        codes = quantize.unpack(record.codes, self.bits, self.head_dim)
        return codes.double() if self.bits >= 4 else quantize.steps(self.bits, LEVELS)[codes.long()]

    def rotate_query(self, query: Tensor) -> Tensor:
        """Queries [..., D] as they are multiplied with rotated keys."""
        return query @ self.rotation.T

    def rotate_back(self, x: Tensor) -> Tensor:
        """Sums of rotated values [..., D] as sums of values."""
        return x @ self.rotation

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
