"""Published formats to compare with, each defined once: how a vector is stored, and what it decodes to.

These are forms, not ports. Each one has the codes and the stored numbers that its source describes. It uses
float64 arithmetic and rounds all stored numbers to fp16. What a source adds around its codes is left out: how
long recent tokens stay exact, fused kernels, thresholds for outliers. So benchmarks.simulation can compare
formats with the same uncompressed tokens.

A name is a format and its widths, as in "kivi2" or "kivi-k4v2", with ":group=32" for another group size.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fade_ref import baselines, quantize
from fade_ref.quantize import FP16_TINY, finite, stored
from fade_ref.rotation import qr_rotation

TILE = 128  # tokens that share the channel scales of KVarN
ROUNDS = 16  # of KVarN's normalization
#: KVarN's limits of a deviation, and of the logarithm of a scale.
DEVIATIONS, LOGARITHMS = (1e-3, 1e3), (-0.3, 10.0)
#: HQQ's norm, weight of the penalty, growth of the weight, and rounds.
LP, BETA, KAPPA, HQQ_ROUNDS = 0.7, 10.0, 1.01, 20


class Coded(NamedTuple):
    """Stored vectors: codes uint8 [H, n, D] of `bits` bits each, and what else is stored, all fp16 values."""

    codes: Tensor
    bits: int
    numbers: tuple[Tensor, ...]

    @property
    def bytes(self) -> float:
        """All bytes, with packed codes and two bytes for each number."""
        return self.codes.numel() * self.bits / 8 + 2 * sum(x.numel() for x in self.numbers)


@dataclass(frozen=True)
class Side:
    """How keys or values [H, n, D] are stored: `encode` gives `Coded`, and `decode` float64 [H, n, D].

    Attributes:
        whole: tokens after which the number of stored numbers repeats. A shorter last group has numbers of
            its own.
    """

    encode: Callable[[Tensor], Coded]
    decode: Callable[[Coded], Tensor]
    whole: int = 1

    def bytes_per_token(self, dim: int) -> float:
        """Bytes of one vector of `dim` channels, counted on the record of a whole group of tokens."""
        x = torch.randn(1, self.whole, dim, generator=torch.Generator().manual_seed(0))
        return self.encode(x.double()).bytes / self.whole


@dataclass(frozen=True)
class Baseline:
    """A published format.

    Attributes:
        name: what it was asked for by.
        source: where it is described, and what differs from there.
    """

    name: str
    source: str = field(compare=False)
    keys: Side = field(compare=False)
    values: Side = field(compare=False)

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n, D] as they are read back, float64."""
        return self.keys.decode(self.keys.encode(keys)), self.values.decode(self.values.encode(values))


# -- groups with scale and zero point


def per_token(bits: int, group: int) -> Side:
    """Uniform codes with scale and zero point for each `group` adjacent channels of a token."""

    def encode(x: Tensor) -> Coded:
        codes, scale, zero = baselines.group_encode(x, bits, group)
        return Coded(codes, bits, (scale, zero))

    return Side(encode, lambda coded: baselines.group_decode(coded.codes, *coded.numbers))


def per_channel(bits: int, group: int) -> Side:
    """Uniform codes with scale and zero point for each channel over `group` tokens that follow each other."""

    def encode(x: Tensor) -> Coded:
        found = [quantize.uniform_encode(part.mT, bits) for part in finite(x).split(group, dim=-2)]
        codes, scale, zero = zip(*found)
        return Coded(
            torch.cat([c.mT for c in codes], -2), bits, (torch.stack(scale, -2), torch.stack(zero, -2))
        )

    def decode(coded: Coded) -> Tensor:
        n = coded.codes.shape[-2]
        scale, zero = (x.repeat_interleave(group, dim=-2)[..., :n, :] for x in coded.numbers)
        return coded.codes * scale + zero

    return Side(encode, decode, group)


