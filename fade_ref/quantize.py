"""Codes: uniform codes, Lloyd-Max codes, and how codes are packed.

All functions are pure. Reals are float64, in the units of the input. Codes are uint8, one in each byte
until `pack`. A cache stores packed codes and one or two fp16 numbers for each vector. The encoder rounds
those numbers first (`stored`) and then chooses uniform codes, so that it uses the same numbers as the
decoder. Every encoder raises `ValueError` for NaN and infinite input.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .moved import lookup
from .tiers import INTEGER_TIERS, packed_bytes

FP16_MAX = 65504.0
FP16_TINY = 2.0**-14  # smallest normal fp16 number: a smaller scale would lose precision


def stored(x: Tensor) -> Tensor:
    """`x`, of any shape, clamped to the range of fp16 and rounded to it (through fp32, as torch does).

    >>> stored(torch.tensor([1 / 3, 1e6, -1e-9], dtype=torch.float64)).tolist()
    [0.333251953125, 65504.0, -0.0]
    """
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(torch.float64)


def finite(x: Tensor) -> Tensor:
    """`x` as float64. Raises `ValueError` if a value is NaN or infinite."""
    if not torch.isfinite(x).all():
        raise ValueError("NaN or infinite input cannot be quantized")
    return x.to(torch.float64)


def min_max(x: Tensor, bits: int, least: float) -> tuple[Tensor, Tensor]:
    """Scale, at least `least`, and zero point [...] that spread 2^bits codes over the range of x [..., D].

    Raises `ValueError` unless `bits` is 1 to 8, and for NaN or infinite values.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits!r}: 1 to 8 are allowed")
    low, high = finite(x).aminmax(dim=-1)
    return ((high - low) / (2**bits - 1)).clamp(min=least), low


def nearest(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., D] of x, rounded half to even and clamped to 0 .. 2^bits - 1.

    `scale` and `zero` are [...].
    """
    codes = torch.round((x - zero.unsqueeze(-1)) / scale.unsqueeze(-1))
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def uniform_encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric uniform codes of vectors x [..., D], 1 to 8 bits (KIVI, arXiv 2402.02750, section 3).

    Returns codes uint8 [..., D], scale [...] and zero point [...].

    >>> uniform_encode(torch.tensor([-1.0, 0.4, 2.0], dtype=torch.float64), 2)[0].tolist()
    [0, 1, 3]
    """
    scale, zero = map(stored, min_max(x, bits, FP16_TINY))
    return nearest(x, scale, zero, bits), scale, zero


def uniform_decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """codes * scale + zero: codes [..., D], scale and zero [...] to float64 [..., D]."""
    return codes.to(torch.float64) * scale.unsqueeze(-1) + zero.unsqueeze(-1)