def half_quadratic(bits: int, group: int) -> Side:
    """Scale from the range of each `group` adjacent channels, and the zero point that fits the codes best.

    The zero point minimizes |x - decoded|^p, p < 1, by half-quadratic splitting: the proximal map of the norm
    draws errors toward 0, and the zero point becomes the mean of the codes less the scaled rest. Of all
    rounds, each group keeps the zero point with the least mean absolute error.
    """
    top = 2**bits - 1

    def fit(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, error and mean absolute error of groups [..., group]. Zero points are in units of codes."""
        codes = torch.round(x / scale + zero).clamp(0, top)
        error = x - (codes - zero) * scale
        return codes, error, error.abs().mean(-1, keepdim=True)

    def encode(x: Tensor) -> Coded:
        x = finite(x).unflatten(-1, (-1, group))
        low, high = (y.unsqueeze(-1) for y in x.aminmax(dim=-1))
        scale = stored(((high - low) / top).clamp(min=FP16_TINY))
        zero = best = stored(-low / scale)
        codes, error, least = fit(x, scale, zero)
        beta = BETA
        for _ in range(HQQ_ROUNDS):
            shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(LP - 1) / beta).clamp(
                min=0
            )
            zero = stored((codes - (x - shrunk) / scale).mean(-1, keepdim=True))
            codes, error, size = fit(x, scale, zero)
            best, least, beta = zero.where(size < least, best), size.minimum(least), beta * KAPPA
        codes = fit(x, scale, best)[0]
        return Coded(codes.flatten(-2).to(torch.uint8), bits, (scale.squeeze(-1), best.squeeze(-1)))

    def decode(coded: Coded) -> Tensor:
        scale, zero = (y.unsqueeze(-1) for y in coded.numbers)
        return ((coded.codes.unflatten(-1, (-1, group)) - zero) * scale).flatten(-2)

    return Side(encode, decode)


# -- rotations


def hadamard(dim: int) -> Tensor:
    """One randomized Hadamard round, float64 [dim, dim]; a random orthogonal matrix where there is none."""
    return qr_rotation(dim) if dim & (dim - 1) else baselines.hadamard_rotation(dim, rounds=1)


def balanced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of tokens [..., n, 1] and channels [..., 1, D] that even out the deviations of x [..., n, D].

    The deviations of tokens and channels are divided out in turns. The most even result counts: the least sum
    of the two ratios of the largest to the smallest deviation.
    """
    log = [torch.zeros_like(x[..., :1]), torch.zeros_like(x[..., :1, :])]  # of the tokens, of the channels
    rest = lambda: x / (log[0] + log[1]).exp()  # noqa: E731

    def spread(dim: int) -> Tensor:
        return rest().std(dim, keepdim=True, correction=1 if x.shape[dim] > 1 else 0)

    def unevenness() -> Tensor:
        both = (spread(dim).clamp(min=1e-8).flatten(-2) for dim in (-1, -2))
        return sum(s.amax(-1) / s.amin(-1) for s in both)[..., None, None]

    best, least = list(log), unevenness()
    for _ in range(ROUNDS):
        for i, dim in enumerate((-1, -2)):
            log[i] = (log[i] + spread(dim).clamp(*DEVIATIONS).log()).clamp(*LOGARITHMS)
        now = unevenness()
        best = [new.where(now <= least, old) for new, old in zip(log, best)]
        least = now.minimum(least)
    return best[0].exp(), best[1].exp()


def normalized(bits: int, over: str) -> Side:
    """Hadamard rotation, deviations evened out in tiles of `TILE` tokens, and uniform codes.

    `over`: "channel" has scale and zero point for each channel of a tile, and a factor for each token.
    "token" has scale and zero point for each token, and a factor for each channel of a tile.
    """

    def tile(x: Tensor) -> tuple[Tensor, ...]:
        """Codes, scale, zero point and factor of tiles [H, tiles, tokens, D] of rotated vectors."""
        of_tokens, of_channels = balanced(x)
        own, factor = (of_channels, of_tokens) if over == "channel" else (of_tokens, of_channels)
        factor = stored(factor)
        dim = -2 if over == "channel" else -1
        low, high = (x / factor).aminmax(dim=dim, keepdim=True)
        scale, zero = stored(((high - low) / (2**bits - 1)).clamp(min=FP16_TINY)), stored(low)
        codes = torch.round((x / factor - zero) / scale).clamp(0, 2**bits - 1).to(torch.uint8)
        return tuple(y.flatten(1, 2) for y in (codes, scale, zero, factor))

    def encode(x: Tensor) -> Coded:
        whole = x.shape[1] // TILE * TILE
        tiles = (finite(x) @ hadamard(x.shape[-1]).T).split([whole, x.shape[1] - whole], dim=1)
        found = [tile(y.unflatten(1, (-1, min(TILE, y.shape[1])))) for y in tiles if y.shape[1]]
        codes, *numbers = (torch.cat(part, dim=1) for part in zip(*found))
        return Coded(codes, bits, tuple(numbers))

    def decode(coded: Coded) -> Tensor:
        n = coded.codes.shape[-2]
        of_tiles = lambda x: x.repeat_interleave(TILE, dim=-2)[..., :n, :]  # noqa: E731
        scale, zero, factor = coded.numbers
        if over == "channel":
            scale, zero = of_tiles(scale), of_tiles(zero)
        else:
            factor = of_tiles(factor)
        return (coded.codes * scale + zero) * factor @ hadamard(coded.codes.shape[-1])

    return Side(encode, decode, TILE)


def lloyd(bits: int) -> Side:
    """Random rotation, the best levels for a coordinate of a random unit vector, and the norm."""

    def encode(x: Tensor) -> Coded:
        codes, scale = quantize.lloyd_encode(
            finite(x) @ qr_rotation(x.shape[-1]).T, bits, kind="sphere", norm="plain"
        )
        return Coded(codes, bits, (scale,))

    def decode(coded: Coded) -> Tensor:
        found = quantize.lloyd_decode(coded.codes, *coded.numbers, bits, kind="sphere")
        return found @ qr_rotation(coded.codes.shape[-1])

    return Side(encode, decode)


# -- formats


@dataclass(frozen=True)
class Form:
    """A format of any width: its source, its sides by (bits, group), its usual group, its widths."""

    source: str
    keys: Callable[[int, int], Side]
    values: Callable[[int, int], Side]
    group: int | None
    widths: tuple[int, ...]


FORMS = {
    "kivi": Form(
        "KIVI, arXiv 2402.02750, section 3: keys by channel over groups of tokens, values by token over "
        "groups of channels; the paper's group is 32",
        per_channel, per_token, 32, (8, 4, 3, 2),
    ),
    "quanto": Form(
        "QuantizedCache(backend='quanto') of transformers: keys and values by token in groups of 64 "
        "channels, range of the group",
        per_token, per_token, 64, (8, 4, 2),
    ),
    "hqq": Form(
        "QuantizedCache(backend='hqq') of transformers with axis 1, which its documentation advises: by "
        "token in groups of 64 channels, zero points by half-quadratic splitting (Badri and Shaji, 2023)",
        half_quadratic, half_quadratic, 64, (8, 4, 3, 2),
    ),
    "kvarn": Form(
        "KVarN, arXiv 2606.03458, and the limits of its published code: tiles of 128 tokens, Hadamard "
        "rotation, deviations of tokens and channels evened out; keys by channel of a tile, values by token",
        lambda bits, _: normalized(bits, "channel"), lambda bits, _: normalized(bits, "token"),
        None, (8, 4, 3, 2),
    ),
    "turboquant": Form(
        "TurboQuant, arXiv 2504.19874, Algorithm 1: rotation, Lloyd-Max levels, fp16 norm; without the "
        "residual sketch of Algorithm 2",
        lambda bits, _: lloyd(bits), lambda bits, _: lloyd(bits), None, (4, 3, 2),
    ),
}  # fmt: skip
NAME = re.compile(
    rf"(?P<form>{'|'.join(FORMS)})(?:(?P<both>\d)|-k(?P<key>\d)v(?P<value>\d))(?::group=(?P<group>\d+))?"
)


def baseline(name: str) -> Baseline:
    """The format called `name`. Raises `ValueError` for a name, a width or a group that it does not have."""
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(
            f"no baseline {name!r}: one of {', '.join(FORMS)}, then widths, as in kivi2 or kivi-k4v2"
        )
    form = FORMS[found["form"]]
    bits = [int(found["both"] or found[side]) for side in ("key", "value")]
    if not set(bits) <= set(form.widths):
        raise ValueError(f"{name!r}: {', '.join(map(str, form.widths))} bits are allowed")
    if found["group"] and form.group is None:
        raise ValueError(f"{name!r}: {found['form']} has no groups to choose")
    group = int(found["group"] or form.group or 0)
    if form.group and group < 1:
        raise ValueError(f"{name!r}: a group has at least 1 element")
    return Baseline(name, form.source, form.keys(bits[0], group), form.values(bits[1], group))