def _gaussian(t: Tensor) -> tuple[Tensor, Tensor]:
    """For N(0, 1): the mass below t, and the integral of x below t."""
    return torch.special.ndtr(t), -torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _sphere(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same for sqrt(dim) times a coordinate of a random unit vector (arXiv 2504.19874, Lemma 1)."""
    try:
        from scipy.special import betainc, gammaln  # slow to import, and only this kind needs it
    except ImportError as error:
        raise ImportError('levels of kind "sphere" need scipy: pip install "fade-fast[train]"') from error

    half, z = (dim - 1) / 2, (t / math.sqrt(dim)).clamp(-1, 1)
    norm = math.exp(gammaln(dim / 2) - gammaln(half)) / math.sqrt(math.pi)
    mass = torch.from_numpy(betainc(half, half, ((1 + z) / 2).numpy()))
    return mass, -math.sqrt(dim) * norm * (1 - z * z) ** half / (dim - 1)


def _closest_odd(centroid: Tensor, mass: Tensor, powers: tuple[int, ...]) -> Tensor:
    """The odd polynomial of the index that fits the centroids best, by least squares weighted with `mass`."""
    u = torch.arange(1 - len(mass), len(mass), 2, dtype=torch.float64)
    basis = torch.stack([u**power for power in powers], dim=1)
    weight = mass.sqrt()
    return basis @ torch.linalg.lstsq(weight.unsqueeze(-1) * basis, weight * centroid).solution


@lru_cache
def _levels(bits: int, kind: str, dim: int | None) -> tuple[float, ...]:
    if bits not in (2, 3, 4) or kind not in ("gaussian", "sphere", "cubic", "linear"):
        raise ValueError(f"no levels of bits={bits!r}, kind={kind!r}")
    if kind == "sphere" and (dim is None or dim < 3):
        raise ValueError(f"kind='sphere' needs dim of at least 3, not {dim!r}")
    end = torch.tensor([math.inf], dtype=torch.float64)
    level = torch.linspace(-1.5, 1.5, 2**bits, dtype=torch.float64)
    for _ in range(2000):  # 16 levels need about 740 rounds for 1e-13
        bounds = torch.cat((-end, (level[1:] + level[:-1]) / 2, end))
        mass, first_moment = _sphere(bounds, dim) if kind == "sphere" else _gaussian(bounds)
        mass, level = mass.diff(), first_moment.diff() / mass.diff()
        if kind in ("cubic", "linear"):
            level = _closest_odd(level, mass, (1, 3) if kind == "cubic" else (1,))
        level = (level - level.flip(0)) / 2  # keep the symmetry exact
    return tuple(level.tolist())


def levels(bits: int, kind: str = "cubic", dim: int | None = None) -> Tensor:
    """The 2^bits decoded values of a coordinate of unit variance: float64, ascending.

    Lloyd's iteration (Lloyd 1982, method I; Max 1960): cells end midway between levels, and each level moves
    to the centroid of its cell. With u = 2 code - (2^bits - 1), `kind` is

    - "linear": a u, evenly spaced levels, the kind that the cache uses. A kernel multiplies codes directly.
      The squared error is 1 % above "gaussian" at 2 bits, 8 % at 3 bits.
    - "gaussian": any levels, for N(0, 1).
    - "sphere": any levels, for sqrt(dim) times a coordinate of a random unit vector (arXiv 2504.19874).
    - "cubic": u (a + b u^2), with (a, b) fitted to the centroids in every round; "gaussian" at 2 bits.

    Raises `ValueError` for bits other than 2, 3, 4, an unknown kind, and "sphere" without dim >= 3.

    >>> levels(2).round(decimals=4).tolist()
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    return torch.tensor(_levels(bits, kind, dim if kind == "sphere" else None), dtype=torch.float64)


def steps(bits: int, kind: str = "cubic", dim: int | None = None) -> Tensor:
    """What the stored scale multiplies, float64 [2^bits]: `levels`; for "linear", the code less the center.

    >>> steps(2, "linear").tolist()
    [-1.5, -0.5, 0.5, 1.5]
    """
    if kind == "linear":
        return torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    return levels(bits, kind, dim)


def cubic(bits: int) -> tuple[float, float]:
    """(a, b) of the "cubic" levels u * (a + b u^2), u = 2 code - (2^bits - 1).

    >>> [round(c, 6) for c in cubic(4)]
    [0.120254, 0.000262]
    """
    one, three = levels(bits)[2 ** (bits - 1) :][:2].tolist()  # u = 1: a + b; u = 3: 3 a + 27 b
    b = (three - 3 * one) / 24
    return one - b, b


def lloyd_encode(y: Tensor, bits: int, kind: str = "cubic", norm: str = "unbiased") -> tuple[Tensor, Tensor]:
    """Lloyd-Max codes of rotated vectors y [..., D] (TurboQuant, arXiv 2504.19874, Algorithm 1).

    A code is the number of midpoints strictly below y sqrt(D) / |y|, so ties go down. Decoding gives
    scale * z, where z are the `steps` of the codes. `norm` chooses the scale:

    - "unbiased", the default: <y, y> / <y, z>, so that <decoded, y> = |y|^2. Attention averages over tokens.
      There independent errors cancel, but a common shrinkage does not.
    - "least_squares": <y, z> / <z, z>, the smallest error of one vector. Decoded vectors are too short.
    - "plain": |y| / sqrt(D), times the distance of "linear" levels. Decoded vectors are as short.

    Returns codes uint8 [..., D] and scale [...] (`stored`; 0 for a zero vector). Raises `ValueError` for an
    unknown kind or norm, and for bits other than 2, 3, 4.
    """
    y, dim = finite(y), y.shape[-1]
    level = levels(bits, kind, dim)
    length = y.norm(dim=-1)
    unit = y * math.sqrt(dim) / length.where(length > 0, 1.0).unsqueeze(-1)
    midpoints = (level[1:] + level[:-1]) / 2
    codes = torch.bucketize(unit, midpoints)  # how many are strictly below
    z = steps(bits, kind, dim)[codes]
    aligned = (unit * z).sum(-1).where(length > 0, 1.0)
    plain = (level[-1] / steps(bits, kind, dim)[-1]).item()
    factor = {"plain": plain, "least_squares": aligned / (z * z).sum(-1), "unbiased": dim / aligned}
    if norm not in factor:
        raise ValueError(f"norm={norm!r}: one of {', '.join(factor)} is allowed")
    return codes.to(torch.uint8), stored(length / math.sqrt(dim) * factor[norm])


def lloyd_decode(codes: Tensor, scale: Tensor, bits: int, kind: str = "cubic") -> Tensor:
    """scale * steps[codes]: codes [..., D], scale [...] to float64 [..., D]."""
    return scale.unsqueeze(-1) * steps(bits, kind, codes.shape[-1])[codes.long()]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] as bytes uint8 [..., D * bits / 8]. The most significant bit is on the left:

        8 bits  byte j = c[j]
        4 bits  byte j = c[j+D/2] c[j]
        2 bits  byte j = c[j+3D/4] c[j+D/2] c[j+D/4] c[j]
        3 bits  byte j = h[j] g[j] c[j+3D/8] c[j]: two whole codes, and one bit of each of two more.
                g holds all lowest bits of c[6D/8], c[6D/8+1], .., then all middle bits, then all highest
                bits: 3D/8 bits. h holds the same of c[7D/8], c[7D/8+1], ..

    Adjacent bytes hold adjacent channels, so a kernel needs no shuffle. Raises `ValueError` for codes out of
    range, for other widths, and for D that does not fill whole bytes.

    >>> [hex(b) for b in pack(torch.tensor([1, 2, 3, 4]), 4).tolist()]
    ['0x31', '0x42']
    """
    packed_bytes(bits, codes.shape[-1])  # raises for sizes that do not fit
    if bits not in INTEGER_TIERS or ((codes < 0) | (codes > 2**bits - 1)).any():
        raise ValueError(f"codes of {bits!r} bits must lie in 0 .. {2**bits - 1}")
    codes = codes.long()
    if bits == 3:
        first, second, *cut = codes.split([3 * codes.shape[-1] // 8] * 2 + [codes.shape[-1] // 8] * 2, dim=-1)
        g, h = ((c.unsqueeze(-2) >> torch.arange(3).unsqueeze(-1) & 1).flatten(-2) for c in cut)
        return (first | second << 3 | g << 6 | h << 7).to(torch.uint8)
    strands = codes.unflatten(-1, (8 // bits, -1))  # those that share a byte
    return (strands << bits * torch.arange(8 // bits).unsqueeze(-1)).sum(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Undo `pack`: codes uint8 [..., dim] of bytes `packed` [..., dim * bits / 8].

    Raises `ValueError` for another size.
    """
    if bits not in INTEGER_TIERS or packed.shape[-1] != packed_bytes(bits, dim):
        raise ValueError(f"{packed.shape[-1]} bytes do not hold {dim} codes of {bits!r} bits")
    packed = packed.unsqueeze(-2).long()
    if bits == 3:
        whole = packed >> torch.tensor([[0], [3]]) & 7
        cut = (packed >> torch.tensor([[6], [7]]) & 1).unflatten(-1, (3, -1))  # g and h, bit by bit
        cut = (cut << torch.arange(3).unsqueeze(-1)).sum(-2)
        return torch.cat((whole.flatten(-2), cut.flatten(-2)), dim=-1).to(torch.uint8)
    strands = packed >> bits * torch.arange(8 // bits).unsqueeze(-1) & 2**bits - 1
    return strands.flatten(-2).to(torch.uint8)


__getattr__ = lookup(__name__)
